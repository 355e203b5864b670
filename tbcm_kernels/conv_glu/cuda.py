"""The CUDA kernels of conv_glu (csrc/conv_glu.cu): allocates the outputs and calls them."""

from __future__ import annotations

import torch
from torch import Tensor

from tbcm_kernels._cuda import scratch_for, stream_of
from tbcm_kernels.conv_glu.buffers import gradients, outputs, parameters

TILE = 32
"""Rows and columns of an image whose parameter gradients a block sums, as in csrc/conv_glu.h."""


def forward(
    a: Tensor, weight: Tensor, bias: Tensor | None, ta: Tensor | None, tweight: Tensor | None,
    tbias: Tensor | None, height: int, width: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See reference.forward; tangents of weight and bias never come here."""
    y, ty = outputs(a, ta is not None)
    ta = None if ta is None else ta.contiguous()
    with stream_of(a) as stream:
        torch.ops.tbcm_cuda.conv_glu_forward(
            a.contiguous(), *parameters(weight, bias), ta, y, ty, height, width, stream
        )
    return y, ty


def backward(
    gy: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, needs_weight: bool,
    needs_bias: bool, height: int, width: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """See reference.backward."""
    parts = -(-height // TILE) * (-(-width // (TILE - 4)) if width > TILE else 1)
    ga, gw, gb = gradients(a, needs_weight, needs_bias)
    with stream_of(a) as stream:
        torch.ops.tbcm_cuda.conv_glu_backward(
            gy.contiguous(), a.contiguous(), *parameters(weight, bias), ga, gw, gb,
            scratch_for([gw, gb], len(a) * parts), height, width, stream,
        )  # fmt: skip
    return ga, gw, gb
