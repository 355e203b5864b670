"""The C++ CPU kernels of attention (csrc/attention_cpu.cpp): allocates the outputs and calls."""

from __future__ import annotations

import torch
from torch import Tensor

from tbcm_kernels import _C  # noqa: F401  (loading it registers the kernels)
from tbcm_kernels._library import floats, unit_stride
from tbcm_kernels.attention import buffers
from tbcm_kernels.attention.reference import Setting

_ALL = 1 << 40
"""A causal offset that hides nothing."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, setting: Setting,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """See reference.forward."""
    o, lse, to, mu = buffers.outputs(q, v, (tq, tk, tv))
    torch.ops.tbcm_cpu.attention_forward(
        *map(unit_stride, (q, k, v)), floats(q_weight), floats(k_weight),
        *map(unit_stride, (tq, tk, tv)),
        *_masks(setting), o, lse, to, mu, *_scalars(setting),
    )  # fmt: skip
    return o, lse, to, mu


def backward(
    go: Tensor | None, glse: Tensor | None, gto: Tensor | None, gmu: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, o: Tensor, lse: Tensor,
    to: Tensor | None, mu: Tensor | None, setting: Setting,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """See reference.backward."""
    grads = buffers.gradients((q, k, v), (tq, tk, tv), gto, gmu)
    torch.ops.tbcm_cpu.attention_backward(
        unit_stride(go), floats(glse), unit_stride(gto), floats(gmu), *map(unit_stride, (q, k, v)),
        floats(q_weight), floats(k_weight), *map(unit_stride, (tq, tk, tv)), o, lse, to, mu,
        *_masks(setting), *grads, *_scalars(setting),
    )  # fmt: skip
    return tuple(grads)


def _masks(setting: Setting) -> tuple[Tensor | None, Tensor | None]:
    """Bytes or fp32; a mask is converted before it is broadcast."""
    mask, key_mask = setting.attn_mask, setting.key_mask
    if mask is not None and mask.dtype not in (torch.bool, torch.float32):
        own = mask[tuple(slice(None) if s else slice(1) for s in mask.stride())]
        mask = own.to(torch.float32).expand(mask.shape)
    return mask, None if key_mask is None else key_mask.contiguous()


def _scalars(setting: Setting) -> tuple[float, int, float, float]:
    causal = _ALL if setting.causal is None else setting.causal
    return setting.scale, causal, setting.q_eps, setting.k_eps
