"""Attention, linear layers and norms fused in models whose forward stays their own."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import subprocess
import sys
import unittest.mock
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models import normalization
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import tbcm_kernels as tk
from tbcm_kernels import modules
from tbcm_kernels.backend import NAME

HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
TEXT = {"in_channels": 4, "joint_attention_dim": 8, "axes_dims_rope": (4, 4, 8)} | HEADS
WAN = {
    "in_channels": 4, "out_channels": 4, "text_dim": 8, "freq_dim": 16, "ffn_dim": 32,
    "num_layers": 2, "rope_max_seq_len": 16,
} | HEADS  # fmt: skip
MASK = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
VIDEO = (2, 4, 2, 4, 4)
"""Batch, channels, frames, height, width."""


def _flux() -> tuple[nn.Module, Tensor, dict]:
    model = diffusers.FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, pooled_projection_dim=8, **TEXT
    )
    places = {"img_ids": torch.randint(0, 4, (12, 3)).float(), "txt_ids": torch.zeros(5, 3)}
    return model, torch.randn(2, 12, 4), places | {"pooled_projections": torch.randn(2, 8)}


def _wan(**image: int) -> tuple[nn.Module, Tensor, dict]:
    model = diffusers.WanTransformer3DModel(**WAN | image)
    return model, torch.randn(VIDEO), {"timestep": torch.tensor([3, 9])}


def _wan_of_an_image() -> tuple[nn.Module, Tensor, dict]:
    model, x, options = _wan(image_dim=8, added_kv_proj_dim=32)
    text, image = torch.randn(2, 512, 8), torch.randn(2, 5, 8)
    return model, x, options | {"encoder_hidden_states": text, "encoder_hidden_states_image": image}


def _qwen() -> tuple[nn.Module, Tensor, dict]:
    model = diffusers.QwenImageTransformer2DModel(out_channels=1, num_layers=2, **TEXT)
    options = {"encoder_hidden_states_mask": MASK.bool(), "img_shapes": [[(1, 3, 4)]] * 2}
    return model, torch.randn(2, 12, 4), options


def _sana_video() -> tuple[nn.Module, Tensor, dict]:
    model = diffusers.SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=2, num_cross_attention_heads=2,
        cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=8, sample_size=4,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=16, patch_size=(1, 1, 1), **HEADS,
    )  # fmt: skip
    return model, torch.randn(VIDEO), {"timestep": torch.tensor([3, 9])}


def _hunyuan_video() -> tuple[nn.Module, Tensor, dict]:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1,
        text_embed_dim=8, pooled_projection_dim=8, rope_axes_dim=(4, 4, 8), **HEADS,
    )  # fmt: skip
    options = {"pooled_projections": torch.randn(2, 8), "guidance": torch.tensor([1e3, 1e3])}
    return model, torch.randn(VIDEO), options | {"encoder_attention_mask": MASK}


def _ltx() -> tuple[nn.Module, Tensor, dict]:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, cross_attention_dim=32, num_layers=2, caption_channels=8,
        **HEADS,
    )  # fmt: skip
    options = {"encoder_attention_mask": MASK, "num_frames": 1, "height": 3, "width": 4}
    return model, torch.randn(2, 12, 4), options


def _qwen21() -> tuple[nn.Module, Tensor, dict]:
    """Its processor gives no backend to one of its calls; text, a picture of 2 by 2, a latent."""
    model = diffusers.QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        context_in_dim=8, mlp_ratio=2, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    options = {
        "encoder_hidden_states": torch.randn(2, 8, 8), "timestep": torch.tensor([0.3]),
        "encoder_hidden_states_mask": torch.ones(2, 8, dtype=torch.bool),
        "img_mask": torch.tensor([[False] * 5 + [True] + [False] * 2 + [True] * 4] * 2),
        "img_shapes": [[(1, 2, 2), (1, 4, 4)]] * 2,
    }  # fmt: skip
    return model, torch.randn(2, 20, 4), options


def _cosmos() -> tuple[nn.Module, Tensor, dict]:
    model = diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=2, text_embed_dim=8, adaln_lora_dim=4,
        max_size=(4, 8, 8), extra_pos_embed_type=None, concat_padding_mask=False, **HEADS,
    )  # fmt: skip
    return model, torch.randn(VIDEO), {}


def _cogvideox() -> tuple[nn.Module, Tensor, dict]:
    model = diffusers.CogVideoXTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=2, text_embed_dim=8, time_embed_dim=8,
        sample_width=4, sample_height=4, sample_frames=5, max_text_seq_length=5, **HEADS,
    )  # fmt: skip
    return model, torch.randn(2, 2, 4, 4, 4), {}


def _lumina2() -> tuple[nn.Module, Tensor, dict]:
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=32, num_layers=2,
        num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1, multiple_of=16,
        axes_dim_rope=(4, 4, 8), axes_lens=(32, 32, 32), cap_feat_dim=8,
    )  # fmt: skip
    return model, torch.randn(2, 4, 4, 4), {"encoder_attention_mask": MASK.bool()}


class OwnAttention(nn.Module):
    """Attention as one writes it without diffusers; `attend` is found in the forward's class."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width // heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query=q, key=k, value=v, dropout_p=0.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        o = self.attend(self.norm(q), self.norm(k), v)
        return self.out(o.transpose(1, 2).flatten(2))


class Own(nn.Module):
    """A transformer that knows nothing of diffusers, with a text token before x's."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.text = nn.Linear(1, 32), nn.Linear(8, 32)
        self.norms = nn.ModuleList(nn.LayerNorm(32, elementwise_affine=False) for _ in range(2))
        self.attn = nn.ModuleList(OwnAttention(32, 2) for _ in range(2))

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor,
        return_dict: bool,
    ) -> tuple[Tensor]:  # fmt: skip
        x = torch.cat((self.text(encoder_hidden_states), hidden_states), 1)
        for norm, attn in zip(self.norms, self.attn, strict=True):
            x = x + attn(norm(x) * (1 + self.time(timestep[:, None, None])))
        return (x,)


def _own() -> tuple[nn.Module, Tensor, dict]:
    return Own(), torch.randn(2, 12, 32), {}


MODELS = {
    f.__name__[1:]: f
    for f in (
        *(_cosmos, _cogvideox, _lumina2, _own, _flux, _wan, _wan_of_an_image, _qwen, _qwen21),
        *(_sana_video, _hunyuan_video, _ltx),
    )
}


def _made(name: str) -> tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]:
    """Model, its output as a function of x, and x."""
    torch.manual_seed(0)
    model, x, options = MODELS[name]()
    for norm in (m for m in model.modules() if "RMSNorm" in type(m).__name__):
        if getattr(norm, "weight", None) is not None:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    common = {"timestep": torch.tensor([0.3, 0.7]), "encoder_hidden_states": torch.randn(2, 5, 8)}
    common |= options
    return model, lambda x: model(hidden_states=x, return_dict=False, **common)[0], x


def _step(model: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Value, tangent, and all gradients of a projection of both."""
    value, tangent = torch.func.jvp(function, (x,), (x.cos(),))
    torch.manual_seed(1)
    weights = torch.randn(2, *value.shape)
    loss = (value * weights[0]).sum() + (tangent * weights[1]).sum()
    # What is added to all keys alike cancels in softmax: its gradient is rounding.
    cancels = ("to_k.bias", "k_proj.bias", "norm_k.bias")
    used = [p for n, p in model.named_parameters() if not n.endswith(cancels)]
    grads = torch.autograd.grad(loss, used, allow_unused=True)
    return [value.detach(), tangent.detach(), *(g for g in grads if g is not None)]


def _layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """`F.layer_norm`, whose gradient through the tangent is wrong (pytorch#196700)."""
    center = x - x.mean(-1, keepdim=True)
    y = center * torch.rsqrt(center.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def worst(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-4)).item()


@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_stock(name: str) -> None:
    """Value, tangent and gradients through both; without fuse PyTorch refuses forward mode."""
    model, function, x = _made(name)
    before = _attributes(model)
    with sdpa_kernel(SDPBackend.MATH), unittest.mock.patch.object(F, "layer_norm", _layer_norm):
        want = _step(model, function, x)
    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(function, (x,), (x,))
    with tk.fuse(model):
        got = _step(model, function, x)
    assert len(got) == len(want)
    assert max(map(worst, got, want)) < 2e-5
    assert _attributes(model) == before


def _attributes(model: nn.Module) -> dict[str, dict[str, object]]:
    """Those of all modules, but for what some models keep of tensors there."""

    def plain(value: object) -> bool:
        return not isinstance(value[0] if isinstance(value, list) and value else value, Tensor)

    return {
        name: {n: v for n, v in module.__dict__.items() if plain(v)}
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("default_device", [None])  # in its scope Dynamo knows no Tensor.unflatten
@pytest.mark.parametrize("name", ["flux", "wan", "cogvideox", "own"])
def test_compiles_in_one_graph(name: str) -> None:
    """Wan's stock layer norms do not: Dynamo cannot trace F.layer_norm of a dual with weights."""
    model, function, x = _made(name)

    def dual(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(function, (x,), (torch.ones_like(x),))

    with tk.fuse(model):
        want = dual(x)
        got = torch.compile(dual, backend="aot_eager", fullgraph=True)(x)
    torch.compiler.reset()
    assert max(map(worst, got, want)) < 1e-5


def test_what_was_replaced_is_told() -> None:
    model, _, _ = _made("flux")
    told = repr(tk.fuse(model))
    assert told.startswith("Fused(FluxTransformer2DModel: 2 FluxAttnProcessor, ")
    for layer in ("Linear", "RMSNorm", "AdaLayerNormZero", "AdaLayerNormZeroSingle", "LayerNorm"):
        assert f" {layer}" in told
    assert "FluxAttention" not in told


def test_copies_and_pickles(tmp_path: Path) -> None:
    """Either is fused and can be given a handle, a pickle where nobody has fused before too."""
    model, function, x = _made("flux")
    want = function(x)
    handle = tk.fuse(model)
    file = tmp_path / "model.pickle"
    file.write_bytes(pickle.dumps(model))
    loads = (
        f"import pickle; m = pickle.load(open({str(file)!r}, 'rb')); "
        "print(m.transformer_blocks[0].attn.processor._attention_backend.value)"
    )
    run = subprocess.run([sys.executable, "-c", loads], capture_output=True, text=True)
    assert run.stdout.strip() == NAME, run.stderr
    for twin in (copy.deepcopy(model), pickle.loads(file.read_bytes())):
        assert twin.transformer_blocks[0].attn.processor._attention_backend == NAME
        assert twin.proj_out.forward.args == (twin.proj_out,)
        again = tk.fuse(twin)
        assert repr(again) == repr(handle)
        again.undo()
        assert not any("forward" in m.__dict__ for m in twin.modules())
        assert twin.transformer_blocks[0].attn.processor._attention_backend is None
    handle.undo()
    assert torch.equal(function(x), want)


def test_copies_of_models_with_processors() -> None:
    from test_processors import PIXART

    model = diffusers.PixArtTransformer2DModel(**PIXART)
    handle = tk.fuse(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        tk.fuse(twin).undo()
        stock = twin.transformer_blocks[0].attn1.processor
        assert type(stock).__name__ == "AttnProcessor2_0"
    handle.undo()


def test_classes_with_another_forward_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32)), torch.randn(2, 5, 32)
    stock = nn.LayerNorm.forward
    twice = functools.wraps(stock)(lambda self, x: 2 * stock(self, x))  # even under its name
    monkeypatch.setattr(nn.LayerNorm, "forward", twice)
    want = model(x)
    with tk.fuse(model) as fused:
        assert "forward" not in fused[0].__dict__
        torch.testing.assert_close(model(x), want)


def test_layers_that_do_more_keep_their_forward() -> None:
    """A forward of its own, a subclass, two dimensions, a bias."""

    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model, function, x = _made("flux")
    model.proj_out = Twice(32, 4)
    own = model.context_embedder.forward
    model.context_embedder.forward = lambda x: 3 * own(x)
    model.x_embedder.forward = model.x_embedder.forward  # as accelerate leaves it behind
    model.wide = nn.LayerNorm((2, 3))
    model.biased = normalization.RMSNorm(8, 1e-6, bias=True)
    want = function(x)
    with tk.fuse(model):
        for kept in (model.proj_out, model.wide, model.biased):
            assert "forward" not in kept.__dict__
        assert model.x_embedder.forward.func is modules.Linear.forward
        assert worst(function(x), want) < 1e-5


@pytest.mark.parametrize("late", [False, True])
def test_layers_inside_a_fused_layer_run(late: bool) -> None:
    """With hooks that they have or are given later, as another activation, or a forward of own."""
    outputs = []
    for fused in (True, False):
        model, function, x = _made("flux")
        if fused and late:
            tk.fuse(model)
        norm = model.transformer_blocks[0].norm1
        norm.norm.register_forward_hook(lambda module, args, y: 4 * y)
        norm.linear.register_forward_hook(lambda module, args, y: 5 * y)
        norm.silu.register_forward_hook(lambda module, args, y: 2 * y)
        model.norm_out.silu = nn.GELU()
        model.norm_out.norm.forward = lambda x: x.tanh()
        if fused and not late:
            tk.fuse(model)
        outputs.append(function(x))
    assert worst(*outputs) < 1e-5


def test_norms_that_are_changed_after_fuse_run() -> None:
    torch.manual_seed(0)
    x, emb = torch.randn(2, 6, 16), torch.randn(2, 16)
    model = nn.ModuleList([normalization.AdaLayerNormZero(16), normalization.RMSNorm(16, 1e-6)])
    handle = tk.fuse(model)
    model[0].norm = nn.LayerNorm(16)
    model[1].bias = nn.Parameter(torch.randn(16))
    nn.init.normal_(model[0].norm.weight)
    got = model[0](x, emb=emb)[0], model[1](x)
    handle.undo()
    torch.testing.assert_close(got, (model[0](x, emb=emb)[0], model[1](x)))


def test_a_part_of_a_fused_model_is_not_fused_again() -> None:
    model, function, x = _made("flux")
    handle = tk.fuse(model)
    with pytest.raises(ValueError, match="fused already, by the fuse"):
        tk.fuse(model.transformer_blocks[0])
    handle.undo()
    inner = tk.fuse(model.transformer_blocks[0])
    with pytest.raises(ValueError, match="fused already, by the fuse"):
        tk.fuse(model)
    inner.undo()
    with tk.fuse(model):
        torch.func.jvp(function, (x,), (x,))


def test_attention_in_scope() -> None:
    """Told, copied, checkpointed, undone; a forward of the instance's own is left alone."""
    model, function, x = _made("own")
    signature = inspect.signature(model.attn[0].forward)
    handle = tk.fuse(model)
    assert inspect.signature(model.attn[0].forward) == signature
    assert repr(handle) == "Fused(Own: 2 OwnAttention, 6 Linear, 4 LayerNorm)"
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.attn[1].forward.args[1] is twin.attn[1]
        tk.fuse(twin).undo()
        assert not any("forward" in m.__dict__ for m in twin.modules())
    inputs = torch.randn(2, 5, 32, requires_grad=True)
    grads = []
    for call in (model.attn[0], lambda x: checkpoint(model.attn[0], x, use_reentrant=False)):
        grads += torch.autograd.grad(call(inputs).sin().sum(), inputs)
    assert torch.equal(*grads)
    handle.undo()
    model.attn[0].forward = lambda x: OwnAttention.forward(model.attn[0], x)
    with tk.fuse(model), pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(function, (x,), (x,))
    attn = model.attn[1]
    attn.attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.1)
    with tk.fuse(attn):
        attn(x)  # without a tangent it is PyTorch's
        with pytest.raises(ValueError, match="dropout_p"):
            torch.func.jvp(attn, (x,), (x,))


def test_a_forward_of_another_instance_or_with_arguments_is_left_alone() -> None:
    model = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
    first, second, third, fourth = model
    second.forward = first.forward
    third.forward = functools.partial(nn.Linear.forward, third, input=torch.ones(32))
    fourth.forward = functools.partial(nn.Linear.forward, fourth, torch.ones(32))
    own = second.forward, third.forward, fourth.forward
    handle = tk.fuse(model)
    assert repr(handle) == "Fused(ModuleList: 1 Linear)"
    handle.undo()
    assert (second.forward, third.forward, fourth.forward) == own


def test_what_fails_midway_leaves_nothing_changed() -> None:
    class Frozen(OwnAttention):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "forward":
                raise AttributeError("frozen")
            super().__setattr__(name, value)

    model = nn.Sequential(OwnAttention(32, 2), Frozen(32, 2))
    with pytest.raises(AttributeError, match="frozen"):
        tk.fuse(model)
    assert not any("forward" in m.__dict__ for m in model.modules())
    tk.fuse(model[0]).undo()


def test_a_backend_that_is_set_later_stays() -> None:
    model, _, _ = _made("wan")
    handle = tk.fuse(model)
    model.set_attention_backend("native")
    handle.undo()
    model.reset_attention_backend()
    assert not any("forward" in m.__dict__ for m in model.modules())
    tk.fuse(model).undo()


def test_skipped_attention_scores_are_refused() -> None:
    """diffusers does that by replacing F.scaled_dot_product_attention."""
    from diffusers import LayerSkipConfig
    from diffusers.hooks import apply_layer_skip

    model, function, x = _made("qwen")
    config = LayerSkipConfig(
        indices=[0], fqn="transformer_blocks", skip_attention=False, skip_attention_scores=True,
        skip_ff=False,
    )  # fmt: skip
    apply_layer_skip(model, config)
    function(x)
    with tk.fuse(model), pytest.raises(ValueError, match="which is not called here"):
        function(x)


def test_processors_that_do_not_call_pytorchs_attention_are_refused() -> None:
    model, _, _ = _made("wan")
    processor = model.blocks[1].attn2.processor

    class Other(type(processor)):
        """A subclass may do without dispatch_attention_fn."""

        def __call__(self, attn: nn.Module, *inputs: Tensor, **options: Tensor) -> Tensor:
            return inputs[0]

    model.blocks[1].attn2.processor = Other()
    with pytest.raises(ValueError, match=r"blocks\.1\.attn2 has a Other, which does not call F"):
        tk.fuse(model)
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert modules.Linear not in map(type, model.modules())
