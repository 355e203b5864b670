"""The C++ CPU kernel of rms_norm (csrc/rms_norm_cpu.cpp): allocates the outputs and calls it."""

from __future__ import annotations

import torch
from torch import Tensor

from tbcm_kernels import _C  # noqa: F401  (loading it registers the kernels)
from tbcm_kernels._library import floats, fresh, unit_stride


def forward(
    x: Tensor, weight: Tensor | None, tx: Tensor | None, tweight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """See reference.forward."""
    y = fresh(x)
    ty = None if tx is None and tweight is None else fresh(x)
    torch.ops.tbcm_cpu.rms_norm_forward(
        _rows(x), floats(weight), _rows(tx), floats(tweight), _rows(y), _rows(ty), eps
    )
    return y, ty


def backward(
    gy: Tensor, x: Tensor, weight: Tensor | None, needs_weight: bool, chunk: int, eps: float
) -> tuple[Tensor, Tensor | None]:
    """See reference.backward."""
    gx = fresh(x)
    chunks = -(-(x.numel() // x.shape[-1]) // chunk)
    gw = x.new_empty((1, chunks, x.shape[-1]), dtype=torch.float32) if needs_weight else None
    torch.ops.tbcm_cpu.rms_norm_backward(
        _rows(gy), _rows(x), floats(weight), _rows(gx), gw, chunk, eps
    )
    return gx, None if gw is None else gw[0]


def _rows(x: Tensor | None) -> Tensor | None:
    if x is None:
        return None
    return unit_stride(x.reshape(1, -1, x.shape[-1]))
