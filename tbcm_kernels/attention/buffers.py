"""What the op returns, uninitialised: the one place that says which outputs and gradients exist."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tbcm_kernels._library import fresh_heads


def outputs(
    q: Tensor, v: Tensor, tangents: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """o, lse, to and mu; without tangents no to and mu."""
    shape = (*q.shape[:3], v.shape[3])
    accumulate = torch.promote_types(q.dtype, torch.float32)
    o, lse = fresh_heads(q, shape), q.new_empty(q.shape[:3], dtype=accumulate)
    lanes = next((t.shape[0] for t in tangents if t is not None), None)
    if lanes is None:
        return o, lse, None, None
    return o, lse, fresh_heads(q, (lanes, *shape)), lse.new_empty((lanes, *lse.shape))


def gradients(
    primals: Sequence[Tensor], tangents: Sequence[Tensor | None], gto: Tensor | None,
    gmu: Tensor | None,
) -> list[Tensor | None]:  # fmt: skip
    """gq, gk, gv, gtq, gtk and gtv."""
    found: list[Tensor | None] = [fresh_heads(x, x.shape) for x in primals]
    for x, tx, there in zip(primals, tangents, reached(tangents, gto, gmu), strict=True):
        found.append(fresh_heads(x, tx.shape) if there else None)
    return found


def reached(
    tangents: Sequence[Tensor | None], gto: Tensor | None, gmu: Tensor | None
) -> list[bool]:
    """Which of tq, tk and tv have a gradient: those that are there and a cotangent reaches."""
    rates = gto is not None or gmu is not None
    by_cotangents = (rates, rates, gto is not None)
    return [t is not None and r for t, r in zip(tangents, by_cotangents, strict=True)]
