"""Triton kernels of tangent_loss: sums of squares of blocks, the loss from them, the gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tbcm_kernels._library import flat_samples, fresh
from tbcm_kernels._triton import AuditCase, device_of

BLOCK, SAMPLES, WARPS = 2048, 128, 8


@triton.jit
def _direction(
    out, jvp, velocity, x, t, outb, jvpb, velocityb, xb, tb, b, width, r, sigma,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """g of one block of sample b, with zeros past its end."""
    i = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < width
    time = tl.load(t + b * tb).to(tl.float32)
    sin, cos = tl.sin(time), tl.cos(time)
    f = tl.load(out + b * outb + i, mask, other=0.0).to(tl.float32)
    j = tl.load(jvp + b * jvpb + i, mask, other=0.0).to(tl.float32)
    v = tl.load(velocity + b * velocityb + i, mask, other=0.0).to(tl.float32)
    state = tl.load(x + b * xb + i, mask, other=0.0).to(tl.float32)
    g = -cos * cos * (sigma * f - v) - r * (cos * sin * state + sigma * j)
    return g, i, mask


@triton.jit
def squares_kernel(
    out, jvp, velocity, x, t, sums, outb, jvpb, velocityb, xb, tb, width, r, sigma,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    g, _, _ = _direction(
        out, jvp, velocity, x, t, outb, jvpb, velocityb, xb, tb, b, width, r, sigma, BLOCK
    )
    # [blocks, B], so that the samples of the next kernel read in a row.
    tl.store(sums + tl.program_id(1).to(tl.int64) * tl.num_programs(0) + b, tl.sum(g * g, 0))


@triton.jit
def _number(pointer, b, stride, mask, default):
    if pointer is None:
        number = tl.full(b.shape, default, tl.float32)
    else:
        number = tl.load(pointer + b * stride, mask, other=0.0).to(tl.float32)
    return number


@triton.jit
def loss_kernel(
    sums, keep, weight, log_variance, loss, norm, slope, glv, keepb, weightb, lvb,
    batch, blocks, width, c,
    SAMPLES: tl.constexpr,
):  # fmt: skip
    """One program for all samples: their terms are added in one order."""
    total, count = 0.0, 0
    for first in range(0, batch, SAMPLES):
        b = first + tl.arange(0, SAMPLES).to(tl.int64)
        mask = b < batch
        square = tl.zeros((SAMPLES,), tl.float32)
        for k in range(blocks):
            square += tl.load(sums + k * batch + b, mask, other=0.0)
        n = tl.sqrt_rn(square)
        kept = _number(keep, b, keepb, mask, 1.0)
        lv = _number(log_variance, b, lvb, mask, 0.0)
        scale = kept * _number(weight, b, weightb, mask, 1.0) * tl.exp(-lv)
        length = n / (n + c)
        value = scale * length * length / width
        finite = mask & (n < float("inf"))  # a NaN is less than nothing
        total += tl.sum(tl.where(finite, value + kept * lv, 0.0), 0)
        count += tl.sum(finite.to(tl.int32), 0)
        gradient = -2.0 * scale / ((n + c) * width * batch)
        tl.store(norm + b, n, mask)
        tl.store(slope + b, tl.where(finite, gradient, 0.0), mask)
        tl.store(glv + b, tl.where(finite, (kept - value) / batch, 0.0), mask)
    tl.store(loss, tl.where(count > 0, total / batch, float("nan")))


@triton.jit
def backward_kernel(
    gloss, slope, out, jvp, velocity, x, t, gout, outb, jvpb, velocityb, xb, tb, width, r, sigma,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    k = tl.load(slope + b)
    if k == 0.0:  # dropped or not finite: g itself may be a NaN
        i = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        zeros = tl.zeros((BLOCK,), gout.dtype.element_ty)
        tl.store(gout + b * width + i, zeros, i < width)
    else:
        g, i, mask = _direction(
            out, jvp, velocity, x, t, outb, jvpb, velocityb, xb, tb, b, width, r, sigma, BLOCK
        )
        g *= tl.load(gloss).to(tl.float32) * k
        tl.store(gout + b * width + i, g.to(gout.dtype.element_ty), mask)


def forward(
    out: Tensor, jvp: Tensor, velocity: Tensor, x: Tensor, t: Tensor, keep: Tensor | None,
    weight: Tensor | None, log_variance: Tensor | None, r: float, c: float, sigma_data: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See reference.forward."""
    batch, rows = len(out), [*map(flat_samples, (out, jvp, velocity, x)), t]
    width = rows[0].shape[1]
    blocks = triton.cdiv(width, BLOCK)
    options = {"dtype": torch.float32, "device": out.device}
    sums, loss = torch.empty(blocks, batch, **options), torch.empty((), **options)
    norm, slope, glv = (torch.empty(batch, **options) for _ in range(3))
    numbers = keep, weight, log_variance
    with device_of(out):
        if batch:
            squares_kernel[(batch, blocks)](
                *rows, sums, *_strides(rows), width, r, sigma_data, BLOCK=BLOCK, num_warps=WARPS
            )
        loss_kernel[(1,)](
            sums, *numbers, loss, norm, slope, glv, *_strides(numbers), batch, blocks, width, c,
            SAMPLES=SAMPLES, num_warps=SAMPLES // 32,
        )  # fmt: skip
    return loss, norm, slope, glv


def backward(
    gloss: Tensor, slope: Tensor, out: Tensor, jvp: Tensor, velocity: Tensor, x: Tensor, t: Tensor,
    r: float, sigma_data: float,
) -> Tensor:  # fmt: skip
    """See reference.backward."""
    gout, rows = fresh(out), [*map(flat_samples, (out, jvp, velocity, x)), t]
    batch, width = rows[0].shape
    if batch:
        with device_of(out):
            backward_kernel[(batch, triton.cdiv(width, BLOCK))](
                gloss, slope, *rows, gout, *_strides(rows), width, r, sigma_data,
                BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
    return gout


def _strides(operands: list[Tensor] | tuple[Tensor | None, ...]) -> list[int]:
    return [0 if a is None else a.stride(0) for a in operands]


def audit_cases() -> Iterator[AuditCase]:
    """The kernels of blocks in fp32 and bf16, and that of the loss with and without its numbers."""
    numbers = {"keep", "weight", "log_variance"}
    floats = {"t", "gloss", "sums", "loss", "norm", "slope", "glv"} | numbers
    tensors = {"out", "jvp", "velocity", "x", "gout"}
    for dtype in ("fp32", "bf16"):
        types = dict.fromkeys(tensors, f"*{dtype}") | dict.fromkeys(floats, "*fp32")
        types |= dict.fromkeys(("r", "c", "sigma"), "fp32")
        for kernel, part in ((squares_kernel, "squares"), (backward_kernel, "backward")):
            arguments = {n: types.get(n, "i64") for n in kernel.arg_names[:-1]}
            name = f"tangent_loss {dtype} {part}"
            yield AuditCase(name, kernel, arguments, {"BLOCK": BLOCK}, WARPS)
    for part in ("loss", "loss alone"):
        arguments = {n: types.get(n, "i64") for n in loss_kernel.arg_names[:-1]}
        if part == "loss alone":
            arguments |= dict.fromkeys(numbers)
        name = f"tangent_loss fp32 {part}"
        yield AuditCase(name, loss_kernel, arguments, {"SAMPLES": SAMPLES}, SAMPLES // 32)
