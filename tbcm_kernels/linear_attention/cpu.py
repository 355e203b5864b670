"""The C++ CPU kernels of linear_attention (csrc/linear_attention_cpu.cpp): allocates and calls."""

from __future__ import annotations

import torch
from torch import Tensor

from tbcm_kernels import _C  # noqa: F401  (loading it registers the kernels)
from tbcm_kernels._dual import present
from tbcm_kernels._library import floats, unit_stride
from tbcm_kernels.linear_attention import buffers
from tbcm_kernels.linear_attention.reference import FEATURE_MAPS, Setting


def forward(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, setting: Setting,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """See reference.forward."""
    o, to, state = buffers.outputs(q, v, present((tq, tk, tv)))
    torch.ops.tbcm_cpu.linear_attention_forward(
        *map(unit_stride, (q, k, v)), floats(q_weight), floats(k_weight),
        *map(unit_stride, (tq, tk, tv)),
        o, to, state, *_scalars(setting),
    )  # fmt: skip
    return o, to, state


def backward(
    go: Tensor, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    state: Tensor, setting: Setting,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See reference.backward."""
    grads = buffers.gradients(q, k, v)
    torch.ops.tbcm_cpu.linear_attention_backward(
        *map(unit_stride, (go, q, k, v)), floats(q_weight), floats(k_weight), state, *grads,
        *_scalars(setting),
    )  # fmt: skip
    return grads


def _scalars(setting: Setting) -> tuple[int, float, float, float]:
    return FEATURE_MAPS.index(setting.feature_map), setting.eps, setting.q_eps, setting.k_eps
