"""The Triton kernels of linear_attention; their launches are next door.

One gathers S from the keys, one gives it to the queries; backward is the same in turn: queries, gS,
keys. The normaliser's column of S is a vector of its own.

φ(q) and φ(k) exist in registers only, as factors: relu(w r x) is r relu(± x) |w|, because r > 0, so
a scalar for each token, a tile that is exact in the dtype of x, and one for each column, which the
state takes. The same with its tangent, φ′ x̂˙ = r (φ′ (± ẋ) − d relu(± x)) |w| with d = r² m.
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
    x, tx, scalars, batches, rows, eps, ALL: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    UNIT: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """r = (mean x² + ε)^−½ and m = mean(x ẋ) of tokens over ALL heads, HEADS at once.

    The last ones come first: the kernel after this one begins with those that are still in L2.
    """
    token = (tl.num_programs(0) - 1 - tl.program_id(0)) * TOKENS + tl.arange(0, TOKENS)
    there, j = token < batches * rows, tl.arange(0, HEADS * BD)
    batch, row = (token // rows).to(tl.int64)[:, None], (token % rows).to(tl.int64)[:, None]
    squares = tl.zeros((TOKENS, HEADS * BD), tl.float32)
    mixed = tl.zeros((TOKENS, HEADS * BD), tl.float32)
    for first in tl.static_range(0, ALL, HEADS):
        h, c = (first + j // BD).to(tl.int64)[None, :], (j % BD)[None, :]
        mask = there[:, None] & (h < ALL) & (c < D)
        at = x.pointer + (batch * x.batch + row * x.row + h * x.head) * UNIT + c
        value = tl.load(at, mask, other=0.0).to(tl.float32)
        squares += value * value
        if tx is not None:
            at = tx.pointer + (batch * tx.batch + row * tx.row + h * tx.head) * UNIT + c
            mixed += value * tl.load(at, mask, other=0.0).to(tl.float32)
    at = scalars + token.to(tl.int64) * 2
    tl.store(at, tl.rsqrt(tl.sum(squares, 1) / (ALL * D) + eps), there)
    if tx is not None:
        tl.store(at + 1, tl.sum(mixed, 1) / (ALL * D), there)


@triton.jit
def _place(heads, rows, span):
    """Batch and head of a program, their index, its first token and the one after its last.

    All heads of some tokens follow each other, as they do in memory. No tokens are one part, too.
    """
    parts, program = tl.maximum(tl.cdiv(rows, span), 1), tl.program_id(0)
    head, begin = (program % heads).to(tl.int64), program // heads % parts * span
    batch = (program // heads // parts).to(tl.int64)
    return batch, head, batch * heads + head, begin, tl.minimum(begin + span, rows)


@triton.jit
def _at(x, batch, head, first, local, columns, UNIT: tl.constexpr):
    base = x.pointer + (batch * x.batch + head * x.head + tl.cast(first, tl.int64) * x.row) * UNIT
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
def _weights(norm, head, D: tl.constexpr, BD: tl.constexpr):
    w = tl.full((BD,), 1.0, tl.float32)
    if norm is not None:
        c = tl.arange(0, BD)
        w = tl.load(norm.weight + head * norm.step + c, c < D, other=0.0).to(tl.float32)
    return w


@triton.jit
def _scale(w, FEATURE: tl.constexpr):
    """What the state takes of a column: φ(x̂) = r y · scale."""
    if FEATURE == "relu":
        w = tl.abs(w)
    if FEATURE == "elu+1":
        w = tl.full(w.shape, 1.0, tl.float32)
    return w


@triton.jit
def _factors(
    x, tx, norm, w, scalars, batch, head, first, local, there, rows,
    D: tl.constexpr, BD: tl.constexpr, UNIT: tl.constexpr, FEATURE: tl.constexpr,
):  # fmt: skip
    """y, ẏ, r and d of a tile: φ(x̂) = r y · scale and φ′ x̂˙ = r (ẏ − d y) · scale.

    y and ẏ hold numbers of the dtype of x, but for elu + 1, where r = 1 and d = 0. They are zero
    in rows not there.
    """
    c = tl.arange(0, BD)
    y = _tile(x, batch, head, first, local, there, c, D, UNIT)
    ty = tl.zeros(y.shape, tl.float32)
    if tx is not None:
        ty = _tile(tx, batch, head, first, local, there, c, D, UNIT)
    r, d = tl.full(local.shape, 1.0, tl.float32), tl.zeros(local.shape, tl.float32)
    if norm is not None:
        if scalars is None:
            r = tl.rsqrt(tl.sum(y * y, 1) / D + norm.eps)
            if tx is not None:
                d = r * r * (tl.sum(y * ty, 1) / D)
        else:
            at = scalars + (batch * rows + first + local) * 2
            r = tl.load(at, there, other=0.0)
            if tx is not None:
                d = r * r * tl.load(at + 1, there, other=0.0)
    if FEATURE == "relu":
        sign = tl.where(w < 0, -1.0, 1.0)[None, :]
        y *= sign
        ty = tl.where(y > 0, ty * sign, 0.0)
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if FEATURE == "elu+1":
        ty = w[None, :] * r[:, None] * (ty - d[:, None] * y)
        y *= w[None, :] * r[:, None]
        slope = tl.exp(tl.where(y > 0, 0.0, y))
        y = tl.where(there[:, None], tl.where(y > 0, y + 1, slope), 0.0)  # φ(0) = 1
        ty *= slope
        r, d = tl.full(r.shape, 1.0, tl.float32), tl.zeros(d.shape, tl.float32)
    return y, ty, r, d


@triton.jit
def _slope(y, scale, FEATURE: tl.constexpr):
    """φ′, from φ(x̂) = r y · scale."""
    slope = tl.full(y.shape, 1.0, tl.float32)
    if FEATURE == "relu":
        slope = tl.where((y > 0) & (scale != 0)[None, :], 1.0, 0.0)
    if FEATURE == "elu+1":
        slope = tl.where(y < 1, y, 1.0)
    return slope


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
    state, value, z, scale, index, block, columns,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BD)
    at = state + (index * D + d[:, None]) * (DV + 1) + columns[None, :]
    tl.store(at, scale[:, None] * value, (d < D)[:, None] & (columns < DV)[None, :])
    if block == 0:
        tl.store(state + (index * D + d) * (DV + 1) + DV, scale * tl.max(z, 1), d < D)


@triton.jit
def _high(x):
    """The upper 8 digits of a number of fp32: one of bf16, cut off and not rounded."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _dot(a, b, total, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """total + a b. With EXACT, a is exact in bf16, and b the sum of three numbers of bf16."""
    if not EXACT:
        return tl.dot(a, b, total, input_precision=PRECISION)
    a = _narrow(a, PRECISION)
    for part in tl.static_range(3):
        high = _high(b) if part < 2 else b
        total = tl.dot(a, _narrow(high, PRECISION), total)
        b -= high
    return total


@triton.jit
def _dot_sum(a, b, total, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """total + a b. With EXACT, b is exact in bf16, and a the sum of three numbers of bf16."""
    if not EXACT:
        return tl.dot(a, b, total, input_precision=PRECISION)
    b = _narrow(b, PRECISION)
    for part in tl.static_range(3):
        high = _high(a) if part < 2 else a
        total = tl.dot(_narrow(high, PRECISION), b, total)
        a -= high
    return total


@triton.jit
def _narrow(x, PRECISION: tl.constexpr):
    """x in bf16, and back in fp32 for the interpreter, which cannot multiply it."""
    x = x.to(tl.bfloat16)
    return x if PRECISION == "bf16" else x.to(tl.float32)


@triton.jit
def _dot_column(a, b, total, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """total + a b of a vector b, beside itself as often as total has columns, eight at least."""
    return _dot(
        a, tl.broadcast_to(b[:, None], (b.shape[0], total.shape[1])), total, EXACT, PRECISION
    )


@triton.jit
def _along(a, b, COPIES: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """a b of a vector b, wide ones without tensor cores, whose factors would not fit registers.

    With as many copies of b as S has columns, both products read a in one layout.
    """
    if a.shape[1] > 64:
        return tl.sum(a * b[None, :], 1)
    none = tl.zeros((a.shape[0], COPIES), tl.float32)
    return tl.max(_dot_column(a, b, none, EXACT, PRECISION), 1)


@triton.jit
def state_kernel(
    k, v, tk, tv, norm, scalars, factors, state, tstate, states, heads, rows, span,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr,
    FEATURE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """S = φ(k)ᵀ[v, 1] and its tangent over `span` tokens; parts of all `states` follow each other.
    The second axis takes columns of v.

    With `factors` f, a pair for each token, it is φ(k)ᵀ[f₀ v, f₁]; r is in them already.
    Otherwise v goes from memory to tensor cores as it is.
    """
    block = tl.program_id(1)
    batch, head, index, begin, end = _place(heads, rows, span)
    w, local = _weights(norm, head, D, BD), tl.arange(0, TOKENS)
    columns = block * BV + tl.arange(0, BV)
    total, z = tl.zeros((BD, BV), tl.float32), tl.zeros((BD, 8), tl.float32)
    ttotal, tz = tl.zeros((BD, BV), tl.float32), tl.zeros((BD, 8), tl.float32)
    ones = tl.full((TOKENS, 8), 1.0, tl.float32)
    for first in range(begin, end, TOKENS):
        there = first + local < rows
        y, ty, r, d = _factors(
            k, tk, norm, w, scalars, batch, head, first, local, there, rows, D, BD, UNIT, FEATURE
        )
        value = _tile(v, batch, head, first, local, there, columns, DV, UNIT)
        if factors is not None:
            at = factors + (index * rows + first + local) * 2
            f_0, f_1 = tl.load(at, there, other=0.0), tl.load(at + 1, there, other=0.0)
            total = _dot(tl.trans(y), f_0[:, None] * value, total, EXACT, PRECISION)
            z = _dot_column(tl.trans(y), f_1, z, EXACT, PRECISION)
        else:
            phi = tl.trans(r[:, None] * y)
            total = _dot_sum(phi, value, total, EXACT, PRECISION)
            z = _dot_sum(phi, ones, z, EXACT, PRECISION)
        if tk is not None:
            tphi = tl.trans(r[:, None] * (ty - d[:, None] * y))
            ttotal = _dot_sum(tphi, value, ttotal, EXACT, PRECISION)
            tz = _dot_sum(tphi, ones, tz, EXACT, PRECISION)
        if tv is not None:
            moved = _tile(tv, batch, head, first, local, there, columns, DV, UNIT)
            ttotal = _dot_sum(phi, moved, ttotal, EXACT, PRECISION)
    scale, index = _scale(w, FEATURE), index + (begin // span).to(tl.int64) * states
    _store_state(state, total, z, scale, index, block, columns, D, DV, BD)
    if tstate is not None:
        _store_state(tstate, ttotal, tz, scale, index, block, columns, D, DV, BD)


@triton.jit
def sum_kernel(
    parts, total, tparts, ttotal, splits, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum of a state's parts, all read at once, and beside it of its tangent's."""
    if tl.program_id(1) == 1:
        parts, total = tparts, ttotal
    i, split = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, SPLITS)[:, None]
    there = (i < size)[None, :] & (split < splits)
    part = tl.load(parts + split * size + i[None, :], there, other=0.0)
    tl.store(total + i, tl.sum(part, 0), i < size)


@triton.jit
def output_kernel(
    q, tq, norm, scalars, state, tstate, o, to, heads, rows, span, eps,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr,
    FEATURE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, TOKENS: tl.constexpr,
    COPIES: tl.constexpr,
):  # fmt: skip
    """o = n_v / (n_1 + ε) with n = φ(q) S, and its tangent, of `span` queries.

    What d leaves of ṅ_v − o ṅ_1 is −d (n_v − o n_1) = −d ε o.
    """
    batch, head, index, begin, end = _place(heads, rows, span)
    w, local = _weights(norm, head, D, BD), tl.arange(0, TOKENS)
    scale, columns = _scale(w, FEATURE), tl.arange(0, BV)
    z = scale * _normaliser(state, index, D, DV, BD)
    s = scale[:, None] * _state(state, index, columns, D, DV, BD)
    if tstate is not None:
        tz = scale * _normaliser(tstate, index, D, DV, BD)
        ts = scale[:, None] * _state(tstate, index, columns, D, DV, BD)
    for first in range(begin, end, TOKENS):
        there = first + local < rows
        y, ty, r, d = _factors(
            q, tq, norm, w, scalars, batch, head, first, local, there, rows, D, BD, UNIT, FEATURE
        )
        inverse = 1 / (r * _along(y, z, COPIES, EXACT, PRECISION) + eps)
        drift = d * eps
        if tq is not None:
            drift += r * _along(ty, z, COPIES, EXACT, PRECISION)
        if tstate is not None:
            drift += r * _along(y, tz, COPIES, EXACT, PRECISION)
        for column in range(0, DV, BV):
            columns = column + tl.arange(0, BV)
            if DV > BV:
                s = scale[:, None] * _state(state, index, columns, D, DV, BD)
            zero = tl.zeros((TOKENS, BV), tl.float32)
            value = _dot(y, s, zero, EXACT, PRECISION) * (r * inverse)[:, None]
            _store_tile(o, value, batch, head, first, local, there, columns, DV, UNIT)
            if to is not None:
                tangent = zero
                if tq is not None:
                    tangent = _dot(ty, s, tangent, EXACT, PRECISION)
                if tstate is not None:
                    if DV > BV:
                        ts = scale[:, None] * _state(tstate, index, columns, D, DV, BD)
                    tangent = _dot(y, ts, tangent, EXACT, PRECISION)
                tangent = (r[:, None] * tangent - value * drift[:, None]) * inverse[:, None]
                _store_tile(to, tangent, batch, head, first, local, there, columns, DV, UNIT)


@triton.jit
def queries_kernel(
    go, q, norm, scalars, state, gq, factors, heads, rows, span, eps,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr,
    FEATURE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, TOKENS: tl.constexpr,
    COPIES: tl.constexpr,
):  # fmt: skip
    """gφ(q) = g_n Sᵀ of `span` queries; g_n = [f₀ g, f₁] with its factors 1 / (n_1 + ε) and
    −g·o / (n_1 + ε), which it leaves, each times r, to the sum gS = φ(q)ᵀ g_n. As g·n_v is
    φ(q)·(g Sᵀ), one product gives both.
    """
    batch, head, index, begin, end = _place(heads, rows, span)
    w, local = _weights(norm, head, D, BD), tl.arange(0, TOKENS)
    scale, z = _scale(w, FEATURE), _normaliser(state, index, D, DV, BD)
    s = tl.trans(_state(state, index, tl.arange(0, BV), D, DV, BD))
    for first in range(begin, end, TOKENS):
        there = first + local < rows
        y, _, r, _ = _factors(
            q, None, norm, w, scalars, batch, head, first, local, there, rows, D, BD, UNIT, FEATURE
        )
        if EXACT:
            n_1 = r * _along(y, scale * z, COPIES, EXACT, PRECISION)
        else:  # two halves have fewer digits than a sum
            n_1 = r * tl.sum(y * (scale * z)[None, :], 1)
        inverse = 1 / (n_1 + eps)
        grad = tl.zeros((TOKENS, BD), tl.float32)
        for column in range(0, DV, BV):
            columns = column + tl.arange(0, BV)
            if DV > BV:
                s = tl.trans(_state(state, index, columns, D, DV, BD))
            g = _tile(go, batch, head, first, local, there, columns, DV, UNIT)
            grad = _dot(g, s, grad, EXACT, PRECISION)
        grad *= inverse[:, None]
        g_1 = -r * tl.sum(y * scale[None, :] * grad, 1) * inverse
        grad = (grad + g_1[:, None] * z[None, :]) * _slope(y, scale, FEATURE)
        _store_tile(gq, grad, batch, head, first, local, there, tl.arange(0, BD), D, UNIT)
        at = factors + (index * rows + first + local) * 2
        tl.store(at, r * inverse, there)
        tl.store(at + 1, r * g_1, there)


@triton.jit
def keys_kernel(
    k, v, norm, scalars, state, gk, gv, heads, rows, span,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr,
    FEATURE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """gφ(k) = [v, 1] gSᵀ and gv = (φ(k) gS)_v of `span` keys; the state here is gS."""
    batch, head, index, begin, end = _place(heads, rows, span)
    w, local = _weights(norm, head, D, BD), tl.arange(0, TOKENS)
    scale, z = _scale(w, FEATURE), _normaliser(state, index, D, DV, BD)
    gs = _state(state, index, tl.arange(0, BV), D, DV, BD)
    for first in range(begin, end, TOKENS):
        there = first + local < rows
        y, _, r, _ = _factors(
            k, None, norm, w, scalars, batch, head, first, local, there, rows, D, BD, UNIT, FEATURE
        )
        grad = tl.zeros((TOKENS, BD), tl.float32)
        for column in range(0, DV, BV):
            columns = column + tl.arange(0, BV)
            if DV > BV:
                gs = _state(state, index, columns, D, DV, BD)
            zero = tl.zeros((TOKENS, BV), tl.float32)
            value = _dot(y, scale[:, None] * gs, zero, EXACT, PRECISION) * r[:, None]
            _store_tile(gv, value, batch, head, first, local, there, columns, DV, UNIT)
            value = _tile(v, batch, head, first, local, there, columns, DV, UNIT)
            grad = _dot(value, tl.trans(gs), grad, EXACT, PRECISION)
        grad = (grad + z[None, :]) * _slope(y, scale, FEATURE)
        _store_tile(gk, grad, batch, head, first, local, there, tl.arange(0, BD), D, UNIT)
