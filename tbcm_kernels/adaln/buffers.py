"""What the compiled kernels of adaln read and fill."""

from __future__ import annotations

import torch
from torch import Tensor

from tbcm_kernels._dual import present
from tbcm_kernels._library import fresh, unit_stride

Tensors = tuple[Tensor | None, ...]


def outputs_there(
    h: Tensor | None, tx: Tensor | None, th: Tensor | None, tgate: Tensor | None,
    tscale: Tensor | None, tshift: Tensor | None,
) -> tuple[bool, bool, bool, bool]:  # fmt: skip
    """Which of x', y, ẋ', ẏ there are."""
    moves = present((tx, th, tgate))
    return h is not None, True, h is not None and moves, moves or present((tscale, tshift))


def forward_buffers(
    x: Tensor, h: Tensor | None, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    tx: Tensor | None, th: Tensor | None, tgate: Tensor | None, tscale: Tensor | None,
    tshift: Tensor | None, dtype: torch.dtype | None = None,
) -> tuple[Tensors, Tensors]:  # fmt: skip
    """Operands of forward as rows of unit stride, and the outputs: x', y, ẋ', ẏ.

    y and ẏ are in `dtype`, x's by default.
    """
    there = outputs_there(h, tx, th, tgate, tscale, tshift)
    inputs = (
        unit_stride(x), unit_stride(h), modulation(gate), modulation(scale), modulation(shift),
        unit_stride(tx), unit_stride(th), modulation(tgate), modulation(tscale),
        modulation(tshift),
    )  # fmt: skip
    dtypes = (x.dtype, dtype or x.dtype) * 2
    return inputs, tuple(fresh(x, d) if t else None for t, d in zip(there, dtypes, strict=True))


def backward_buffers(
    gout: Tensor | None, gy: Tensor | None, out: Tensor, h: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, needs_gate: bool, needs_scale: bool, needs_shift: bool, chunk: int,
    dtype: torch.dtype | None = None,
) -> tuple[Tensors, Tensors]:  # fmt: skip
    """Operands of backward, and the gradients of x, h, gate, scale, shift that it fills.

    h's is in `dtype`, x's by default. Those of gate, scale and shift are sums over `chunk` tokens,
    where 0 is all of them.
    """
    batch, tokens, width = out.shape
    shape = (batch, -(-tokens // chunk) if chunk else 1, width)
    there = (needs_gate, needs_scale and gy is not None, needs_shift and gy is not None)
    sums = (
        torch.empty(shape, dtype=torch.float32, device=out.device) if t else None for t in there
    )
    still = map(unit_stride, (gout, gy, out, h))
    inputs = (*still, modulation(gate), modulation(scale))
    return inputs, (fresh(out), fresh(out, dtype) if gate is not None else None, *sums)


def modulation(m: Tensor | None) -> Tensor | None:
    """A modulation as fp32 rows; the kernels see which dimensions broadcast."""
    return None if m is None else unit_stride(m.to(torch.float32))
