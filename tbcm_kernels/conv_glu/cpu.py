"""The C++ CPU kernel of conv_glu (csrc/conv_glu_cpu.cpp): allocates the outputs and calls it."""

from __future__ import annotations

import torch
from torch import Tensor

from tbcm_kernels import _C  # noqa: F401  (loading it registers the kernels)
from tbcm_kernels.conv_glu.buffers import gradients, outputs, parameters


def forward(
    a: Tensor, weight: Tensor, bias: Tensor | None, ta: Tensor | None, tweight: Tensor | None,
    tbias: Tensor | None, height: int, width: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See reference.forward; tangents of weight and bias never come here."""
    y, ty = outputs(a, ta is not None)
    ta = None if ta is None else ta.contiguous()
    torch.ops.tbcm_cpu.conv_glu_forward(
        a.contiguous(), *parameters(weight, bias), ta, y, ty, height, width
    )
    return y, ty


def backward(
    gy: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, needs_weight: bool,
    needs_bias: bool, height: int, width: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """See reference.backward."""
    ga, gw, gb = gradients(a, needs_weight, needs_bias, parts=a.shape[:1])
    torch.ops.tbcm_cpu.conv_glu_backward(
        gy.contiguous(), a.contiguous(), *parameters(weight, bias), ga, gw, gb, height, width
    )
    return ga, None if gw is None else gw.sum(0), None if gb is None else gb.sum(0)
