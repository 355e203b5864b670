"""What is fused in a diffusers model whose forward stays its own: attention, linear layers, norms.

A layer gets the forward of its counterpart below, on the instance, where its class is exactly one
of LAYERS: hooks, parameters and the calls of the model stay as they are.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tbcm_kernels import modules, processors
from tbcm_kernels._layers import has_hooks
from tbcm_kernels.adaln import adaln


class RMSNorm:
    """diffusers' `RMSNorm`, which casts to its weight's dtype where that has 16 bits."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.weight is None:
            return modules.RMSNorm.forward(self, hidden_states)
        dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        y = modules.RMSNorm.forward(self, hidden_states.to(dtype))
        return y.to(self.weight.dtype) if self.weight.dtype.itemsize == 2 else y


class AdaLayerNormZero:
    """diffusers' `AdaLayerNormZero` that is told emb."""

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        shift, scale, *others = self.linear(F.silu(emb)).chunk(6, dim=1)
        return _modulated(self.norm, x, scale, shift), *others


class AdaLayerNormZeroSingle:
    """diffusers' `AdaLayerNormZeroSingle`."""

    def forward(self, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, scale, gate = self.linear(F.silu(emb)).chunk(3, dim=1)
        return _modulated(self.norm, x, scale, shift), gate


class AdaLayerNormContinuous:
    """diffusers' `AdaLayerNormContinuous`."""

    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        emb = self.linear(F.silu(conditioning_embedding).to(x.dtype))
        scale, shift = emb.chunk(2, dim=1)
        return _modulated(self.norm, x, scale, shift)


_DIFFUSERS = "diffusers.models.normalization."
LAYERS = {
    "torch.nn.modules.linear.Linear": modules.Linear,
    "torch.nn.modules.normalization.LayerNorm": modules.LayerNorm,
    "torch.nn.modules.normalization.RMSNorm": modules.RMSNorm,
    _DIFFUSERS + "FP32LayerNorm": modules.LayerNorm,
    _DIFFUSERS + "RMSNorm": RMSNorm,
    _DIFFUSERS + "AdaLayerNormZero": AdaLayerNormZero,
    _DIFFUSERS + "AdaLayerNormZeroSingle": AdaLayerNormZeroSingle,
    _DIFFUSERS + "AdaLayerNormContinuous": AdaLayerNormContinuous,
}
"""Layer class -> the class whose forward takes its place."""
_FORWARDS = {kind.forward for kind in LAYERS.values()}


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
            found.append((layer, "forward", types.MethodType(new.forward, layer)))
    return found


def _has_other_forward(layer: nn.Module) -> bool:
    """Whether its forward is neither its class's nor, where it was copied, a counterpart's."""
    own = layer.__dict__.get("forward")
    return own is not None and getattr(own, "__func__", None) not in _FORWARDS


def _is_covered(layer: nn.Module) -> bool:
    """Whether the counterpart does all that the layer does."""
    if _has_other_forward(layer):
        return False
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return len(layer.normalized_shape) == 1
    if type(layer).__name__ == "RMSNorm":
        return layer.bias is None and len(layer.dim) == 1
    norm = getattr(layer, "norm", None)
    if norm is None:
        return isinstance(layer, nn.Linear)
    plain = isinstance(norm, nn.LayerNorm) and norm.weight is None and norm.bias is None
    plain &= not (has_hooks(norm) or _has_other_forward(norm))
    return plain and getattr(layer, "emb", None) is None


def _modulated(norm: nn.Module, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x [B, N, C] after a LayerNorm and the modulations [B, C]."""
    return adaln(x, scale=scale[:, None], shift=shift[:, None], eps=norm.eps)[1]
