"""What the op returns, uninitialised: the one place that says which outputs and gradients exist."""

from __future__ import annotations

import torch
from torch import Tensor

from tbcm_kernels._library import fresh, unit_stride


def outputs(x: Tensor, moving: bool) -> tuple[Tensor, Tensor | None]:
    """y, and its tangent where inputs move."""
    return fresh(x), fresh(x) if moving else None


def gradients(x: Tensor, needs_weight: bool, chunk: int) -> tuple[Tensor, Tensor | None]:
    """The gradient of x, and [chunks, C] for sums of the weight's over so many rows each.

    A chunk of 0 is all rows.
    """
    chunks = -(-(x.numel() // x.shape[-1]) // chunk) if chunk else 1
    accumulate = torch.promote_types(x.dtype, torch.float32)
    gw = x.new_empty((chunks, x.shape[-1]), dtype=accumulate) if needs_weight else None
    return fresh(x), gw


def rows(x: Tensor | None) -> Tensor | None:
    """The tensor [..., C] as rows [1, rows, C] of unit stride."""
    return None if x is None else unit_stride(x.reshape(1, -1, x.shape[-1]))
