"""The Triton kernels of linear_attention; their launches are next door.

One gathers S from the keys, one gives it to the queries; backward is the same in turn: queries, gS,
keys. Tokens are normalised and mapped as their tiles are read, so that φ(q) and φ(k) exist in
registers only. The normaliser's column of S is a vector of its own, a sum without tensor cores.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Norm(NamedTuple):
    """An RMSNorm of q or k in a kernel.

    Beside it kernels take `scalars`, [B, N, 2]: r and m of a token over all heads; None where each
    head is normalised alone.
    """

    weight: Any
    step: Any
    """From one head's weights to the next one's."""
    eps: Any


@triton.jit
def statistics_kernel(
    x, tx, scalars, batches, heads, rows, eps, D: tl.constexpr, BD: tl.constexpr,
    UNIT: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """r = (mean x² + ε)^−½ and m = mean(x ẋ) of tokens over all heads, HEADS at once."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    batch, row = (token // rows)[:, None], (token % rows)[:, None]
    j = tl.arange(0, HEADS * BD)
    squares = tl.zeros((TOKENS, HEADS * BD), tl.float32)
    mixed = tl.zeros((TOKENS, HEADS * BD), tl.float32)
    for first in range(0, heads, HEADS):
        h, c = (first + j // BD).to(tl.int64)[None, :], (j % BD)[None, :]
        there = (batch < batches) & (h < heads) & (c < D)
        at = x.pointer + (batch * x.batch + row * x.row + h * x.head) * UNIT + c
        value = tl.load(at, there, other=0.0).to(tl.float32)
        squares += value * value
        if tx is not None:
            at = tx.pointer + (batch * tx.batch + row * tx.row + h * tx.head) * UNIT + c
            mixed += value * tl.load(at, there, other=0.0).to(tl.float32)
    width, there = heads * D, token < rows * batches
    tl.store(scalars + token * 2, tl.rsqrt(tl.sum(squares, 1) / width + eps), there)
    if tx is not None:
        tl.store(scalars + token * 2 + 1, tl.sum(mixed, 1) / width, there)


@triton.jit
def _at(x, batch, head, first, local, columns, UNIT: tl.constexpr):
    base = x.pointer + (batch * x.batch + head * x.head + first * x.row) * UNIT
    return base + local[:, None] * (x.row * UNIT) + columns[None, :]


@triton.jit
def _tile(x, batch, head, first, local, there, columns, WIDTH: tl.constexpr, UNIT: tl.constexpr):
    at = _at(x, batch, head, first, local, columns, UNIT)
    return tl.load(at, there[:, None] & (columns < WIDTH)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store_tile(
    x, value, batch, head, first, local, there, columns, WIDTH: tl.constexpr, UNIT: tl.constexpr
):
    at = _at(x, batch, head, first, local, columns, UNIT)
    value = value.to(x.pointer.dtype.element_ty)
    tl.store(at, value, there[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def _features(
    x, tx, norm, scalars, batch, head, first, local, there, rows,
    D: tl.constexpr, BD: tl.constexpr, UNIT: tl.constexpr, FEATURE: tl.constexpr,
):  # fmt: skip
    """φ(x), φ′(x) and φ′(x) ẋ of a tile of tokens; φ and φ′(x) ẋ are zero in rows not there."""
    c = tl.arange(0, BD)
    value = _tile(x, batch, head, first, local, there, c, D, UNIT)
    tangent = tl.zeros(value.shape, tl.float32)
    if tx is not None:
        tangent = _tile(tx, batch, head, first, local, there, c, D, UNIT)
    if norm is not None:
        w = tl.load(norm.weight + head * norm.step + c, c < D, other=0.0).to(tl.float32)
        if scalars is None:
            r = tl.where(there, tl.rsqrt(tl.sum(value * value, 1) / D + norm.eps), 0.0)
        else:
            at = scalars + (batch * rows + first + local) * 2
            r = tl.load(at, there, other=0.0)
        if tx is not None:
            if scalars is None:
                m = tl.sum(value * tangent, 1) / D
            else:
                m = tl.load(at + 1, there, other=0.0)
            tangent = w[None, :] * r[:, None] * (tangent - value * (r * r * m)[:, None])
        value = w[None, :] * r[:, None] * value
    slope = tl.full(value.shape, 1.0, tl.float32)
    if FEATURE == "relu":
        slope = tl.where(value > 0, 1.0, 0.0)
        value = tl.where(value < 0, 0.0, value)  # a NaN stays one
    if FEATURE == "elu+1":
        slope = tl.exp(tl.where(value > 0, 0.0, value))
        value = tl.where(value > 0, value + 1, slope)
        value = tl.where(there[:, None], value, 0.0)  # φ(0) = 1
    return value, slope, slope * tangent


@triton.jit
def _state(state, index, columns, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr):
    """Columns of the index-th state, zero outside; the one at DV is the normaliser's."""
    d = tl.arange(0, BD)
    at = state + (index * D + d[:, None]) * (DV + 1) + columns[None, :]
    return tl.load(at, (d < D)[:, None] & (columns < DV)[None, :], other=0.0)


@triton.jit
def _normaliser(state, index, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    return tl.load(state + (index * D + d) * (DV + 1) + DV, d < D, other=0.0)


@triton.jit
def _store_state(
    state, value, z, index, columns, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr
):
    d = tl.arange(0, BD)
    at = state + (index * D + d[:, None]) * (DV + 1) + columns[None, :]
    tl.store(at, value, (d < D)[:, None] & (columns < DV)[None, :])
    if tl.program_id(1) == 0:
        tl.store(state + (index * D + d) * (DV + 1) + DV, z, d < D)


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def state_kernel(
    k, v, tk, tv, norm, scalars, factors, state, tstate, batches, heads, rows, span,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr,
    FEATURE: tl.constexpr, PRECISION: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """S = φ(k)ᵀ[v, 1] and its tangent over `span` tokens; the second axis takes columns of v.

    With `factors` f, a pair for each token, it is φ(k)ᵀ[f₀ v, f₁].
    """
    program = tl.program_id(0).to(tl.int64)
    head, batch = program % heads, program // heads % batches
    begin = (program // heads // batches * span).to(tl.int32)
    columns, local = tl.program_id(1) * BV + tl.arange(0, BV), tl.arange(0, TOKENS)
    total, z = tl.zeros((BD, BV), tl.float32), tl.zeros((BD,), tl.float32)
    ttotal, tz = tl.zeros((BD, BV), tl.float32), tl.zeros((BD,), tl.float32)
    for first in range(begin, tl.minimum(begin + span, rows), TOKENS):
        there = first + local < rows
        fk, _, tfk = _features(
            k, tk, norm, scalars, batch, head, first, local, there, rows, D, BD, UNIT, FEATURE
        )
        value = _tile(v, batch, head, first, local, there, columns, DV, UNIT)
        if factors is None:
            z += tl.sum(fk, 0)
        else:
            at = factors + ((batch * heads + head) * rows + first + local) * 2
            value *= tl.load(at, there, other=0.0)[:, None]
            z += tl.sum(fk * tl.load(at + 1, there, other=0.0)[:, None], 0)
        total = _dot(tl.trans(fk), value, total, PRECISION)
        if tk is not None:
            ttotal = _dot(tl.trans(tfk), value, ttotal, PRECISION)
            tz += tl.sum(tfk, 0)
        if tv is not None:
            moved = _tile(tv, batch, head, first, local, there, columns, DV, UNIT)
            ttotal = _dot(tl.trans(fk), moved, ttotal, PRECISION)
    _store_state(state, total, z, program, columns, D, DV, BD)
    if tstate is not None:
        _store_state(tstate, ttotal, tz, program, columns, D, DV, BD)


@triton.jit
def output_kernel(
    q, tq, norm, scalars, state, tstate, o, to, heads, rows, eps,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr,
    FEATURE: tl.constexpr, PRECISION: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """o = n_v / (n_1 + ε) with n = φ(q) S, and its tangent, of a block of queries."""
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(rows, TOKENS)
    head, batch = program % heads, program // heads // blocks
    first, local = (program // heads % blocks * TOKENS).to(tl.int32), tl.arange(0, TOKENS)
    there = first + local < rows
    fq, _, tfq = _features(
        q, tq, norm, scalars, batch, head, first, local, there, rows, D, BD, UNIT, FEATURE
    )
    index = batch * heads + head
    z = _normaliser(state, index, D, DV, BD)
    inverse = 1 / (tl.sum(fq * z[None, :], 1) + eps)
    drift = tl.zeros((TOKENS,), tl.float32)
    if tq is not None:
        drift += tl.sum(tfq * z[None, :], 1)
    if tstate is not None:
        drift += tl.sum(fq * _normaliser(tstate, index, D, DV, BD)[None, :], 1)
    for column in range(0, DV, BV):
        columns = column + tl.arange(0, BV)
        s = _state(state, index, columns, D, DV, BD)
        value = _dot(fq, s, tl.zeros((TOKENS, BV), tl.float32), PRECISION) * inverse[:, None]
        _store_tile(o, value, batch, head, first, local, there, columns, DV, UNIT)
        if to is not None:
            tangent = tl.zeros((TOKENS, BV), tl.float32)
            if tq is not None:
                tangent = _dot(tfq, s, tangent, PRECISION)
            if tstate is not None:
                ts = _state(tstate, index, columns, D, DV, BD)
                tangent = _dot(fq, ts, tangent, PRECISION)
            tangent = (tangent - value * drift[:, None]) * inverse[:, None]
            _store_tile(to, tangent, batch, head, first, local, there, columns, DV, UNIT)


@triton.jit
def queries_kernel(
    go, q, norm, scalars, state, gq, factors, heads, rows, eps,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr,
    FEATURE: tl.constexpr, PRECISION: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """gφ(q) = g_n Sᵀ of a block of queries; g_n = [f₀ g, f₁] with its factors 1 / (n_1 + ε) and
    −g·o / (n_1 + ε), which it leaves to the sum gS = φ(q)ᵀ g_n.
    """
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(rows, TOKENS)
    head, batch = program % heads, program // heads // blocks
    first, local = (program // heads % blocks * TOKENS).to(tl.int32), tl.arange(0, TOKENS)
    there = first + local < rows
    fq, slope, _ = _features(
        q, None, norm, scalars, batch, head, first, local, there, rows, D, BD, UNIT, FEATURE
    )
    index = batch * heads + head
    z = _normaliser(state, index, D, DV, BD)
    inverse = 1 / (tl.sum(fq * z[None, :], 1) + eps)
    along = tl.zeros((TOKENS,), tl.float32)
    grad = tl.zeros((TOKENS, BD), tl.float32)
    for column in range(0, DV, BV):
        columns = column + tl.arange(0, BV)
        s = _state(state, index, columns, D, DV, BD)
        g = _tile(go, batch, head, first, local, there, columns, DV, UNIT) * inverse[:, None]
        along += tl.sum(g * _dot(fq, s, tl.zeros((TOKENS, BV), tl.float32), PRECISION), 1)
        grad = _dot(g, tl.trans(s), grad, PRECISION)
    g_1 = -along * inverse
    grad = (grad + g_1[:, None] * z[None, :]) * slope
    _store_tile(gq, grad, batch, head, first, local, there, tl.arange(0, BD), D, UNIT)
    at = factors + (index * rows + first + local) * 2
    tl.store(at, inverse, there)
    tl.store(at + 1, g_1, there)


@triton.jit
def keys_kernel(
    k, v, norm, scalars, state, gk, gv, heads, rows,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr,
    FEATURE: tl.constexpr, PRECISION: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """gφ(k) = [v, 1] gSᵀ and gv = (φ(k) gS)_v of a block of keys; the state here is gS."""
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(rows, TOKENS)
    head, batch = program % heads, program // heads // blocks
    first, local = (program // heads % blocks * TOKENS).to(tl.int32), tl.arange(0, TOKENS)
    there = first + local < rows
    fk, slope, _ = _features(
        k, None, norm, scalars, batch, head, first, local, there, rows, D, BD, UNIT, FEATURE
    )
    index = batch * heads + head
    grad = tl.zeros((TOKENS, BD), tl.float32) + _normaliser(state, index, D, DV, BD)[None, :]
    for column in range(0, DV, BV):
        columns = column + tl.arange(0, BV)
        gs = _state(state, index, columns, D, DV, BD)
        value = _tile(v, batch, head, first, local, there, columns, DV, UNIT)
        grad = _dot(value, tl.trans(gs), grad, PRECISION)
        value = _dot(fk, gs, tl.zeros((TOKENS, BV), tl.float32), PRECISION)
        _store_tile(gv, value, batch, head, first, local, there, columns, DV, UNIT)
    _store_tile(gk, grad * slope, batch, head, first, local, there, tl.arange(0, BD), D, UNIT)
