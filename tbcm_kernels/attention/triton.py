"""Triton kernels of attention: value and tangent in one launch; the backward is next door."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tbcm_kernels._dispatch import may_use_tf32
from tbcm_kernels._library import fresh_heads, unit_stride
from tbcm_kernels._triton import device_of, row_config
from tbcm_kernels.attention import buffers
from tbcm_kernels.attention.reference import FIRST_KEYS, Setting
from tbcm_kernels.attention.triton_backward import keys_kernel, queries_kernel, rows_kernel
from tbcm_kernels.attention.triton_tiles import (
    LOG2E,
    again,
    chunks_of,
    hidden,
    inner,
    mask_operand,
    operand,
    operands,
    outer,
    scaled,
    store_tile,
    tile,
    zeros,
)

_FIRST_KEYS = tl.constexpr(FIRST_KEYS)


@triton.jit
def _seen(key_mask, batch, columns, keys):
    seen = columns < keys
    if key_mask is not None:
        at = key_mask.pointer + batch * key_mask.batch + columns.to(tl.int64) * key_mask.column
        seen = tl.load(at, seen, other=0) != 0
    return seen


@triton.jit
def _times_mean(x, y, count):
    """Each row of a tile x times the mean of the rows of y, of which `count` are not zeros."""
    total = tl.sum(x[0].to(tl.float32) * (tl.sum(y[0].to(tl.float32), 0) / count)[None, :], 1)
    for i in tl.static_range(1, len(x)):
        mean = tl.sum(y[i].to(tl.float32), 0) / count
        total += tl.sum(x[i].to(tl.float32) * mean[None, :], 1)
    return total


@triton.jit
def _sweep(
    state, first, last, q_tile, tq_tiles, centers, k, v, tk, tv, mask, key_mask, rows,
    batch, head, kv_head, queries, keys, scale, causal,
    D: tl.constexpr, DV: tl.constexpr, CHUNKS: tl.constexpr, V_CHUNKS: tl.constexpr,
    LANES: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key blocks [first, last); EDGE: some may be beyond the last key."""
    top, total, acc, tmeans, taccs = state
    local = tl.arange(0, BN)
    for start in range(first, last, BN):
        columns = start + local
        seen = None
        if key_mask is not None or EDGE:
            seen = _seen(key_mask, batch, columns, keys)
        k_tile = tile(k, 0, batch, kv_head, start, local, seen, D, CHUNKS, UNIT)
        logits = inner(q_tile, k_tile, tl.zeros((BM, BN), tl.float32), PRECISION)
        logits = hidden(
            logits * (scale * LOG2E), rows[:, None], columns[None, :], mask,
            None if seen is None else seen[None, :], batch, head, queries, keys, causal, DIAGONAL,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        shrink = tl.exp2(top - base)
        p = tl.exp2(logits - base[:, None])
        top = higher
        total = total * shrink + tl.sum(p, 1)
        v_tile = tile(v, 0, batch, kv_head, start, local, seen, DV, V_CHUNKS, UNIT)
        acc = outer(p, v_tile, scaled(acc, shrink[:, None]), PRECISION)
        new_tmeans = ()
        new_taccs = ()
        for t in tl.static_range(LANES):
            tmean = tmeans[t] * shrink
            tacc = scaled(taccs[t], shrink[:, None])
            if tq_tiles is not None or tk is not None:
                rate = tl.zeros((BM, BN), tl.float32)
                if tq_tiles is not None:
                    rate = inner(tq_tiles[t], k_tile, rate, PRECISION)
                if tk is not None:
                    tk_tile = tile(tk, t, batch, kv_head, start, local, seen, D, CHUNKS, UNIT)
                    rate = inner(q_tile, tk_tile, rate, PRECISION)
                weighted = p * (rate * scale - centers[t][:, None])
                tmean += tl.sum(weighted, 1)
                tacc = outer(weighted, v_tile, tacc, PRECISION)
            if tv is not None:
                tv_tile = tile(tv, t, batch, kv_head, start, local, seen, DV, V_CHUNKS, UNIT)
                tacc = outer(p, tv_tile, tacc, PRECISION)
            new_tmeans = new_tmeans + (tmean,)
            new_taccs = new_taccs + (tacc,)
        tmeans = new_tmeans
        taccs = new_taccs
    return top, total, acc, tmeans, taccs


@triton.jit(do_not_specialize=["bucket"])
def forward_kernel(
    q, k, v, tq, tk, tv, o, to, lse, mu, mask, key_mask,
    heads, groups, queries, keys, scale, causal, bucket,
    D: tl.constexpr, DV: tl.constexpr, CHUNKS: tl.constexpr, V_CHUNKS: tl.constexpr,
    LANES: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(queries, BM)
    head, batch = program // blocks % heads, program // blocks // heads
    kv_head = head // (heads // groups)
    block = program % blocks
    if causal is not None:
        block = blocks - 1 - block  # the rows with most keys start first
    first, local = block * BM, tl.arange(0, BM)
    rows = (first + local).to(tl.int32)
    there = rows < queries
    q_tile = tile(q, 0, batch, head, first, local, there, D, CHUNKS, UNIT)
    tq_tiles = None
    if tq is not None:
        tq_tiles = ()
    tmeans = ()
    taccs = ()
    for t in tl.static_range(LANES):
        if tq is not None:
            tq_tiles = tq_tiles + (tile(tq, t, batch, head, first, local, there, D, CHUNKS, UNIT),)
        tmeans = tmeans + (tl.zeros((BM,), tl.float32),)
        taccs = taccs + (zeros(BM, V_CHUNKS),)
    top = tl.full((BM,), -float("inf"), tl.float32)
    state = top, tl.zeros((BM,), tl.float32), zeros(BM, V_CHUNKS), tmeans, taccs
    full, last = keys // BN * BN, keys
    if causal is not None:
        last = tl.minimum(keys, tl.maximum(first + BM + causal, 0)).to(tl.int32)
        full = tl.minimum(full, tl.maximum(first + causal + 1, 0) // BN * BN).to(tl.int32)
    # Ṡ around what it is at the mean of the first keys: P∘Ṡ is rounded, and a mean that the rates
    # share would drown the rest.
    centers = ()
    if tq is not None or tk is not None:
        columns = tl.arange(0, _FIRST_KEYS)
        seen = _seen(key_mask, batch, columns, keys)
        count = tl.maximum(tl.sum(seen.to(tl.float32), 0), 1.0)
        k_tile = tile(k, 0, batch, kv_head, 0, columns, seen, D, CHUNKS, UNIT)
        for t in tl.static_range(LANES):
            center = tl.zeros((BM,), tl.float32)
            if tq is not None:
                center += _times_mean(tq_tiles[t], k_tile, count)
            if tk is not None:
                tk_tile = tile(tk, t, batch, kv_head, 0, columns, seen, D, CHUNKS, UNIT)
                center += _times_mean(q_tile, tk_tile, count)
            centers = centers + (center * scale,)
    state = _sweep(
        state, 0, full, q_tile, tq_tiles, centers, k, v, tk, tv, mask, key_mask, rows,
        batch, head, kv_head, queries, keys, scale, causal,
        D, DV, CHUNKS, V_CHUNKS, LANES, UNIT, PRECISION, BM, BN, False, False,
    )  # fmt: skip
    state = _sweep(
        state, full, last, q_tile, tq_tiles, centers, k, v, tk, tv, mask, key_mask, rows,
        batch, head, kv_head, queries, keys, scale, causal,
        D, DV, CHUNKS, V_CHUNKS, LANES, UNIT, PRECISION, BM, BN, True, causal is not None,
    )  # fmt: skip
    top, total, acc, tmeans, taccs = state
    local = again(local, queries)
    rows = (first + local).to(tl.int32)
    there = rows < queries
    inverse = 1.0 / tl.where(total == 0, 1.0, total)
    acc = scaled(acc, inverse[:, None])
    store_tile(o, 0, batch, head, first, local, there, acc, DV, V_CHUNKS, UNIT)
    at = (batch * heads + head) * queries + rows
    tl.store(lse + at, (top + tl.log2(total)) / LOG2E, there)
    size = (tl.num_programs(0) // blocks).to(tl.int64) * queries
    for t in tl.static_range(LANES):
        mean = tmeans[t] * inverse
        tacc = ()
        for i in tl.static_range(len(acc)):
            tacc = tacc + (taccs[t][i] * inverse[:, None] - mean[:, None] * acc[i],)
        store_tile(to, t, batch, head, first, local, there, tacc, DV, V_CHUNKS, UNIT)
        if tq is not None or tk is not None:
            mean += tl.where(total == 0, 0.0, centers[t])
        tl.store(mu + t * size + at, mean, there)


@triton.jit
def norm_kernel(
    x, tx, weight, y, ty, heads, rows, eps, lanes,
    WIDTH: tl.constexpr, ACROSS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """RMSNorm of one token: over all its heads, or of HEADS heads each alone."""
    token = tl.program_id(0).to(tl.int64)
    batch, row = token // rows, token % rows
    h = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    there = (h < heads) & (c < WIDTH)
    at = x.pointer + batch * x.batch + row * x.row + h.to(tl.int64) * x.head + c
    value = tl.load(at, there, other=0.0).to(tl.float32)
    if ACROSS:
        width = heads * WIDTH
        w = tl.load(weight + h * WIDTH + c, there, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(tl.sum(value * value, 1), 0) / width + eps)
    else:
        width = WIDTH
        w = tl.load(weight + c, c < WIDTH, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(value * value, 1) / width + eps)[:, None]
    out = y.pointer + batch * y.batch + row * y.row + h.to(tl.int64) * y.head + c
    tl.store(out, (w * r * value).to(y.pointer.dtype.element_ty), there)
    if tx is not None:
        at = tx.pointer + batch * tx.batch + row * tx.row + h.to(tl.int64) * tx.head + c
        out = ty.pointer + batch * ty.batch + row * ty.row + h.to(tl.int64) * ty.head + c
        for lane in range(lanes):
            t = tl.cast(lane, tl.int64)
            tangent = tl.load(at + t * tx.lane, there, other=0.0).to(tl.float32)
            if ACROSS:
                mixed = tl.sum(tl.sum(value * tangent, 1), 0) / width
            else:
                mixed = (tl.sum(value * tangent, 1) / width)[:, None]
            moved = w * r * (tangent - value * (r * r * mixed))
            tl.store(out + t * ty.lane, moved.to(ty.pointer.dtype.element_ty), there)


Config = tuple[int, int, int, int]
"""Block of queries, block of keys, warps, stages."""
_WIDTHS = (64, 80, 128, 256)
_HOPPER = {
    "forward": ((128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (128, 32, 8, 2)),
    "forward tangent": ((64, 64, 4, 3), (64, 32, 4, 3), (128, 32, 8, 3), (16, 16, 8, 1)),
    "forward lanes": ((128, 32, 8, 2),),
    "keys": ((32, 128, 8, 3), (64, 64, 4, 2), (64, 128, 8, 3), (32, 128, 8, 2)),
    "keys causal": ((32, 128, 8, 3), (64, 64, 4, 2), (32, 128, 8, 3), (32, 128, 8, 2)),
    "keys tangent": ((32, 128, 8, 3), (32, 128, 8, 3), (32, 128, 8, 3), (16, 16, 4, 1)),
    "keys tangent causal": ((32, 128, 8, 3), (32, 128, 8, 3), (16, 128, 8, 3), (16, 16, 4, 1)),
    "queries": ((64, 64, 4, 3), (64, 64, 4, 3), (128, 32, 8, 3), (128, 32, 8, 2)),
    "queries tangent": ((64, 32, 4, 3), (128, 32, 8, 3), (128, 32, 8, 3), (16, 16, 4, 1)),
}
_BLACKWELL = {
    "forward": ((128, 128, 8, 3), (128, 128, 8, 2), (128, 128, 8, 2), (128, 32, 8, 2)),
    "forward tangent": ((128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (16, 16, 8, 1)),
    "forward lanes": ((128, 32, 8, 2),),
    "keys": ((64, 128, 8, 2), (64, 128, 8, 2), (32, 128, 8, 2), (32, 128, 8, 2)),
    "keys tangent": ((32, 64, 4, 2), (32, 64, 4, 2), (16, 128, 8, 2), (16, 16, 4, 1)),
    "keys tangent causal": ((32, 64, 4, 2), (16, 64, 4, 2), (16, 128, 8, 2), (16, 16, 4, 1)),
    "queries": ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
    "queries tangent": ((128, 32, 8, 2), (128, 32, 8, 2), (128, 16, 8, 2), (16, 16, 4, 1)),
}
_AMPERE = {
    "forward": ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2)),
    "forward tangent": ((64, 32, 4, 2), (64, 32, 4, 2), (128, 16, 8, 2), (16, 16, 4, 1)),
    "forward lanes": ((64, 16, 4, 2),),
    "keys": ((64, 128, 8, 2), (32, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
    "keys tangent": ((16, 64, 4, 2), (16, 64, 4, 2), (32, 32, 4, 2), (16, 16, 4, 1)),
    "queries": ((128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
    "queries tangent": ((128, 32, 8, 1), (64, 16, 4, 2), (32, 32, 4, 2), (16, 16, 4, 1)),
    "queries tangent causal": ((64, 16, 4, 2), (64, 16, 4, 2), (32, 32, 4, 2), (16, 16, 4, 1)),
}
"""Blocks of queries and keys, warps and stages of each kernel in bf16 and fp16, at head dims up to
each of _WIDTHS. Hopper's were chosen by timing (README.md); those of the others by the static
audit: the largest that spill nothing."""
_FP32 = (16, 16, 8, 1)
"""The same for fp32, at every head dim and on every GPU: exact products run without tensor cores
and keep their factors in registers, so that they spill."""
_PINNED = {(8, 0): _AMPERE, (9, 0): _HOPPER, (10, 0): _BLACKWELL}
"""The GPUs, by compute capability, that do not search."""
_INTERPRETED = (32, 16, 4, 1)
_SMALL = (32, 32, 4, 1)
"""What fits in 99 KiB of shared memory at any head dim, in 16 bits."""
_SPLIT = {
    "keys": (1, 1, 1, 2),
    "keys tangent": (1, 2, 2, 4),
    "queries": (1, 1, 1, 1),
    "queries tangent": (1, 1, 2, 2),
}
"""Launches that share the gradients: more sums in one are fewer GEMMs, as far as registers go."""
_LAUNCH = {1: (0, 0, 0, 0), 2: (0, 1, 0, 1), 4: (0, 1, 2, 3)}
"""Which launch makes the gradients of k, v, tk, tv, or of q, tq."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, setting: Setting,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """See reference.forward."""
    o, lse, to, mu = buffers.outputs(q, v, (tq, tk, tv))
    lanes = 0 if to is None else to.shape[0]
    if o.numel():
        share = _lanes_at_once(q, v)
        with device_of(q):
            q, tq = _normalized(q, q_weight, tq, setting.q_eps)
            k, tk = _normalized(k, k_weight, tk, setting.k_eps)
            for lane in range(0, max(lanes, 1), share):
                part = slice(lane, min(lane + share, lanes))
                tangents = (None if t is None else t[part] for t in (tq, tk, tv, to, mu))
                _forward(q, k, v, *tangents, o, lse, setting)
    return o, lse, to, mu


def _lanes_at_once(q: Tensor, v: Tensor) -> int:
    """Tangent lanes that one launch carries; each has accumulators of its own.

    Two in fp32, which would spill, stop Triton 3.9 in an assertion of its compiler.
    """
    fits = max(q.shape[3], v.shape[3]) <= _WIDTHS[0] and q.dtype != torch.float32
    return 2 if fits else 1


def _forward(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None,
    to: Tensor | None, mu: Tensor | None, o: Tensor, lse: Tensor, setting: Setting,
) -> None:  # fmt: skip
    lanes = 0 if to is None else to.shape[0]
    tensors, unit = operands(q, k, v, tq, tk, tv, o, to)
    kind = ("forward", "forward tangent", "forward lanes")[min(lanes, 2)]
    _launch(forward_kernel, kind, q, k, v, (*tensors, lse, mu), setting, UNIT=unit, LANES=lanes)


def backward(
    go: Tensor | None, glse: Tensor | None, gto: Tensor | None, gmu: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, o: Tensor, lse: Tensor,
    to: Tensor | None, mu: Tensor | None, setting: Setting,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """See reference.backward."""
    through = next((g.shape[0] for g in (gto, gmu) if g is not None), 0)
    tq, tk = (t if through else None for t in (tq, tk))
    tv = tv if gto is not None else None
    found = buffers.gradients((q, k, v), (tq, tk, tv), gto, gmu)
    with device_of(q):
        q, tq = _normalized(q, q_weight, tq, setting.q_eps)
        k, tk = _normalized(k, k_weight, tk, setting.k_eps)
        totals = None
        for lane in range(max(through, 1)):
            of_lane = [None if t is None else t[lane] for t in (gto, gmu, tq, tk, tv, to, mu)]
            lane_grads = [None if g is None else g[lane] for g in found[3:]]
            primal = (go, glse) if lane == 0 else (None, None)
            sums = found[:3]
            if through > 1:
                sums = [torch.empty_like(g, dtype=torch.float32) for g in sums]
            _backward(*primal, *of_lane, q, k, v, o, lse, *sums, *lane_grads, setting)
            totals = (
                sums if totals is None else [t.add_(s) for t, s in zip(totals, sums, strict=True)]
            )
        if through > 1:  # every lane adds to the gradients of q, k and v
            for g, total in zip(found[:3], totals, strict=True):
                g.copy_(total)
    return tuple(found)


def _backward(
    go: Tensor | None, glse: Tensor | None, gto: Tensor | None, gmu: Tensor | None,
    tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, to: Tensor | None, mu: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, gq: Tensor, gk: Tensor, gv: Tensor,
    gtq: Tensor | None, gtk: Tensor | None, gtv: Tensor | None, setting: Setting,
) -> None:  # fmt: skip
    """Gradients for one tangent lane, whose dimension is gone, or for none."""
    lse, glse, gmu, mu = (None if x is None else x.contiguous() for x in (lse, glse, gmu, mu))
    d = torch.empty_like(lse)
    a = None if gto is None and gmu is None else torch.empty_like(lse)
    to, mu = (to if gto is not None else None), (mu if a is not None else None)
    batches, heads, queries, width = o.shape
    if d.numel():
        (go_, gto_, o_, to_), unit = operands(go, gto, o, to)
        block = 32
        rows_kernel[(triton.cdiv(queries, block) * heads * batches,)](
            go_, glse, gto_, gmu, o_, to_, a, d, heads, queries,
            DV=width, V_CHUNKS=chunks_of(width), UNIT=unit, BM=block,
        )  # fmt: skip
    tangent = "" if a is None else " tangent"
    for kernel, kind, gradients in (
        (keys_kernel, "keys" + tangent, (gk, gv, gtk, gtv)),
        (queries_kernel, "queries" + tangent, (gq, gtq)),
    ):
        for part in _parts(kind, max(q.shape[3], width), q.dtype, gradients):
            if any(g is not None and g.numel() for g in part):
                tensors, unit = operands(go, gto, q, k, v, tq, tk, tv, *part)
                tensors = (*tensors[:8], lse, mu, a, d, *tensors[8:])
                share = {"SHARE": heads // k.shape[1]} if kernel is keys_kernel else {}
                _launch(kernel, kind, q, k, v, tensors, setting, UNIT=unit, **share)


def _parts(
    kind: str, width: int, dtype: torch.dtype, gradients: Sequence[Any]
) -> list[tuple[Any, ...]]:
    """The gradients that each launch makes, None for those that another makes."""
    launches = _SPLIT[kind][-1 if dtype == torch.float32 else _place(width)]
    return [
        tuple(
            g if made == part else None
            for g, made in zip(gradients, _LAUNCH[launches], strict=False)
        )
        for part in range(launches)
    ]


def _normalized(
    x: Tensor, weight: Tensor | None, tx: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """See reference.normalized. Written out once: the attention kernels read a key many times."""
    if weight is None or not x.numel():
        return x, tx
    batches, heads, rows, width = x.shape
    across = weight.shape[0] != width
    y = fresh_heads(x, x.shape)
    ty = None if tx is None else fresh_heads(x, tx.shape)
    x, tx = map(unit_stride, (x, tx))
    block = triton.next_power_of_2(width)
    together = triton.next_power_of_2(heads)
    if across:
        _, warps = row_config(together * block)
    else:
        together = min(together, max(1024 // block, 1))
        warps = 4
    norm_kernel[(batches * rows, triton.cdiv(heads, together))](
        operand(x), operand(tx), weight.contiguous(), operand(y), operand(ty), heads, rows, eps,
        0 if tx is None else tx.shape[0],
        WIDTH=width, ACROSS=across, HEADS=together, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return y, ty


def _launch(
    kernel: Any, kind: str, q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Any],
    setting: Setting, **constants: Any,
) -> None:  # fmt: skip
    """One program for each block of queries, or of keys, and head."""
    (batches, heads, queries, width), (_, groups, keys, _) = q.shape, k.shape
    constants |= _widths(width, v.shape[3]) | {"PRECISION": _precision(q.dtype)}
    bucket = queries.bit_length() * 64 + keys.bit_length()
    arguments = (
        *tensors, mask_operand(setting.attn_mask), mask_operand(setting.key_mask),
        heads, groups, queries, keys, setting.scale, setting.causal, bucket,
    )  # fmt: skip

    def grid(config: dict[str, Any]) -> tuple[int]:
        if kind.startswith("keys"):
            return (triton.cdiv(keys, config["BN"]) * groups * batches,)
        return (triton.cdiv(queries, config["BM"]) * heads * batches,)

    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
    causal, mask = setting.causal is not None, setting.attn_mask
    config = _pinned(capability, kind, causal, max(width, v.shape[3]), q.dtype, mask is not None)
    if config is None:
        there = tuple(x is not None for x in arguments)
        variant = width, v.shape[3], there, None if mask is None else mask.dtype
        _tuned(kernel, kind, variant)[grid](*arguments, **constants)
    else:
        kernel[grid](*arguments, **constants, **_options(config))


def _widths(width: int, v_width: int) -> dict[str, Any]:
    return {
        "D": width, "DV": v_width, "CHUNKS": chunks_of(width), "V_CHUNKS": chunks_of(v_width),
    }  # fmt: skip


def _place(width: int) -> int:
    return next(i for i, w in enumerate(_WIDTHS) if width <= w)


def _precision(dtype: torch.dtype) -> str:
    """fp32 products are exact to fp32 unless PyTorch is told that TF32 will do."""
    return "tf32" if dtype == torch.float32 and may_use_tf32() else "ieee"


def _options(config: Config) -> dict[str, int]:
    return dict(zip(("BM", "BN", "num_warps", "num_stages"), config, strict=True))


def _pinned(
    capability: tuple[int, int] | None, kind: str, causal: bool, width: int, dtype: torch.dtype,
    masked: bool,
) -> Config | None:  # fmt: skip
    """The config of a known GPU, or None where it has to be found by timing.

    Tiles of an attn_mask are loaded ahead too: one stage less has room for them.
    """
    if capability is None:
        return _INTERPRETED
    if dtype == torch.float32:
        return _FP32
    if capability not in _PINNED:
        return None
    table = _PINNED[capability]
    config = table.get(f"{kind} causal" if causal else kind, table[kind])[_place(width)]
    return (*config[:3], max(config[3] - 1, 1)) if masked else config


@functools.cache
def _tuned(kernel: Any, kind: str, variant: tuple[Any, ...]) -> Any:
    """A kernel that times the known configs once for each bucket of lengths.

    `variant` is what else its shared memory depends on, head dims first.
    """
    place = _place(max(variant[:2]))
    known = {config for table in _PINNED.values() for config in table[kind][place:]} | {_SMALL}
    configs = [
        triton.Config({"BM": m, "BN": n}, num_warps=warps, num_stages=stages)
        for m, n, warps, stages in sorted(known)
    ]
    return triton.autotune(configs, key=["bucket"])(kernel)
