"""The C++ CPU kernel of adaln (csrc/adaln_cpu.cpp): allocates the outputs and calls it."""

from __future__ import annotations

import torch
from torch import Tensor

from tbcm_kernels import _C  # noqa: F401  (loading it registers the kernels)
from tbcm_kernels._library import fresh


def forward(
    x: Tensor, h: Tensor | None, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    tx: Tensor | None, th: Tensor | None, tgate: Tensor | None, tscale: Tensor | None,
    tshift: Tensor | None, eps: float,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """See reference.forward."""
    tangent_in = any(t is not None for t in (tx, th, tgate))
    tangent_out = tangent_in or tscale is not None or tshift is not None
    out = fresh(x) if h is not None else None
    y = fresh(x)
    tout = fresh(x) if h is not None and tangent_in else None
    ty = fresh(x) if tangent_out else None
    torch.ops.tbcm_cpu.adaln_forward(
        rows(x), rows(h), floats(gate, x), floats(scale, x), floats(shift, x), rows(tx), rows(th),
        floats(tgate, x), floats(tscale, x), floats(tshift, x), out, y, tout, ty, eps,
    )  # fmt: skip
    return out, y, tout, ty


def backward(
    gout: Tensor | None, gy: Tensor | None, out: Tensor, h: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, needs_gate: bool, needs_scale: bool, needs_shift: bool, chunk: int,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """See reference.backward."""
    batch, tokens, width = out.shape

    def sums(needed: bool) -> Tensor | None:
        shape = (batch, -(-tokens // chunk), width)
        return torch.empty(shape, dtype=torch.float32) if needed else None

    gx = fresh(out)
    gh = fresh(out) if gate is not None else None
    ggate = sums(needs_gate)
    gscale = sums(needs_scale and gy is not None)
    gshift = sums(needs_shift and gy is not None)
    torch.ops.tbcm_cpu.adaln_backward(
        rows(gout), rows(gy), rows(out), rows(h), floats(gate, out), floats(scale, out), gx, gh,
        ggate, gscale, gshift, chunk, eps,
    )  # fmt: skip
    return gx, gh, ggate, gscale, gshift


def rows(x: Tensor | None) -> Tensor | None:
    """The tensor with unit stride along C; a view where it has that already."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def floats(m: Tensor | None, x: Tensor) -> Tensor | None:
    """A modulation as fp32 rows that broadcast over x by zero strides."""
    return None if m is None else rows(m.to(torch.float32)).expand(x.shape)
