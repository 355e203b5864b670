"""What users do to the layers of a fused SANA: taken as stock takes it, or refused by name."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from diffusers import SanaTransformer2DModel
from test_fuse import TINY, _inputs, _model
from torch import Tensor, nn
from torch.nn.utils import parametrize

import tbcm_kernels as tk

LONG = TINY | {"patch_size": 1, "sample_size": 16}
"""288 tokens, from which activations are computed again in backward."""


class Drop(nn.Module):
    """A third of the weights is left out, at random in each reading or as told."""

    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__()
        self.mask, self.drawn = mask, []

    def forward(self, weight: Tensor) -> Tensor:
        mask = (torch.rand_like(weight) < 0.7) if self.mask is None else self.mask
        self.drawn.append(mask)
        return weight * mask


def _dropping(model: SanaTransformer2DModel, name: str, drop: Drop) -> SanaTransformer2DModel:
    parametrize.register_parametrization(model.get_submodule(name), "weight", drop)
    drop.drawn.clear()  # of the registration
    return model


def _gradients(model: SanaTransformer2DModel, moving: bool) -> list[Tensor]:
    """Value, tangent and the gradients of the value."""
    inputs = _inputs(model)
    x = inputs.pop("hidden_states")

    def function(x: Tensor) -> Tensor:
        return model(hidden_states=x, **inputs, return_dict=False)[0]

    with tk.stop_tangent_gradient():
        both = torch.func.jvp(function, (x,), (x.sin(),)) if moving else (function(x),)
    both[0].square().mean().backward()
    return [*(v.detach() for v in both), *(p.grad for p in model.parameters())]


BLOCK = "transformer_blocks.0."
LAYERS = (
    "attn1.to_q", "attn1.to_v", "attn1.to_out.0", "attn1.norm_q", "attn2.to_k", "attn2.to_out.0",
    "ff.conv_inverted", "ff.conv_depth", "ff.conv_point",
)  # fmt: skip


@pytest.mark.parametrize("moving", [False, True], ids=["value", "jvp"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("name", [BLOCK + name for name in LAYERS] + ["patch_embed.proj"])
def test_a_random_weight_is_drawn_once_for_value_tangent_and_gradients(
    name: str, checkpointed: bool, moving: bool
):
    stock = _model(LONG | {"interpolation_scale": 1})  # with positions
    drop = Drop()
    model = _dropping(copy.deepcopy(stock), name, drop)
    if checkpointed:
        model.enable_gradient_checkpointing()
    tk.fuse(model)
    found = _gradients(model, moving)
    assert all(torch.equal(mask, drop.drawn[0]) for mask in drop.drawn)
    again = checkpointed and BLOCK in name and "attn2.to_k" not in name  # keys are made before
    assert len(drop.drawn) == 1 + again
    tk.fuse(_dropping(stock, name, Drop(drop.drawn[0])))
    for got, want in zip(found, _gradients(stock, moving), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


class Adapter(nn.Linear):
    """A layer that adds something to what it takes the place of, as those of peft."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class Nothing:
    """A processor that leaves attention out."""

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: object, **kwargs: object):
        return torch.zeros_like(hidden_states)


def _adapter(model: SanaTransformer2DModel) -> None:
    model.transformer_blocks[0].attn1.to_q = Adapter(32, 32, False)


def _processor(model: SanaTransformer2DModel) -> None:
    model.transformer_blocks[0].attn2.set_processor(Nothing())


def _hook(model: SanaTransformer2DModel) -> None:
    model.transformer_blocks[0].ff.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "late", "full"),
    [
        (_adapter, False, False), (_adapter, False, True), (_processor, False, False),
        (_processor, True, False), (_hook, False, False),
    ],
)  # fmt: skip
def test_a_compiled_model_refuses_what_it_would_pass_by(
    change: Callable[[SanaTransformer2DModel], None], late: bool, full: bool
):
    """Hooks that come after the first compiled call PyTorch passes by itself."""
    torch.compiler.reset()
    model = _model(TINY | {"num_layers": 1})
    inputs = _inputs(model)
    tk.fuse(model)
    compiled = torch.compile(model, backend="eager", fullgraph=full)
    if late:
        compiled(**inputs)
    change(model)
    with pytest.raises(Exception, match=r"fuse: transformer_blocks\.0\.\S+ (is|has) a?.*pass by"):
        compiled(**inputs)
    torch.compiler.reset()


class Own:
    """A checkpointing function that has no hash."""

    __hash__ = None

    def __call__(self, block: torch.nn.Module, *args: Tensor) -> Tensor:
        return block(*args)


def test_checkpointing_by_a_function_of_ones_own_is_refused():
    model = _model(TINY)
    inputs = _inputs(model)
    tk.fuse(model)
    model.enable_gradient_checkpointing()
    model(**inputs)
    model.enable_gradient_checkpointing(own := Own())
    kept = weakref.ref(own)
    with pytest.raises(ValueError, match="gradient checkpointing is by a function of yours"):
        model(**inputs)
    model.disable_gradient_checkpointing()
    model(**inputs)
    del own, model._gradient_checkpointing_func
    gc.collect()
    assert kept() is None


def test_the_models_own_table_may_be_parametrized():
    model = _model(TINY)
    inputs = _inputs(model)
    parametrize.register_parametrization(model, "scale_shift_table", Drop(torch.zeros(2, 32)))
    want = model(**inputs).sample
    with tk.fuse(model):
        torch.testing.assert_close(model(**inputs).sample, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", ["rms_norm", "adaln", "attention"])
def test_a_parameter_made_inside_jvp_is_refused(op: str):
    weight, x = torch.randn(16), torch.randn(1, 2, 4, 16)

    def function(x: Tensor) -> Tensor:
        made = nn.Parameter(weight.clone())
        if op == "rms_norm":
            return tk.rms_norm(x, made)
        return tk.adaln(x[0], scale=made)[1] if op == "adaln" else tk.attention(x, x, x * 0 + made)

    with pytest.raises(RuntimeError, match=f"{op} takes no parameter that was made inside"):
        torch.func.jvp(function, (x,), (x,))
    with torch.no_grad():
        value, tangent = torch.func.jvp(function, (x,), (x,))
    assert value.isfinite().all() and tangent.abs().sum() > 0
