"""Norms of diffusers that `fuse` gives another forward: dtypes, shapes and weights as in stock."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers.models import normalization
from test_layers import worst
from test_processors import SD3
from torch import nn
from torch.nn.utils import parametrize

import tbcm_kernels as tk
from tbcm_kernels import layers, processors

NORMS = {
    "FP32LayerNorm": {},
    "RMSNorm": {"eps": 1e-6},
    "RMSNorm without weight": {"eps": 0.1, "elementwise_affine": False},
    "RMSNorm of no width": {"eps": 1e-6, "elementwise_affine": False},
    "AdaLayerNormContinuous": {
        "conditioning_embedding_dim": 24, "elementwise_affine": False, "eps": 1e-3,
    },
    "AdaLayerNormZeroSingle": {},
    "AdaLayerNormZero": {},
}  # fmt: skip
FP32, BF16 = torch.float32, torch.bfloat16


def test_norms_of_queries_and_keys_run_inside_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = diffusers.SD3Transformer2DModel(**SD3 | {"qk_norm": "rms_norm"})
    attn = model.transformer_blocks[0].attn
    with tk.fuse(model):
        assert processors._kernel_norm(attn.norm_q) == (attn.norm_q.weight, attn.norm_q.eps)
        attn.norm_q.register_forward_hook(lambda module, args, y: y)
        assert processors._kernel_norm(attn.norm_q) is None


@pytest.mark.parametrize(
    ("kind", "of_x", "of_weights"),
    [
        (kind, x, weights)
        for kind in NORMS
        for x, weights in ((FP32, FP32), (BF16, BF16), (FP32, BF16), (BF16, FP32))
        if x == weights or kind != "AdaLayerNormContinuous"  # which casts emb to x's dtype
    ],
)
def test_dtypes_are_those_of_stock(
    kind: str, of_x: torch.dtype, of_weights: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    width = 0 if "no width" in kind else 24  # as Mochi makes those without a weight
    layer = getattr(normalization, kind.split()[0])(width, **NORMS[kind]).to(of_weights)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0.5, 0.3)
    x = torch.randn(2, 5, 24).to(of_x)
    emb = {"conditioning_embedding" if "Continuous" in kind else "emb": x[:, 0].to(of_weights)}
    emb = emb if kind.startswith("Ada") else {}
    want = layer(x, **emb)
    monkeypatch.setattr(layers.processors, "swaps", lambda model: [])
    for owner, name, new in layers.swaps(layer):
        setattr(owner, name, new)
    assert "forward" in layer.__dict__
    got = layer(x, **emb)
    close = 1e-5 if of_x == of_weights == FP32 else 0.03
    for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (got, want)), strict=True):
        assert a.dtype == b.dtype and worst(a.float(), b.float()) < close


def test_what_broadcasts_is_as_in_stock() -> None:
    """A weight of one number, and one x for several embeddings."""
    torch.manual_seed(0)
    x, emb = torch.randn(1, 5, 24), torch.randn(2, 24)
    model = nn.ModuleList(
        [normalization.RMSNorm(1, 1e-6), normalization.AdaLayerNormZeroSingle(24), nn.Linear(2, 2)]
    )
    want = [model[0](x), *model[1](x, emb)]
    with tk.fuse(model):
        torch.testing.assert_close([model[0](x), *model[1](x, emb)], want)


def test_a_nested_tensor_is_as_in_stock() -> None:
    nested = torch.nested.nested_tensor([torch.randn(n, 8) for n in (3, 5)], layout=torch.jagged)
    model = nn.ModuleList([normalization.RMSNorm(8, 1e-6), nn.LayerNorm(8), nn.RMSNorm(8)])
    want = [norm(nested).values() for norm in model]
    with tk.fuse(model):
        torch.testing.assert_close([norm(nested).values() for norm in model], want)


@pytest.mark.parametrize("bias", [False, True])
def test_weights_of_an_adaptive_norm_are_kept(bias: bool) -> None:
    torch.manual_seed(0)
    layer = normalization.AdaLayerNormContinuous(24, 24, elementwise_affine=True, bias=bias)
    nn.init.normal_(layer.norm.weight)
    x, emb = torch.randn(2, 5, 24), torch.randn(2, 24)
    want = layer(x, emb)
    with tk.fuse(nn.ModuleList([layer])):
        torch.testing.assert_close(layer(x, emb), want)


def test_a_group_norm_has_a_tangent_in_any_order_of_memory() -> None:
    """PyTorch's raises there, as in a UNet whose attention gives images back with channels last."""
    x, dx = torch.randn(2, 2, 4, 4, 8).permute(0, 1, 4, 2, 3)
    norm = nn.Sequential(nn.GroupNorm(2, 8))
    nn.init.normal_(norm[0].weight)
    want = torch.func.jvp(norm, (x.contiguous(),), (dx.contiguous(),))
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        torch.func.jvp(norm, (x,), (dx,))
    with tk.fuse(norm):
        torch.testing.assert_close(torch.func.jvp(norm, (x,), (dx,)), want)


class Counted(nn.Module):
    """A parametrization that counts how often it is read."""

    reads = 0

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        self.reads += 1
        return weight.clone()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm, normalization.FP32LayerNorm])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_parameters_are_read_once(kind: type[nn.Module], name: str, dtype: torch.dtype) -> None:
    """A parametrization may draw, or move on."""
    model = nn.Sequential(kind(16), nn.Linear(16, 8)).to(dtype)
    tk.fuse(model)
    if getattr(model[0], name, None) is None:
        return
    counted = Counted()
    parametrize.register_parametrization(model[0], name, counted)
    before, x = counted.reads, torch.randn(2, 5, 16, dtype=dtype)
    torch.func.jvp(model, (x,), (x.cos(),))
    assert counted.reads == before + 1
