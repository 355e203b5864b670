"""Triton kernels of adaln: a program holds one row (forward) or walks a chunk (backward)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tbcm_kernels._library import fresh
from tbcm_kernels._triton import AuditCase, device_of, row_config, strides, unit_rows

_EXACT = {"enable_fp_fusion": False}
"""In a row of one column x − mean x is zero; a fused multiply-add leaves what the product rounded
off, times r of up to ε^−½."""


@triton.jit
def _row(pointer, batch, token, stride_b, stride_n, columns, mask):
    """One row of a [B, N, C] operand in fp32."""
    return tl.load(pointer + batch * stride_b + token * stride_n + columns, mask, other=0.0).to(
        tl.float32
    )


@triton.jit
def _statistics(x, mask, width, eps):
    """Centred row and (var + eps)^-1/2."""
    center = tl.where(mask, x - tl.sum(x, 0) / width, 0.0)
    return center, tl.rsqrt(tl.sum(center * center, 0) / width + eps)


@triton.jit
def forward_kernel(
    x, h, gate, scale, shift, tx, th, tgate, tscale, tshift, out, y, tout, ty,
    xb, xn, hb, hn, gb, gn, cb, cn, sb, sn, txb, txn, thb, thn, tgb, tgn, tcb, tcn, tsb, tsn,
    tokens, width, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, n = row // tokens, row % tokens
    c = tl.arange(0, BLOCK)
    mask = c < width
    v = _row(x, b, n, xb, xn, c, mask)
    if h is not None:
        branch = _row(h, b, n, hb, hn, c, mask)
        if gate is not None:
            v += _row(gate, b, n, gb, gn, c, mask) * branch
        else:
            v += branch
        stored = v.to(out.dtype.element_ty)
        tl.store(out + row * width + c, stored, mask)
        v = stored.to(tl.float32)
    center, r = _statistics(v, mask, width, eps)
    xhat = r * center
    slope = tl.full((BLOCK,), 1.0, tl.float32)
    if scale is not None:
        slope += _row(scale, b, n, cb, cn, c, mask)
    value = xhat * slope
    if shift is not None:
        value += _row(shift, b, n, sb, sn, c, mask)
    tl.store(y + row * width + c, value.to(y.dtype.element_ty), mask)
    if ty is not None:
        tv = tl.zeros((BLOCK,), tl.float32)
        if tx is not None:
            tv += _row(tx, b, n, txb, txn, c, mask)
        if tgate is not None:
            tv += _row(tgate, b, n, tgb, tgn, c, mask) * _row(h, b, n, hb, hn, c, mask)
        if th is not None:
            if gate is not None:
                tv += _row(gate, b, n, gb, gn, c, mask) * _row(th, b, n, thb, thn, c, mask)
            else:
                tv += _row(th, b, n, thb, thn, c, mask)
        if tout is not None:
            tstored = tv.to(tout.dtype.element_ty)
            tl.store(tout + row * width + c, tstored, mask)
            tv = tstored.to(tl.float32)
        tcenter = tl.where(mask, tv - tl.sum(tv, 0) / width, 0.0)
        tvalue = r * (tcenter - xhat * (tl.sum(xhat * tcenter, 0) / width)) * slope
        if tscale is not None:
            tvalue += xhat * _row(tscale, b, n, tcb, tcn, c, mask)
        if tshift is not None:
            tvalue += _row(tshift, b, n, tsb, tsn, c, mask)
        tl.store(ty + row * width + c, tvalue.to(ty.dtype.element_ty), mask)


@triton.jit
def backward_kernel(
    gout, gy, x, h, gate, scale, gx, gh, ggate, gscale, gshift,
    gob, gon, gyb, gyn, xb, xn, hb, hn, gb, gn, cb, cn,
    tokens, width, chunk, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(tokens, chunk)
    b, first = part // chunks, (part % chunks) * chunk
    c = tl.arange(0, BLOCK)
    mask = c < width
    gate_sum = tl.zeros((BLOCK,), tl.float32)
    scale_sum = tl.zeros((BLOCK,), tl.float32)
    shift_sum = tl.zeros((BLOCK,), tl.float32)
    for n in range(first, tl.minimum(first + chunk, tokens)):
        g = tl.zeros((BLOCK,), tl.float32)
        if gy is not None:
            center, r = _statistics(_row(x, b, n, xb, xn, c, mask), mask, width, eps)
            xhat = r * center
            grad = _row(gy, b, n, gyb, gyn, c, mask)
            scale_sum += grad * xhat
            shift_sum += grad
            if scale is not None:
                grad *= 1.0 + _row(scale, b, n, cb, cn, c, mask)
            mean, mixed = tl.sum(grad, 0) / width, tl.sum(grad * xhat, 0) / width
            g += r * (grad - mean - xhat * mixed)
        if gout is not None:
            g += _row(gout, b, n, gob, gon, c, mask)
        here = (b * tokens + n) * width + c
        tl.store(gx + here, g.to(gx.dtype.element_ty), mask)
        if ggate is not None:
            gate_sum += g * _row(h, b, n, hb, hn, c, mask)
        if gh is not None:
            g *= _row(gate, b, n, gb, gn, c, mask)
            tl.store(gh + here, g.to(gh.dtype.element_ty), mask)
    if ggate is not None:
        tl.store(ggate + part * width + c, gate_sum, mask)
    if gscale is not None:
        tl.store(gscale + part * width + c, scale_sum, mask)
    if gshift is not None:
        tl.store(gshift + part * width + c, shift_sum, mask)


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
    inputs = [
        unit_rows(v, x.shape) for v in (x, h, gate, scale, shift, tx, th, tgate, tscale, tshift)
    ]
    batch, tokens, width = x.shape
    if x.numel():
        block, warps = row_config(width)
        with device_of(x):
            forward_kernel[(batch * tokens,)](
                *inputs, out, y, tout, ty, *strides(inputs), tokens, width, eps,
                BLOCK=block, num_warps=warps, **_EXACT,
            )  # fmt: skip
    return out, y, tout, ty


def backward(
    gout: Tensor | None, gy: Tensor | None, out: Tensor, h: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, needs_gate: bool, needs_scale: bool, needs_shift: bool, chunk: int,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """See reference.backward."""
    batch, tokens, width = out.shape
    chunks = triton.cdiv(tokens, chunk)

    def sums(needed: bool) -> Tensor | None:
        shape = (batch, chunks, width)
        return torch.empty(shape, dtype=torch.float32, device=out.device) if needed else None

    gx = fresh(out)
    gh = fresh(out) if gate is not None else None
    ggate = sums(needs_gate)
    gscale = sums(needs_scale and gy is not None)
    gshift = sums(needs_shift and gy is not None)
    inputs = [unit_rows(v, out.shape) for v in (gout, gy, out, h, gate, scale)]
    if out.numel():
        block, warps = row_config(width)
        with device_of(out):
            backward_kernel[(batch * chunks,)](
                *inputs, gx, gh, ggate, gscale, gshift, *strides(inputs), tokens, width, chunk, eps,
                BLOCK=block, num_warps=warps, **_EXACT,
            )  # fmt: skip
    return gx, gh, ggate, gscale, gshift


def audit_cases() -> Iterator[AuditCase]:
    """The shipped configs: full and norm-only, at the widths of the built-in case and of SANA."""
    for width in (128, 1152, 2240):
        block, warps = row_config(width)
        for dtype in ("fp32", "bf16"):
            for full in (True, False):
                name = f"adaln {dtype} C={width} {'full' if full else 'norm only'}"
                for kernel, part in ((forward_kernel, "forward"), (backward_kernel, "backward")):
                    yield AuditCase(
                        f"{name} {part}",
                        kernel,
                        _types(kernel, dtype, full),
                        {"BLOCK": block},
                        warps,
                    )


def _types(kernel: Any, dtype: str, full: bool) -> dict[str, str | None]:
    """Types of a kernel's arguments when everything is there, or only what a norm alone needs."""
    sums = ("ggate", "gscale", "gshift")
    modulations = ("gate", "scale", "shift", "tgate", "tscale", "tshift")
    optional = {"h", "th", "gate", "tgate", "out", "tout", "gh", "gout", "ggate"}
    types: dict[str, str | None] = {}
    for name in kernel.arg_names[:-1]:
        if not full and name in optional:
            types[name] = None
        elif name in sums or name in modulations:
            types[name] = "*fp32"
        elif name == "eps":
            types[name] = "fp32"
        elif name in ("tokens", "width", "chunk") or (len(name) <= 3 and name[-1] in "bn"):
            types[name] = "i64"
        else:
            types[name] = f"*{dtype}"
    return types
