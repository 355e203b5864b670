"""What is fused in a model whose forward stays its own: attention, linear layers, norms.

Where a layer's class is exactly one of LAYERS, the instance gets the forward that stands there:
hooks, parameters and the calls of the model stay as they are.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from tbcm_kernels import modules, processors
from tbcm_kernels._dual import any_dual, takes_stock
from tbcm_kernels._layers import COUNTERPARTS, does_more, has_other_forward, is_plain
from tbcm_kernels.adaln import adaln
from tbcm_kernels.rms_norm import rms_norm


def fp32_layer_norm(layer: nn.Module, inputs: Tensor) -> Tensor:
    """diffusers' `FP32LayerNorm`."""
    return modules.LayerNorm.forward(layer, inputs).to(inputs.dtype)


def rms_norm_cast(layer: nn.Module, hidden_states: Tensor) -> Tensor:
    """diffusers' `RMSNorm`, which casts to its weight's dtype where that has 16 bits."""
    weight = layer.weight
    if layer.bias is not None or takes_stock(hidden_states):  # a bias it has got since fuse()
        return type(layer).forward(layer, hidden_states)
    if weight is None:
        return rms_norm(hidden_states, eps=layer.eps)
    x = hidden_states.to(torch.promote_types(hidden_states.dtype, weight.dtype))
    y = rms_norm(x, weight, eps=layer.eps)
    return y.to(weight.dtype) if weight.dtype.itemsize == 2 else y


def group_norm(layer: nn.Module, input: Tensor) -> Tensor:
    """PyTorch's `GroupNorm`, which has no tangent where an input is not contiguous."""
    return nn.GroupNorm.forward(layer, input.contiguous() if any_dual(input) else input)


def ada_layer_norm_zero(
    layer: nn.Module,
    x: Tensor,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    hidden_dtype: torch.dtype | None = None,
    emb: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """diffusers' `AdaLayerNormZero` that is told emb."""
    shift, scale, *others = layer.linear(layer.silu(emb)).chunk(6, dim=1)
    return _modulated(layer.norm, x, scale, shift), *others


def ada_layer_norm_zero_single(
    layer: nn.Module, x: Tensor, emb: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """diffusers' `AdaLayerNormZeroSingle`."""
    shift, scale, gate = layer.linear(layer.silu(emb)).chunk(3, dim=1)
    return _modulated(layer.norm, x, scale, shift), gate


def ada_layer_norm_continuous(
    layer: nn.Module, x: Tensor, conditioning_embedding: Tensor
) -> Tensor:
    """diffusers' `AdaLayerNormContinuous`."""
    emb = layer.linear(layer.silu(conditioning_embedding).to(x.dtype))
    scale, shift = emb.chunk(2, dim=1)
    return _modulated(layer.norm, x, scale, shift)


_DIFFUSERS = "diffusers.models.normalization."
LAYERS = {
    "torch.nn.modules.linear.Linear": modules.Linear.forward,
    "torch.nn.modules.normalization.LayerNorm": modules.LayerNorm.forward,
    "torch.nn.modules.normalization.GroupNorm": group_norm,
    "torch.nn.modules.normalization.RMSNorm": modules.RMSNorm.forward,
    _DIFFUSERS + "FP32LayerNorm": fp32_layer_norm,
    _DIFFUSERS + "RMSNorm": rms_norm_cast,
    _DIFFUSERS + "AdaLayerNormZero": ada_layer_norm_zero,
    _DIFFUSERS + "AdaLayerNormZeroSingle": ada_layer_norm_zero_single,
    _DIFFUSERS + "AdaLayerNormContinuous": ada_layer_norm_continuous,
}
"""Layer class -> the forward that takes its place."""
COUNTERPARTS.update(LAYERS.values())


def swaps(model: nn.Module) -> list[tuple[Any, str, Any]]:
    """Those of the processors, then (layer, "forward", new) for every layer with a counterpart.

    Changes nothing. A layer with a forward of its own keeps it.

    Raises:
        ValueError: as `processors.swaps`.
    """
    found = processors.swaps(model)
    for layer in model.modules():
        new = LAYERS.get(f"{type(layer).__module__}.{type(layer).__qualname__}")
        if new is not None and _is_covered(layer):
            # A partial is copied and pickled with its layer; a method's pickle is the class's own.
            found.append((layer, "forward", functools.partial(new, layer)))
    return found


def _is_covered(layer: nn.Module) -> bool:
    """Whether the counterpart does all that the layer does."""
    if has_other_forward(layer) or not is_plain(type(layer).forward):
        return False
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return len(layer.normalized_shape) == 1
    if isinstance(layer, nn.GroupNorm):
        return True
    if type(layer).__name__ == "RMSNorm":
        # A weight of one number would broadcast over any width.
        narrow = layer.weight is not None and (len(layer.dim) > 1 or layer.dim[0] == 1)
        return layer.bias is None and not narrow
    norm = getattr(layer, "norm", None)
    if norm is None:
        return isinstance(layer, nn.Linear) and layer.in_features > 0
    return _is_bare(norm) and getattr(layer, "emb", None) is None


def _is_bare(norm: nn.Module) -> bool:
    """Whether it is torch's or diffusers' LayerNorm over the last dimension, without weights."""
    return (
        isinstance(norm, nn.LayerNorm)
        and type(norm).__module__.partition(".")[0] in ("torch", "diffusers")
        and len(norm.normalized_shape) == 1
        and norm.weight is None
        and norm.bias is None
    )


def _modulated(norm: nn.Module, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x [B, N, C] after a LayerNorm and the modulations [B, C]."""
    scale, shift = scale[:, None], shift[:, None]
    other = takes_stock(x) or x.ndim != 3 or x.shape[0] != scale.shape[0]
    if other or does_more(norm) or not _is_bare(norm):
        return norm(x) * (1 + scale) + shift
    x = x.to(torch.promote_types(x.dtype, scale.dtype))
    return adaln(x, scale=scale, shift=shift, eps=norm.eps)[1]
