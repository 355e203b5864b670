"""What the op returns, uninitialised: the one place that says which outputs and gradients exist."""

from __future__ import annotations

import torch
from torch import Tensor

from tbcm_kernels._dual import present
from tbcm_kernels._library import fresh, unit_stride


def outputs(
    x: Tensor, h: Tensor | None, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    tx: Tensor | None, th: Tensor | None, tgate: Tensor | None, tscale: Tensor | None,
    tshift: Tensor | None, dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """x', y, ẋ', ẏ; y and ẏ are in `dtype`, x's by default."""
    moves = present((tx, th, tgate))
    there = (h is not None, True, h is not None and moves, moves or present((tscale, tshift)))
    dtypes = (x.dtype, dtype or x.dtype) * 2
    return tuple(fresh(x, d) if t else None for t, d in zip(there, dtypes, strict=True))


def gradients(
    gout: Tensor | None, gy: Tensor | None, out: Tensor, h: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, needs_gate: bool, needs_scale: bool, needs_shift: bool, chunk: int,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Those of x, h, gate, scale and shift; h's is in `dtype`, x's by default.

    The last three are sums over `chunk` tokens each, where 0 is all of them.
    """
    batch, tokens, width = out.shape
    shape = (batch, -(-tokens // chunk) if chunk else 1, width)
    accumulate = torch.promote_types(out.dtype, torch.float32)
    there = (needs_gate, needs_scale and gy is not None, needs_shift and gy is not None)
    sums = (out.new_empty(shape, dtype=accumulate) if t else None for t in there)
    return fresh(out), fresh(out, dtype) if gate is not None else None, *sums


def rows(x: Tensor | None, h: Tensor | None, *modulations: Tensor | None) -> list[Tensor | None]:
    """Operands for a compiled kernel: unit stride, modulations in fp32, broadcast as they are."""
    wide = (m if m is None else m.to(torch.float32) for m in modulations)
    return [unit_stride(v) for v in (x, h, *wide)]
