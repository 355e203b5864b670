"""The CUDA kernels of adaln (csrc/adaln.cu): allocates the outputs and calls them."""

from __future__ import annotations

import torch
from torch import Tensor

from tbcm_kernels._cuda import scratch_for, stream_of
from tbcm_kernels._library import CHUNK
from tbcm_kernels.adaln.buffers import backward_buffers, forward_buffers

MIXED = True
"""They take h, and give y, in 16 bits beside an x in fp32."""


def forward(
    x: Tensor, h: Tensor | None, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    tx: Tensor | None, th: Tensor | None, tgate: Tensor | None, tscale: Tensor | None,
    tshift: Tensor | None, eps: float, dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """See reference.forward."""
    inputs, outputs = forward_buffers(
        x, h, gate, scale, shift, tx, th, tgate, tscale, tshift, dtype
    )
    with stream_of(x) as stream:
        torch.ops.tbcm_cuda.adaln_forward(*inputs, *outputs, eps, stream)
    return outputs


def backward(
    gout: Tensor | None, gy: Tensor | None, out: Tensor, h: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, needs_gate: bool, needs_scale: bool, needs_shift: bool, chunk: int,
    eps: float, dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """See reference.backward; a `chunk` of 0 is all tokens of a sample."""
    inputs, gradients = backward_buffers(
        gout, gy, out, h, gate, scale, needs_gate, needs_scale, needs_shift, chunk, dtype
    )
    parts = -(-out.shape[1] // CHUNK)
    scratch = None if chunk else scratch_for(gradients[2:], parts)
    with stream_of(out) as stream:
        torch.ops.tbcm_cuda.adaln_backward(
            *inputs, *gradients, scratch, chunk or CHUNK, eps, stream
        )
    return gradients
