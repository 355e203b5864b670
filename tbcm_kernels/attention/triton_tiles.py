"""What the Triton kernels of attention share: operands, tiles in column chunks, masked logits.

A tile is a tuple of column chunks, so that a head dim of 72 costs 64 + 16 columns and not 128.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# A row beyond this stride could overflow the 32-bit offsets inside one block.
MAX_ROW_STRIDE = 2**22
LOG2E = tl.constexpr(1.4426950408889634)


class Operand(NamedTuple):
    """A [T, B, H, N, D] tensor in a kernel: its strides in `unit`s, columns next to each other."""

    pointer: Any
    lane: Any
    batch: Any
    head: Any
    row: Any


class Mask(NamedTuple):
    """A [B, H, N, S] mask in a kernel."""

    pointer: Any
    batch: Any
    head: Any
    row: Any
    column: Any


def operands(*tensors: Tensor | None) -> tuple[list[Operand | None], int]:
    """Operands of a launch, and the unit of their strides, which tells how far loads may be wide.

    A tensor without unit stride along its columns, or with a huge row stride, is copied.
    """
    ready = [x if x is None or _addressable(x) else x.contiguous() for x in tensors]
    unit = 8 if all(s % 8 == 0 for x in ready if x is not None for s in _steps(x)) else 1
    return [operand(x, unit) for x in ready], unit


def operand(x: Tensor | None, unit: int = 1) -> Operand | None:
    return None if x is None else Operand(x, *(s // unit for s in _steps(x)))


def _addressable(x: Tensor) -> bool:
    return x.stride(-1) == 1 and x.stride(-2) <= MAX_ROW_STRIDE


def _steps(x: Tensor) -> tuple[int, ...]:
    """Strides of lane, batch, head and row; that of a size of 1 is never used, so it is 0."""
    sizes, strides = x.shape[:-1], x.stride()[:-1]
    steps = tuple(0 if n == 1 else s for n, s in zip(sizes, strides, strict=True))
    return steps if len(steps) == 4 else (0, *steps)


def mask_operand(mask: Tensor | None) -> Mask | None:
    """A mask of [B, H, N, S] or [B, S]; booleans as bytes."""
    if mask is None:
        return None
    batch, *middle, column = mask.stride()
    data = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    return Mask(data, batch, *(middle or (0, 0)), column)


def chunks_of(width: int) -> tuple[int, ...]:
    """Powers of two that cover a head dim: one, or two where that saves columns."""
    whole = max(triton.next_power_of_2(width), 16)
    first = whole // 2
    if first < 32:
        return (whole,)
    second = max(triton.next_power_of_2(width - first), 16)
    return (whole,) if first + second >= whole else (first, second)


@triton.jit
def tile(
    x, lane, batch, head, first, local, seen,
    WIDTH: tl.constexpr, CHUNKS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Rows first + local, zero where not `seen`; `seen` None: all are there."""
    base = x.pointer + (lane * x.lane + batch * x.batch + head * x.head + first * x.row) * UNIT
    chunks = ()
    for i in tl.static_range(len(CHUNKS)):
        columns = (i * CHUNKS[0] + tl.arange(0, CHUNKS[i]))[None, :]
        at = base + local[:, None] * (x.row * UNIT) + columns
        if i * CHUNKS[0] + CHUNKS[i] > WIDTH:
            there = columns < WIDTH
            if seen is not None:
                there = there & seen[:, None]
            chunk = tl.load(at, there, other=0.0)
        elif seen is not None:
            chunk = tl.load(at, seen[:, None], other=0.0)
        else:
            chunk = tl.load(at)
        chunks = chunks + (chunk,)
    return chunks


@triton.jit
def store_tile(
    x, lane, batch, head, first, local, there, chunks,
    WIDTH: tl.constexpr, CHUNKS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    base = x.pointer + (lane * x.lane + batch * x.batch + head * x.head + first * x.row) * UNIT
    for i in tl.static_range(len(CHUNKS)):
        columns = (i * CHUNKS[0] + tl.arange(0, CHUNKS[i]))[None, :]
        at = base + local[:, None] * (x.row * UNIT) + columns
        value = chunks[i].to(x.pointer.dtype.element_ty)
        tl.store(at, value, there[:, None] & (columns < WIDTH))


@triton.jit
def again(local, size):
    """The same indices, made anew: addresses kept through a long loop for its end would spill."""
    return local + tl.where(size < 0, 1, 0)


@triton.jit
def _block(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros((ROWS, COLUMNS), tl.float32)


@triton.jit
def zeros(ROWS: tl.constexpr, CHUNKS: tl.constexpr):
    """An accumulator of tiles."""
    chunks = ()
    for i in tl.static_range(len(CHUNKS)):
        chunks = chunks + (_block(ROWS, CHUNKS[i]),)
    return chunks


@triton.jit
def scaled(chunks, factor):
    """Rows of a tile times a factor each."""
    result = ()
    for i in tl.static_range(len(chunks)):
        result = result + (chunks[i] * factor,)
    return result


@triton.jit
def inner(a, b, total, PRECISION: tl.constexpr):
    """total + a bᵀ."""
    for i in tl.static_range(len(a)):
        total = tl.dot(a[i], tl.trans(b[i]), total, input_precision=PRECISION)
    return total


@triton.jit
def outer(p, b, total, PRECISION: tl.constexpr):
    """total + p b, with p rounded to the dtype of b."""
    chunks = ()
    for i in tl.static_range(len(b)):
        product = tl.dot(p.to(b[i].dtype), b[i], total[i], input_precision=PRECISION)
        chunks = chunks + (product,)
    return chunks


@triton.jit
def hidden(
    logits, i, j, mask, seen, batch, head, queries, keys, causal, DIAGONAL: tl.constexpr
):  # fmt: skip
    """Logits in base 2 with the bias, −∞ where query i does not see key j."""
    if mask is not None:
        at = mask.pointer + batch * mask.batch + head * mask.head
        at += i.to(tl.int64) * mask.row + j.to(tl.int64) * mask.column
        value = tl.load(at, (i < queries) & (j < keys), other=0)
        if mask.pointer.dtype.element_ty == tl.uint8:
            logits = tl.where(value != 0, logits, -float("inf"))
        else:
            logits += value.to(tl.float32) * LOG2E
    if DIAGONAL:
        logits = tl.where(j <= i + causal, logits, -float("inf"))
    if seen is not None:
        logits = tl.where(seen, logits, -float("inf"))
    return logits
