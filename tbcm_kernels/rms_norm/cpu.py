"""The C++ CPU kernel of rms_norm (csrc/rms_norm_cpu.cpp): allocates the outputs and calls it."""

from __future__ import annotations

import torch
from torch import Tensor

from tbcm_kernels import _C  # noqa: F401  (loading it registers the kernels)
from tbcm_kernels._dual import present
from tbcm_kernels._library import floats
from tbcm_kernels.rms_norm.buffers import gradients, outputs, rows


def forward(
    x: Tensor, weight: Tensor | None, tx: Tensor | None, tweight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """See reference.forward."""
    y, ty = outputs(x, present((tx, tweight)))
    torch.ops.tbcm_cpu.rms_norm_forward(
        rows(x), floats(weight), rows(tx), floats(tweight), rows(y), rows(ty), eps
    )
    return y, ty


def backward(
    gy: Tensor, x: Tensor, weight: Tensor | None, needs_weight: bool, chunk: int, eps: float
) -> tuple[Tensor, Tensor | None]:
    """See reference.backward."""
    gx, gw = gradients(x, needs_weight, chunk)
    torch.ops.tbcm_cpu.rms_norm_backward(
        rows(gy), rows(x), floats(weight), rows(gx), rows(gw), chunk, eps
    )
    return gx, gw
