"""The CUDA kernels of linear_attention (csrc/linear_attention.cu): allocates and calls."""

from __future__ import annotations

import torch
from torch import Tensor

from tbcm_kernels._cuda import stream_of
from tbcm_kernels._dual import present
from tbcm_kernels._library import floats
from tbcm_kernels.linear_attention import buffers
from tbcm_kernels.linear_attention.reference import Setting


def forward(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, setting: Setting,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """See reference.forward."""
    o, to, state = buffers.outputs(q, v, present((tq, tk, tv)))
    tstate = None if tk is None and tv is None else torch.empty_like(state)
    with stream_of(q) as stream:
        torch.ops.tbcm_cuda.linear_attention_forward(
            *map(_aligned, (q, k, v)), floats(q_weight), floats(k_weight),
            *map(_aligned, (tq, tk, tv)), o, to, state, tstate,
            setting.eps, setting.q_eps, setting.k_eps, stream,
        )  # fmt: skip
    return o, to, state


def backward(
    go: Tensor, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    state: Tensor, setting: Setting,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and the norms' weights."""
    grads = buffers.gradients(q, k, v)
    weights = (q_weight, k_weight)
    sums = [None if w is None else state.new_empty(w.shape) for w in weights]
    with stream_of(q) as stream:
        torch.ops.tbcm_cuda.linear_attention_backward(
            *map(_aligned, (go, q, k, v)), *map(floats, weights), state, *grads, *sums,
            setting.eps, setting.q_eps, setting.k_eps, stream,
        )  # fmt: skip
    gqw, gkw = (None if s is None else s.to(w.dtype) for s, w in zip(sums, weights, strict=True))
    return *grads, gqw, gkw


def _aligned(x: Tensor | None) -> Tensor | None:
    """The tensor, or a copy that a tensor map describes: no stride 0, all multiples of 16 bytes."""
    if x is None:
        return None
    *strides, unit = x.stride()
    described = unit == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s % 8 == 0 for s in strides)
    return x if described else x.clone(memory_format=torch.contiguous_format)
