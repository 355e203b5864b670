"""The CUDA kernels of rms_norm (csrc/rms_norm.cu): allocates the outputs and calls them."""

from __future__ import annotations

import torch
from torch import Tensor

from tbcm_kernels._cuda import scratch_for, stream_of
from tbcm_kernels._dual import present
from tbcm_kernels._library import CHUNK, floats
from tbcm_kernels.rms_norm.buffers import gradients, outputs, rows


def forward(
    x: Tensor, weight: Tensor | None, tx: Tensor | None, tweight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """See reference.forward."""
    y, ty = outputs(x, present((tx, tweight)))
    with stream_of(x) as stream:
        torch.ops.tbcm_cuda.rms_norm_forward(
            rows(x), floats(weight), rows(tx), floats(tweight), rows(y), rows(ty), eps, stream
        )
    return y, ty


def backward(
    gy: Tensor, x: Tensor, weight: Tensor | None, needs_weight: bool, chunk: int, eps: float
) -> tuple[Tensor, Tensor | None]:
    """See reference.backward; `chunk` is 0 here, all rows."""
    gx, gw = gradients(x, needs_weight, chunk)
    scratch = scratch_for([gw], -(-(x.numel() // x.shape[-1]) // CHUNK))
    with stream_of(x) as stream:
        torch.ops.tbcm_cuda.rms_norm_backward(
            rows(gy), rows(x), floats(weight), rows(gx), rows(gw), scratch, CHUNK, eps, stream
        )
    return gx, gw
