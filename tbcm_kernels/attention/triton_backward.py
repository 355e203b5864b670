"""Backward kernels of attention, also through the tangent; deterministic, without atomics.

One kernel walks the queries for a block of keys and one the keys for a block of queries. Each makes
P, dS and, with a tangent, dṠ again: 4 + 3 GEMMs per tile, 12 + 9 through the tangent.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tbcm_kernels.attention.triton_tiles import (
    LOG2E,
    again,
    hidden,
    inner,
    outer,
    store_tile,
    tile,
    zeros,
)


@triton.jit
def rows_kernel(
    go, glse, gto, gmu, o, to, a, d, heads, queries,
    DV: tl.constexpr, V_CHUNKS: tl.constexpr, UNIT: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Row scalars a = H·O − η and d = G·O + H·Ȯ − γ."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(queries, BM)
    head, batch = program // blocks % heads, program // blocks // heads
    first, local = program % blocks * BM, tl.arange(0, BM)
    there = first + local < queries
    at = (batch * heads + head) * queries + first + local
    first_sum = tl.zeros((BM,), tl.float32)
    if glse is not None:
        first_sum -= tl.load(glse + at, there, other=0.0).to(tl.float32)
    tangent_sum = tl.zeros((BM,), tl.float32)
    if gmu is not None:
        tangent_sum -= tl.load(gmu + at, there, other=0.0).to(tl.float32)
    if go is not None or gto is not None:
        o_tile = tile(o, 0, batch, head, first, local, there, DV, V_CHUNKS, UNIT)
    if go is not None:
        g_tile = tile(go, 0, batch, head, first, local, there, DV, V_CHUNKS, UNIT)
        first_sum += _row_dot(g_tile, o_tile)
    if gto is not None:
        h_tile = tile(gto, 0, batch, head, first, local, there, DV, V_CHUNKS, UNIT)
        to_tile = tile(to, 0, batch, head, first, local, there, DV, V_CHUNKS, UNIT)
        first_sum += _row_dot(h_tile, to_tile)
        tangent_sum += _row_dot(h_tile, o_tile)
    tl.store(d + at, first_sum, there)
    if a is not None:
        tl.store(a + at, tangent_sum, there)


@triton.jit
def _row_dot(x, y):
    total = tl.sum(x[0].to(tl.float32) * y[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(x)):
        total += tl.sum(x[i].to(tl.float32) * y[i].to(tl.float32), 1)
    return total


@triton.jit
def _keys_sweep(
    state, begin, end, k_tile, v_tile, tk_tile, tv_tile, q, tq, go, gto, lse, mu, a, d,
    mask, seen, columns, batch, kv_head, heads, queries, keys, scale, causal, SHARE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, CHUNKS: tl.constexpr, V_CHUNKS: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Sums over the query blocks [begin, end), on transposed tiles: Pᵀ is a first factor as it is.

    Rows beyond the last query are zeros with zero cotangents and scalars: they add nothing. One
    loop runs over the blocks of all heads: a loop around this one would cost 70 registers.
    """
    gk, gv, gtk, gtv = state
    GK: tl.constexpr = len(gk) > 0
    GV: tl.constexpr = len(gv) > 0
    GTK: tl.constexpr = len(gtk) > 0
    GTV: tl.constexpr = len(gtv) > 0
    local = tl.arange(0, BM)
    blocks = tl.cdiv(end - begin, BM)
    for step in range(blocks * SHARE):
        if SHARE == 1:
            head, start = kv_head, begin + step * BM
        else:
            head, start = kv_head * SHARE + step // blocks, begin + step % blocks * BM
        rows = start + local
        there = rows < queries
        at = (batch * heads + head) * queries + start
        q_tile = tile(q, 0, batch, head, start, local, there, D, CHUNKS, UNIT)
        logits = inner(k_tile, q_tile, tl.zeros((BN, BM), tl.float32), PRECISION)
        logits = hidden(
            logits * (scale * LOG2E), rows[None, :], columns[:, None], mask,
            None if seen is None else seen[:, None], batch, head, queries, keys, causal, DIAGONAL,
        )  # fmt: skip
        base = tl.load(lse + at + local, there, other=0.0)
        base = tl.where(base == -float("inf"), 0.0, base * LOG2E)
        p = tl.exp2(logits - base[None, :])
        ds = tl.zeros((BN, BM), tl.float32)
        if go is not None and (GK or GV):
            g_tile = tile(go, 0, batch, head, start, local, there, DV, V_CHUNKS, UNIT)
            if GV:
                gv = outer(p, g_tile, gv, PRECISION)
            if GK:
                ds = inner(v_tile, g_tile, ds, PRECISION)
        if a is not None:
            if gto is not None:
                h_tile = tile(gto, 0, batch, head, start, local, there, DV, V_CHUNKS, UNIT)
            if GTV:
                gtv = outer(p, h_tile, gtv, PRECISION)
            rate = tl.zeros((BN, BM), tl.float32)
            if GK or GV:
                if tq is not None:
                    tq_tile = tile(tq, 0, batch, head, start, local, there, D, CHUNKS, UNIT)
                    rate = inner(k_tile, tq_tile, rate, PRECISION)
                if tk_tile is not None:
                    rate = inner(tk_tile, q_tile, rate, PRECISION)
                rate = rate * scale - tl.load(mu + at + local, there, other=0.0)[None, :]
            if GV and gto is not None:
                gv = outer(p * rate, h_tile, gv, PRECISION)
            if GK or GTK:
                dts = tl.zeros((BN, BM), tl.float32)
                if gto is not None:
                    dts = inner(v_tile, h_tile, dts, PRECISION)
                dts -= tl.load(a + at + local, there, other=0.0)[None, :]
                if GK:
                    if tv_tile is not None:
                        ds = inner(tv_tile, h_tile, ds, PRECISION)
                    ds += dts * rate
                dts *= p
                if GK and tq is not None:
                    gk = outer(dts, tq_tile, gk, PRECISION)
                if GTK:
                    gtk = outer(dts, q_tile, gtk, PRECISION)
        if GK:
            ds = p * (ds - tl.load(d + at + local, there, other=0.0)[None, :])
            gk = outer(ds, q_tile, gk, PRECISION)
    return gk, gv, gtk, gtv


@triton.jit(do_not_specialize=["bucket"])
def keys_kernel(
    go, gto, q, k, v, tq, tk, tv, lse, mu, a, d, gk, gv, gtk, gtv, mask, key_mask,
    heads, groups, queries, keys, scale, causal, bucket,
    D: tl.constexpr, DV: tl.constexpr, CHUNKS: tl.constexpr, V_CHUNKS: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, SHARE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of k, v, tk, tv: one program per block of keys, over the heads that share it."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(keys, BN)
    kv_head, batch = program // blocks % groups, program // blocks // groups
    first, local = program % blocks * BN, tl.arange(0, BN)
    columns = (first + local).to(tl.int32)
    there = columns < keys
    seen = None
    if key_mask is not None:
        at = key_mask.pointer + batch * key_mask.batch + columns.to(tl.int64) * key_mask.column
        seen = tl.load(at, there, other=0) != 0
        there_seen = seen
    else:
        there_seen = there
    k_tile = tile(k, 0, batch, kv_head, first, local, there_seen, D, CHUNKS, UNIT)
    v_tile = tile(v, 0, batch, kv_head, first, local, there_seen, DV, V_CHUNKS, UNIT)
    tk_tile, tv_tile = None, None
    if tk is not None:
        tk_tile = tile(tk, 0, batch, kv_head, first, local, there_seen, D, CHUNKS, UNIT)
    if tv is not None:
        tv_tile = tile(tv, 0, batch, kv_head, first, local, there_seen, DV, V_CHUNKS, UNIT)
    # An accumulator for each gradient that this launch makes, and none for the others.
    state = (
        () if gk is None else zeros(BN, CHUNKS), () if gv is None else zeros(BN, V_CHUNKS),
        () if gtk is None else zeros(BN, CHUNKS), () if gtv is None else zeros(BN, V_CHUNKS),
    )  # fmt: skip
    begin, full = 0, 0
    if causal is not None:  # the first query that sees a key of this block, and one that sees all
        begin = (tl.minimum(tl.maximum(first - causal, 0), queries) // BM * BM).to(tl.int32)
        full = tl.minimum(tl.maximum(first + BN - 1 - causal, 0), queries)
        full = (tl.cdiv(full, BM) * BM).to(tl.int32)
    if causal is not None:
        state = _keys_sweep(
            state, begin, full, k_tile, v_tile, tk_tile, tv_tile, q, tq, go, gto, lse, mu, a, d,
            mask, seen, columns, batch, kv_head, heads, queries, keys, scale, causal, SHARE,
            D, DV, CHUNKS, V_CHUNKS, UNIT, PRECISION, BM, BN, True,
        )  # fmt: skip
    state = _keys_sweep(
        state, full, queries, k_tile, v_tile, tk_tile, tv_tile, q, tq, go, gto, lse, mu, a, d,
        mask, seen, columns, batch, kv_head, heads, queries, keys, scale, causal, SHARE,
        D, DV, CHUNKS, V_CHUNKS, UNIT, PRECISION, BM, BN, False,
    )  # fmt: skip
    gk_sum, gv_sum, gtk_sum, gtv_sum = state
    local = again(local, queries)
    there = first + local < keys
    _store(gk, gk_sum, scale, batch, kv_head, first, local, there, seen, D, CHUNKS, UNIT)
    _store(gv, gv_sum, 1.0, batch, kv_head, first, local, there, seen, DV, V_CHUNKS, UNIT)
    _store(gtk, gtk_sum, scale, batch, kv_head, first, local, there, seen, D, CHUNKS, UNIT)
    _store(gtv, gtv_sum, 1.0, batch, kv_head, first, local, there, seen, DV, V_CHUNKS, UNIT)


@triton.jit
def _store(
    x, chunks, factor, batch, head, first, local, there, seen,
    WIDTH: tl.constexpr, CHUNKS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """A gradient times a factor; zero in hidden rows, also where a cotangent holds NaN."""
    if x is not None:
        kept = ()
        for i in tl.static_range(len(chunks)):
            if seen is None:
                kept = kept + (chunks[i] * factor,)
            else:
                kept = kept + (tl.where(seen[:, None], chunks[i] * factor, 0.0),)
        store_tile(x, 0, batch, head, first, local, there, kept, WIDTH, CHUNKS, UNIT)


@triton.jit
def _queries_sweep(
    state, begin, end, q_tile, tq_tile, g_tile, h_tile, k, v, tk, tv, base, mean, a, d,
    mask, key_mask, rows, batch, head, kv_head, queries, keys, scale, causal,
    D: tl.constexpr, DV: tl.constexpr, CHUNKS: tl.constexpr, V_CHUNKS: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    EDGE: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Sums over the key blocks [begin, end); EDGE: some may be beyond the last key."""
    gq, gtq = state
    GQ: tl.constexpr = len(gq) > 0
    GTQ: tl.constexpr = len(gtq) > 0
    local = tl.arange(0, BN)
    for start in range(begin, end, BN):
        columns = start + local
        seen = None
        if key_mask is not None:
            at = key_mask.pointer + batch * key_mask.batch + columns.to(tl.int64) * key_mask.column
            seen = tl.load(at, columns < keys, other=0) != 0
        elif EDGE:
            seen = columns < keys
        k_tile = tile(k, 0, batch, kv_head, start, local, seen, D, CHUNKS, UNIT)
        logits = inner(q_tile, k_tile, tl.zeros((BM, BN), tl.float32), PRECISION)
        logits = hidden(
            logits * (scale * LOG2E), rows[:, None], columns[None, :], mask,
            None if seen is None else seen[None, :], batch, head, queries, keys, causal, DIAGONAL,
        )  # fmt: skip
        p = tl.exp2(logits - base[:, None])
        ds = tl.zeros((BM, BN), tl.float32)
        if g_tile is not None or h_tile is not None:
            v_tile = tile(v, 0, batch, kv_head, start, local, seen, DV, V_CHUNKS, UNIT)
        if g_tile is not None and GQ:
            ds = inner(g_tile, v_tile, ds, PRECISION)
        if a is not None:
            dts = tl.zeros((BM, BN), tl.float32)
            if h_tile is not None:
                dts = inner(h_tile, v_tile, dts, PRECISION)
            dts -= a[:, None]
            if GQ:
                if tv is not None:
                    tv_tile = tile(tv, 0, batch, kv_head, start, local, seen, DV, V_CHUNKS, UNIT)
                    ds = inner(h_tile, tv_tile, ds, PRECISION)
                rate = tl.zeros((BM, BN), tl.float32)
                if tq_tile is not None:
                    rate = inner(tq_tile, k_tile, rate, PRECISION)
                if tk is not None:
                    tk_tile = tile(tk, 0, batch, kv_head, start, local, seen, D, CHUNKS, UNIT)
                    rate = inner(q_tile, tk_tile, rate, PRECISION)
                ds += dts * (rate * scale - mean[:, None])
            dts *= p
            if GQ and tk is not None:
                gq = outer(dts, tk_tile, gq, PRECISION)
            if GTQ:
                gtq = outer(dts, k_tile, gtq, PRECISION)
        if GQ:
            gq = outer(p * (ds - d[:, None]), k_tile, gq, PRECISION)
    return gq, gtq


@triton.jit(do_not_specialize=["bucket"])
def queries_kernel(
    go, gto, q, k, v, tq, tk, tv, lse, mu, a, d, gq, gtq, mask, key_mask,
    heads, groups, queries, keys, scale, causal, bucket,
    D: tl.constexpr, DV: tl.constexpr, CHUNKS: tl.constexpr, V_CHUNKS: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of q and tq: one program per block of queries."""
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
    at = (batch * heads + head) * queries + rows
    q_tile = tile(q, 0, batch, head, first, local, there, D, CHUNKS, UNIT)
    tq_tile, g_tile, h_tile, mean, a_row = None, None, None, None, None
    if tq is not None:
        tq_tile = tile(tq, 0, batch, head, first, local, there, D, CHUNKS, UNIT)
    if go is not None:
        g_tile = tile(go, 0, batch, head, first, local, there, DV, V_CHUNKS, UNIT)
    if gto is not None:
        h_tile = tile(gto, 0, batch, head, first, local, there, DV, V_CHUNKS, UNIT)
    if a is not None:
        a_row = tl.load(a + at, there, other=0.0)
        mean = tl.load(mu + at, there, other=0.0)
    base = tl.load(lse + at, there, other=0.0)
    base = tl.where(base == -float("inf"), 0.0, base * LOG2E)
    d_row = tl.load(d + at, there, other=0.0)
    state = () if gq is None else zeros(BM, CHUNKS), () if gtq is None else zeros(BM, CHUNKS)
    full, last = keys // BN * BN, keys
    if causal is not None:
        last = tl.minimum(keys, tl.maximum(first + BM + causal, 0)).to(tl.int32)
        full = tl.minimum(full, tl.maximum(first + causal + 1, 0) // BN * BN).to(tl.int32)
    state = _queries_sweep(
        state, 0, full, q_tile, tq_tile, g_tile, h_tile, k, v, tk, tv, base, mean, a_row, d_row,
        mask, key_mask, rows, batch, head, kv_head, queries, keys, scale, causal,
        D, DV, CHUNKS, V_CHUNKS, UNIT, PRECISION, BM, BN, False, False,
    )  # fmt: skip
    state = _queries_sweep(
        state, full, last, q_tile, tq_tile, g_tile, h_tile, k, v, tk, tv, base, mean, a_row, d_row,
        mask, key_mask, rows, batch, head, kv_head, queries, keys, scale, causal,
        D, DV, CHUNKS, V_CHUNKS, UNIT, PRECISION, BM, BN, True, causal is not None,
    )  # fmt: skip
    gq_sum, gtq_sum = state
    local = again(local, queries)
    there = first + local < queries
    _store(gq, gq_sum, scale, batch, head, first, local, there, None, D, CHUNKS, UNIT)
    _store(gtq, gtq_sum, scale, batch, head, first, local, there, None, D, CHUNKS, UNIT)
