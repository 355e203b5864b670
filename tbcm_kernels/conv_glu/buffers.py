"""What the op returns, uninitialised: the one place that says which outputs and gradients exist."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tbcm_kernels._library import floats, fresh


def outputs(a: Tensor, moving: bool) -> tuple[Tensor, Tensor | None]:
    """y, and its tangent where inputs move."""
    y = a.new_empty((*a.shape[:2], a.shape[2] // 2))
    return y, fresh(y) if moving else None


def gradients(
    a: Tensor, needs_weight: bool, needs_bias: bool, parts: Sequence[int] = ()
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Those of a, of the taps as rows [9, 2K], and of the bias; the last two [*parts, ...]."""
    accumulate = torch.promote_types(a.dtype, torch.float32)
    gw, gb = (
        a.new_empty((*parts, *shape, a.shape[2]), dtype=accumulate) if needed else None
        for needed, shape in ((needs_weight, (9,)), (needs_bias, ()))
    )
    return fresh(a), gw, gb


def parameters(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The taps [2K, 1, 3, 3] as fp32 rows [9, 2K], and the bias in fp32."""
    taps = weight.flatten(1).to(torch.float32).t().contiguous()
    return taps, floats(bias)
