"""Triton kernels of trigflow: a program holds a block of one sample and works out its numbers."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from tbcm_kernels._library import flat_samples, fresh
from tbcm_kernels._triton import AuditCase, device_of

BLOCK, WARPS = 1024, 4


@triton.jit
def _wrap(t):
    """sin t, λ and δ of a time."""
    sin, cos = tl.sin(t), tl.cos(t)
    return sin, 1.0 / (sin + cos), cos - sin


@triton.jit
def _place(width, BLOCK: tl.constexpr):
    """Sample of this program, its elements, and which of them there are."""
    i = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return tl.program_id(0).to(tl.int64), i, i < width


@triton.jit
def _number(pointer, b, stride):
    return tl.load(pointer + b * stride).to(tl.float32)


@triton.jit
def _load(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask, other=0.0).to(tl.float32)


@triton.jit
def input_kernel(
    x, t, tx, tt, x_fm, t_fm, tx_fm, tt_fm, xb, tb, txb, ttb, width, BLOCK: tl.constexpr
):
    b, i, mask = _place(width, BLOCK)
    sin, lam, delta = _wrap(_number(t, b, tb))
    state = _load(x, b * xb + i, mask)
    tl.store(x_fm + b * width + i, (lam * state).to(x_fm.dtype.element_ty), mask)
    if tl.program_id(1) == 0:
        tl.store(t_fm + b, (lam * sin).to(t_fm.dtype.element_ty))
    if tx_fm is not None:
        tangent = tl.zeros((BLOCK,), tl.float32)
        if tx is not None:
            tangent += lam * _load(tx, b * txb + i, mask)
        if tt is not None:
            speed = lam * lam * _number(tt, b, ttb)
            tangent -= speed * delta * state
            if tl.program_id(1) == 0:
                tl.store(tt_fm + b, speed.to(tt_fm.dtype.element_ty))
        tl.store(tx_fm + b * width + i, tangent.to(tx_fm.dtype.element_ty), mask)


@triton.jit
def output_kernel(
    v, x, t, tv, tx, tt, out, tout, vb, xb, tb, tvb, txb, ttb, width, BLOCK: tl.constexpr
):
    b, i, mask = _place(width, BLOCK)
    _, lam, delta = _wrap(_number(t, b, tb))
    flow, state = _load(v, b * vb + i, mask), _load(x, b * xb + i, mask)
    value = lam * (delta * state + flow)
    tl.store(out + b * width + i, value.to(out.dtype.element_ty), mask)
    if tout is not None:
        tangent = tl.zeros((BLOCK,), tl.float32)
        if tx is not None:
            tangent += delta * _load(tx, b * txb + i, mask)
        if tv is not None:
            tangent += _load(tv, b * tvb + i, mask)
        tangent *= lam
        if tt is not None:
            tangent -= lam * lam * _number(tt, b, ttb) * (2.0 * state + delta * flow)
        tl.store(tout + b * width + i, tangent.to(tout.dtype.element_ty), mask)


@triton.jit
def step_kernel(
    x, out, t, s, guidance, velocity, moved, xb, outb, tb, sb, gb, width, sigma,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b, i, mask = _place(width, BLOCK)
    d = _number(t, b, tb) - _number(s, b, sb)
    unconditional = _load(out, b * outb + i, mask)
    conditional = _load(out, (b + tl.num_programs(0)) * outb + i, mask)
    v = sigma * (unconditional + _number(guidance, b, gb) * (conditional - unconditional))
    tl.store(velocity + b * width + i, v.to(velocity.dtype.element_ty), mask)
    state = tl.cos(d) * _load(x, b * xb + i, mask) - tl.sin(d) * v
    tl.store(moved + b * width + i, state.to(moved.dtype.element_ty), mask)


def flow_input(
    x: Tensor, t: Tensor, tx: Tensor | None, tt: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """See reference.flow_input."""
    x_fm, t_fm = fresh(x), fresh(t)
    tx_fm = None if tx is None and tt is None else fresh(x)
    tt_fm = None if tt is None else fresh(t)
    inputs = [flat_samples(x), t, flat_samples(tx), tt]
    _launch(input_kernel, inputs, [x_fm, t_fm, tx_fm, tt_fm], inputs[0])
    return x_fm, t_fm, tx_fm, tt_fm


def flow_output(
    v: Tensor, x: Tensor, t: Tensor, tv: Tensor | None, tx: Tensor | None, tt: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """See reference.flow_output."""
    out = fresh(x)
    tout = None if tv is None and tx is None and tt is None else fresh(x)
    inputs = [flat_samples(v), flat_samples(x), t, flat_samples(tv), flat_samples(tx), tt]
    _launch(output_kernel, inputs, [out, tout], inputs[1])
    return out, tout


def trajectory_step(
    x: Tensor, out: Tensor, t: Tensor, s: Tensor, guidance: Tensor, sigma_data: float
) -> tuple[Tensor, Tensor]:
    """See reference.trajectory_step."""
    velocity, moved = fresh(x), fresh(x)
    inputs = [flat_samples(x), flat_samples(out), t, s, guidance]
    _launch(step_kernel, inputs, [velocity, moved], inputs[0], sigma_data)
    return velocity, moved


def _launch(
    kernel: triton.JITFunction, inputs: list[Tensor | None], outputs: list[Tensor | None],
    x: Tensor, *numbers: float,
) -> None:  # fmt: skip
    """One program a block of each sample of x [B, D]; an empty sample has one, too."""
    batch, width = x.shape
    strides = [0 if a is None else a.stride(0) for a in inputs]
    if batch:
        with device_of(x):
            kernel[(batch, max(triton.cdiv(width, BLOCK), 1))](
                *inputs, *outputs, *strides, width, *numbers, BLOCK=BLOCK, num_warps=WARPS
            )


def audit_cases() -> Iterator[AuditCase]:
    """Each kernel with all operands in fp32 and bf16, and the wraps without tangents."""
    tangents = {"tx", "tt", "tv", "tx_fm", "tt_fm", "tout"}
    for dtype in ("fp32", "bf16"):
        for kernel in (input_kernel, output_kernel, step_kernel):
            for absent in ((), tangents) if kernel is not step_kernel else ((),):
                names = kernel.arg_names[:-1]
                types: dict[str, str | None] = {
                    n: "i64" if n == "width" or n.endswith("b") else f"*{dtype}" for n in names
                }
                types |= {n: "*fp32" for n in names if n in ("t", "s", "tt", "guidance")}
                types |= {n: "fp32" for n in names if n == "sigma"}
                types |= {n: None for n in names if n in absent}
                part = kernel.fn.__name__.removesuffix("_kernel")
                name = f"trigflow {dtype} {part} {'alone' if absent else 'full'}"
                yield AuditCase(name, kernel, types, {"BLOCK": BLOCK}, WARPS)
