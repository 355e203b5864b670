"""What the compiled kernels of rms_norm read and fill."""

from __future__ import annotations

import torch
from torch import Tensor

from tbcm_kernels._library import fresh, unit_stride


def rows(x: Tensor | None) -> Tensor | None:
    """The tensor [..., C] as rows [1, rows, C] of unit stride."""
    return None if x is None else unit_stride(x.reshape(1, -1, x.shape[-1]))


def gradients(x: Tensor, needs_weight: bool, chunk: int) -> tuple[Tensor, Tensor | None]:
    """The gradient of x, and [1, chunks, C] for sums of the weight's over so many rows each.

    A chunk of 0 is all rows.
    """
    chunks = -(-(x.numel() // x.shape[-1]) // chunk) if chunk else 1
    gw = x.new_empty((1, chunks, x.shape[-1]), dtype=torch.float32) if needs_weight else None
    return fresh(x), gw
