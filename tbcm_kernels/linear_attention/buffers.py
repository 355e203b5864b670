"""What the op returns, uninitialised: the one place that says which outputs exist."""

from __future__ import annotations

import torch
from torch import Tensor

from tbcm_kernels._library import fresh_heads


def outputs(q: Tensor, v: Tensor, moving: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """o, its tangent where inputs move, and the state."""
    shape = (*q.shape[:3], v.shape[3])
    state = q.new_empty(
        (*q.shape[:2], q.shape[3], v.shape[3] + 1),
        dtype=torch.promote_types(q.dtype, torch.float32),
    )
    return fresh_heads(q, shape), fresh_heads(q, shape) if moving else None, state


def gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gq, gk and gv."""
    return tuple(fresh_heads(x, x.shape) for x in (q, k, v))
