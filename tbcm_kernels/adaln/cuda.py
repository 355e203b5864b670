"""The CUDA kernels of adaln (csrc/adaln.cu): allocates the outputs and calls them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tbcm_kernels._cuda import scratch_for, stream_of
from tbcm_kernels._library import CHUNK
from tbcm_kernels.adaln.buffers import gradients, outputs, rows

MIXED = True
"""They take h, and give y, in 16 bits beside an x in fp32."""


def forward(*arguments: Any, dtype: torch.dtype | None = None) -> tuple[Tensor | None, ...]:
    """See reference.forward."""
    *operands, eps = arguments
    found = outputs(*operands, dtype)
    with stream_of(found[1]) as stream:
        torch.ops.tbcm_cuda.adaln_forward(
            *rows(*operands[:5]), *rows(*operands[5:]), *found, eps, stream
        )
    return found


def backward(*arguments: Any, dtype: torch.dtype | None = None) -> tuple[Tensor | None, ...]:
    """See reference.backward; a `chunk` of 0 is all tokens of a sample. h's gradient in `dtype`."""
    (gout, gy, *kept), (chunk, eps) = arguments[:6], arguments[-2:]
    found = gx, _, *sums = gradients(*arguments[:-1], dtype)
    scratch = None if chunk else scratch_for(sums, -(-gx.shape[1] // CHUNK))
    with stream_of(gx) as stream:
        torch.ops.tbcm_cuda.adaln_backward(
            *rows(gout, gy), *rows(*kept), *found, scratch, chunk or CHUNK, eps, stream
        )
    return found
