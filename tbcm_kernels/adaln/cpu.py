"""The C++ CPU kernel of adaln (csrc/adaln_cpu.cpp): allocates the outputs and calls it."""

from __future__ import annotations

import torch
from torch import Tensor

from tbcm_kernels import _C  # noqa: F401  (loading it registers the kernels)
from tbcm_kernels.adaln.buffers import backward_buffers, forward_buffers


def forward(
    x: Tensor, h: Tensor | None, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    tx: Tensor | None, th: Tensor | None, tgate: Tensor | None, tscale: Tensor | None,
    tshift: Tensor | None, eps: float,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """See reference.forward."""
    inputs, outputs = forward_buffers(x, h, gate, scale, shift, tx, th, tgate, tscale, tshift)
    torch.ops.tbcm_cpu.adaln_forward(*inputs, *outputs, eps)
    return outputs


def backward(
    gout: Tensor | None, gy: Tensor | None, out: Tensor, h: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, needs_gate: bool, needs_scale: bool, needs_shift: bool, chunk: int,
    eps: float,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """See reference.backward."""
    inputs, gradients = backward_buffers(
        gout, gy, out, h, gate, scale, needs_gate, needs_scale, needs_shift, chunk
    )
    torch.ops.tbcm_cpu.adaln_backward(*inputs, *gradients, chunk, eps)
    return gradients
