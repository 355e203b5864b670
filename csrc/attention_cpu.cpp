// CPU kernels of attention: flash-style tiles in fp32, products from gemm.h. A forward task is one
// block of queries of one head; a backward task is a share of the query blocks of one key head.
#include <memory>

#include "attention.h"

namespace tbcm::attention {
namespace {

struct Forward : Problem {
  Operand o, to;
  float *lse, *mu;  // [B, H, N] and [T, B, H, N]
};

// What a thread of the forward pass holds: a key head, packed, and the tiles of a block of queries.
struct ForwardTiles {
  float *kt, *v, *tkt, *tv;       // K', V and tangents of one head
  float *q, *tq, *s, *ts;         // queries, logits, and the latter's tangent of one lane
  float *o, *to, *top, *total, *u;  // accumulators and row statistics
  float* center;                  // of a row's rates: their mean so far
};

TBCM_INLINE int64_t forward_floats(const Forward& p, Arena* arena, ForwardTiles* t) {
  const int64_t kt = p.key_blocks() * p.q.x.width * p.span_stride(), v = p.all_keys() * p.v_stride();
  const int64_t q = QUERIES * p.q_stride(), o = QUERIES * p.v_stride(), s = QUERIES * p.span_stride();
  const Piece pieces[] = {{&t->kt, kt},
                          {&t->v, v},
                          {&t->tkt, p.k.tx ? p.lanes * kt : 0},
                          {&t->tv, p.v.tx ? p.lanes * v : 0},
                          {&t->q, q},
                          {&t->tq, p.q.tx ? p.lanes * q : 0},
                          {&t->s, s},
                          {&t->ts, s},
                          {&t->o, o},
                          {&t->to, p.lanes * o},
                          {&t->top, QUERIES},
                          {&t->total, QUERIES},
                          {&t->u, p.lanes * QUERIES},
                          {&t->center, p.lanes * QUERIES}};
  return take(arena, pieces);
}

TBCM_INLINE void pack_keys(const Forward& p, const ForwardTiles& t, int64_t b, int64_t g) {
  const int64_t kt = p.key_blocks() * p.q.x.width * p.span_stride(), v = p.all_keys() * p.v_stride();
  pack_transposed(t.kt, p, p.k, false, 0, b, g);
  pack_rows(t.v, p, p.v, false, 0, b, g);
  for (int64_t l = 0; l < p.lanes; ++l) {
    if (p.k.tx) pack_transposed(t.tkt + l * kt, p, p.k, true, l, b, g);
    if (p.v.tx) pack_rows(t.tv + l * v, p, p.v, true, l, b, g);
  }
}

// One block of queries, rows [i, i + m), against one block of keys, [j, j + n).
template <class Isa>
TBCM_INLINE void forward_block(const Forward& p, const ForwardTiles& t, int64_t b, int64_t h, int64_t i, int64_t m,
                               int64_t j, int64_t n) {
  const Isa isa;
  const int64_t width = p.q.x.width, ldq = p.q_stride(), ldv = p.v_stride(), lds = p.span_stride();
  const int64_t padded = round_up(n, LANES), dv = p.v.x.width, at = j / p.span * width * lds;
  float before[QUERIES], own[QUERIES];  // weight of the earlier blocks, and of this one
  set_product(isa, t.q, ldq, t.kt + at, lds, t.s, lds, m, padded, width);
  for (int64_t r = 0; r < m; ++r) {
    float* s = t.s + r * lds;
    rescale<typename Isa::Vector>(s, p.scale, padded);
    hide(p, s, b, h, i + r, j, n);
    const float block = greatest<typename Isa::Vector>(s, padded), top = block > t.top[r] ? block : t.top[r];
    const float shift = top == HIDDEN ? 0 : top;
    const float fade = t.top[r] == HIDDEN ? 1 : std::exp(t.top[r] - shift);  // 1: there is nothing yet
    before[r] = t.total[r] * fade;
    own[r] = exponentiate<typename Isa::Vector>(s, shift, padded);
    t.total[r] = before[r] + own[r];
    t.top[r] = top;
    if (fade == 1) continue;
    rescale<typename Isa::Vector>(t.o + r * ldv, fade, p.v.padded());
    for (int64_t l = 0; l < p.lanes; ++l) {
      rescale<typename Isa::Vector>(t.to + (l * QUERIES + r) * ldv, fade, p.v.padded());
      t.u[l * QUERIES + r] *= fade;
    }
  }
  for (int64_t l = 0; l < p.lanes; ++l) {
    float* to = t.to + l * QUERIES * ldv;
    if (p.v.tx) add_product(isa, t.s, lds, t.tv + (l * p.all_keys() + j) * ldv, ldv, to, ldv, m, dv, n);
    if (!p.q.tx && !p.k.tx) continue;
    if (p.q.tx) set_product(isa, t.tq + l * QUERIES * ldq, ldq, t.kt + at, lds, t.ts, lds, m, padded, width);
    else for (int64_t r = 0; r < m; ++r) zero(t.ts + r * lds, padded);
    if (p.k.tx) add_product(isa, t.q, ldq, t.tkt + l * p.key_blocks() * width * lds + at, lds, t.ts, lds, m, padded, width);
    for (int64_t r = 0; r < m; ++r) {
      float &center = t.center[l * QUERIES + r], &u = t.u[l * QUERIES + r];
      float *s = t.s + r * lds, *ts = t.ts + r * lds;
      if (own[r] > 0) {  // sums about the mean of blocks that have faded would be differences of large numbers
        const float mean = p.scale * moment<typename Isa::Vector>(ts, s, padded) / own[r];
        const float moved = (center - mean) * (own[r] / t.total[r]);
#pragma omp simd
        for (int64_t d = 0; d < dv; ++d) to[r * ldv + d] += moved * t.o[r * ldv + d];
        u += moved * before[r];
        center -= moved;
      }
      u += weigh<typename Isa::Vector>(ts, s, p.scale, center, padded);
    }
    add_product(isa, t.ts, lds, t.v + j * ldv, ldv, to, ldv, m, dv, n);
  }
  add_product(isa, t.s, lds, t.v + j * ldv, ldv, t.o, ldv, m, dv, n);
}

// o = acc / l, mu = u / l, to = tacc / l - mu o; a query that sees no key has l = 0 and gets zeros.
template <class Isa>
TBCM_INLINE void finish(const Forward& p, const ForwardTiles& t, int64_t b, int64_t h, int64_t n, int64_t r) {
  const int64_t ldv = p.v_stride(), row = (b * p.heads + h) * p.queries + n;
  const float inverse = t.total[r] == 0 ? 0 : 1 / t.total[r];
  float* o = t.o + r * ldv;
  rescale<typename Isa::Vector>(o, inverse, p.v.padded());
  write(p.o, p.o.offset(0, b, h, n), o, 1);
  p.lse[row] = t.top[r] + std::log(t.total[r]);
  for (int64_t l = 0; l < p.lanes; ++l) {
    const float mu = t.u[l * QUERIES + r] * inverse;
    float* to = t.to + (l * QUERIES + r) * ldv;
    for (int64_t d = 0; d < p.v.padded(); ++d) to[d] = to[d] * inverse - mu * o[d];
    write(p.to, p.to.offset(l, b, h, n), to, 1);
    p.mu[l * p.batch * p.heads * p.queries + row] = t.center[l * QUERIES + r] + mu;
  }
}

template <class Isa>
TBCM_INLINE void forward_tasks(const Forward& p, int64_t begin, int64_t end) {
  ForwardTiles t;
  Arena arena{aligned_scratch(forward_floats(p, nullptr, &t))};
  forward_floats(p, &arena, &t);
  const int64_t ldq = p.q_stride(), ldv = p.v_stride(), shared = p.heads / p.groups;
  int64_t packed = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t i = task % p.query_blocks() * QUERIES, head = task / p.query_blocks();
    const int64_t b = head / p.heads, h = head % p.heads, g = h / shared;
    if (packed != b * p.groups + g) pack_keys(p, t, b, g);
    packed = b * p.groups + g;
    const int64_t m = smaller(QUERIES, p.queries - i);
    const int64_t rows = round_up(m, 8);
    for (int64_t r = 0; r < rows; ++r) {
      read_row(t.q + r * ldq, p.q, false, 0, b, h, i + r);
      for (int64_t l = 0; l < p.lanes && p.q.tx; ++l) read_row(t.tq + (l * QUERIES + r) * ldq, p.q, true, l, b, h, i + r);
      t.top[r] = HIDDEN;
      t.total[r] = 0;
    }
    zero(t.o, rows * ldv);
    for (int64_t l = 0; l < p.lanes; ++l) zero(t.to + l * QUERIES * ldv, rows * ldv);
    zero(t.u, p.lanes * QUERIES);
    zero(t.center, p.lanes * QUERIES);
    const int64_t seen = smaller(p.last_key(b), i + m + p.causal);  // by some query of the block
    for (int64_t j = 0; j < seen; j += p.span) forward_block<Isa>(p, t, b, h, i, m, j, smaller(p.span, seen - j));
    for (int64_t r = 0; r < m; ++r) finish<Isa>(p, t, b, h, i + r, r);
  }
}

TBCM_RUN_BEST(Forward, forward_tasks)

struct Backward : Problem {
  Operand go, gto, o, to, gq, gk, gv, gtq, gtk, gtv;
  const float *lse, *mu, *glse, *gmu;
  int64_t splits;    // shares of the query blocks of a key head
  float* partial;    // gradients of keys and values of each share, where threads share a head
  TBCM_INLINE bool through() const { return gto || gmu; }
  TBCM_INLINE int64_t k_floats() const { return all_keys() * q_stride(); }
  TBCM_INLINE int64_t v_floats() const { return all_keys() * v_stride(); }
  // gk, gv, gtk and gtv of one key head, one after the other.
  TBCM_INLINE int64_t key_floats() const {
    return k_floats() + v_floats() + lanes * ((gtk ? k_floats() : 0) + (gtv ? v_floats() : 0));
  }
};

struct BackwardTiles {
  float *k, *kt, *vt, *tk, *tkt, *tvt;                 // keys, values and their tangents of one head
  float *q, *tq, *go, *gto;                            // queries and cotangents of a block
  float *s, *e, *ts, *a;                               // P; then dS; rate and dP~; A and dS~
  float *gq, *gtq, *d, *lse;                           // accumulators and row scalars
  float *shift, *mu;                                   // row scalars of each lane
  float *gk, *gv, *gtk, *gtv;                          // accumulators of the head
};

TBCM_INLINE int64_t backward_floats(const Backward& p, Arena* arena, BackwardTiles* t) {
  const int64_t lanes = p.through() ? p.lanes : 0, tk = p.k.tx ? lanes : 0, tq = p.q.tx ? lanes : 0;
  const int64_t kt = p.key_blocks() * p.q.x.width * p.span_stride(), vt = p.key_blocks() * p.v.x.width * p.span_stride();
  const int64_t q = QUERIES * p.q_stride(), o = QUERIES * p.v_stride(), s = QUERIES * p.span_stride();
  const Piece pieces[] = {{&t->k, p.k_floats()},
                          {&t->kt, kt},
                          {&t->vt, vt},
                          {&t->tk, tk * p.k_floats()},
                          {&t->tkt, tk * kt},
                          {&t->tvt, p.v.tx ? lanes * vt : 0},
                          {&t->q, q},
                          {&t->tq, tq * q},
                          {&t->go, o},
                          {&t->gto, lanes * o},
                          {&t->s, s},
                          {&t->e, s},
                          {&t->ts, s},
                          {&t->a, s},
                          {&t->gq, q},
                          {&t->gtq, tq * q},
                          {&t->d, QUERIES},
                          {&t->lse, QUERIES},
                          {&t->shift, lanes * QUERIES},
                          {&t->mu, lanes * QUERIES},
                          {&t->gk, p.partial ? 0 : smaller(p.splits, 2) * p.key_floats()}};
  return take(arena, pieces);
}

TBCM_INLINE void pack_keys(const Backward& p, const BackwardTiles& t, int64_t b, int64_t g) {
  const int64_t kt = p.key_blocks() * p.q.x.width * p.span_stride(), vt = p.key_blocks() * p.v.x.width * p.span_stride();
  pack_rows(t.k, p, p.k, false, 0, b, g);
  pack_transposed(t.kt, p, p.k, false, 0, b, g);
  pack_transposed(t.vt, p, p.v, false, 0, b, g);
  for (int64_t l = 0; p.through() && l < p.lanes; ++l) {
    if (p.k.tx) pack_rows(t.tk + l * p.k_floats(), p, p.k, true, l, b, g);
    if (p.k.tx) pack_transposed(t.tkt + l * kt, p, p.k, true, l, b, g);
    if (p.v.tx) pack_transposed(t.tvt + l * vt, p, p.v, true, l, b, g);
  }
}

// Queries and cotangents of row n, and d = G.O + H.TO - glse, shift = H.O - gmu.
TBCM_CLONES static void load_row(const Backward& p, const BackwardTiles& t, int64_t b, int64_t h, int64_t n, int64_t r) {
  const int64_t ldq = p.q_stride(), ldv = p.v_stride(), dv = p.v.x.width, row = (b * p.heads + h) * p.queries + n;
  float o[MAX_WIDTH], to[MAX_WIDTH];
  read_row(t.q + r * ldq, p.q, false, 0, b, h, n);
  read(o, p.o, p.o.offset(0, b, h, n));
  t.lse[r] = p.lse[row] == HIDDEN ? 0 : p.lse[row];
  t.d[r] = p.glse ? -p.glse[row] : 0;
  if (p.go) {
    read(t.go + r * ldv, p.go, p.go.offset(0, b, h, n));
    t.d[r] += dot(t.go + r * ldv, o, dv);
  }
  for (int64_t l = 0; p.through() && l < p.lanes; ++l) {
    const int64_t at = l * QUERIES + r, all = l * p.batch * p.heads * p.queries + row;
    if (p.q.tx) read_row(t.tq + at * ldq, p.q, true, l, b, h, n);
    t.mu[at] = p.mu[all];
    t.shift[at] = p.gmu ? -p.gmu[all] : 0;
    if (!p.gto) continue;
    read(t.gto + at * ldv, p.gto, p.gto.offset(l, b, h, n));
    read(to, p.to, p.to.offset(l, b, h, n));
    t.shift[at] += dot(t.gto + at * ldv, o, dv);
    t.d[r] += dot(t.gto + at * ldv, to, dv);
  }
}

// From P, unscaled rates ts and A: with rate = scale ts - mu, e += (A - shift) rate, ts = P rate and
// a = P (A - shift).
template <class Vector>
TBCM_INLINE void join(const float* s, float* e, float* ts, float* a, float scale, float mu, float shift, int64_t n) {
  for (int64_t j = 0; j < n; j += lanes<Vector>) {
    const Vector p = get<Vector>(s + j), rate = get<Vector>(ts + j) * scale - mu, pull = get<Vector>(a + j) - shift;
    put(e + j, get<Vector>(e + j) + pull * rate);
    put(ts + j, p * rate);
    put(a + j, p * pull);
  }
}

// e = P (e - d)
template <class Vector>
TBCM_INLINE void draw(float* e, const float* s, float d, int64_t n) {
  for (int64_t j = 0; j < n; j += lanes<Vector>) put(e + j, get<Vector>(s + j) * (get<Vector>(e + j) - d));
}

// One lane of the backward pass through the tangent on one tile; see reference.py.
template <class Isa>
TBCM_INLINE void through_tile(const Backward& p, const BackwardTiles& t, int64_t l, int64_t m, int64_t j, int64_t n) {
  const Isa isa;
  const int64_t width = p.q.x.width, ldq = p.q_stride(), ldv = p.v_stride(), lds = p.span_stride(), block = j / p.span;
  const int64_t padded = round_up(n, LANES), vd = p.v.x.width;
  const int64_t kt = p.key_blocks() * width * lds, vt = p.key_blocks() * vd * lds;
  const float *tq = t.tq + l * QUERIES * ldq, *gto = t.gto + l * QUERIES * ldv;
  if (p.q.tx) set_product(isa, tq, ldq, t.kt + block * width * lds, lds, t.ts, lds, m, padded, width);
  else for (int64_t r = 0; r < m; ++r) zero(t.ts + r * lds, padded);
  if (p.k.tx) add_product(isa, t.q, ldq, t.tkt + l * kt + block * width * lds, lds, t.ts, lds, m, padded, width);
  if (p.gto) set_product(isa, gto, ldv, t.vt + block * vd * lds, lds, t.a, lds, m, padded, vd);
  else for (int64_t r = 0; r < m; ++r) zero(t.a + r * lds, padded);
  if (p.gto && p.v.tx) add_product(isa, gto, ldv, t.tvt + l * vt + block * vd * lds, lds, t.e, lds, m, padded, vd);
  for (int64_t r = 0; r < m; ++r)
    join<typename Isa::Vector>(t.s + r * lds, t.e + r * lds, t.ts + r * lds, t.a + r * lds, p.scale, t.mu[l * QUERIES + r], t.shift[l * QUERIES + r],
         padded);
  if (p.gto) add_transposed(isa, t.ts, lds, gto, ldv, t.gv + j * ldv, ldv, n, vd, m);
  if (p.gtv) add_transposed(isa, t.s, lds, gto, ldv, t.gtv + l * p.v_floats() + j * ldv, ldv, n, vd, m);
  if (p.k.tx) add_product(isa, t.a, lds, t.tk + l * p.k_floats() + j * ldq, ldq, t.gq, ldq, m, width, n);
  if (p.q.tx) add_transposed(isa, t.a, lds, tq, ldq, t.gk + j * ldq, ldq, n, width, m);
  if (p.gtq) add_product(isa, t.a, lds, t.k + j * ldq, ldq, t.gtq + l * QUERIES * ldq, ldq, m, width, n);
  if (p.gtk) add_transposed(isa, t.a, lds, t.q, ldq, t.gtk + l * p.k_floats() + j * ldq, ldq, n, width, m);
}

template <class Isa>
TBCM_INLINE void backward_tile(const Backward& p, const BackwardTiles& t, int64_t b, int64_t h, int64_t i, int64_t m,
                               int64_t j, int64_t n) {
  const Isa isa;
  const int64_t width = p.q.x.width, ldq = p.q_stride(), ldv = p.v_stride(), lds = p.span_stride(), block = j / p.span;
  const int64_t padded = round_up(n, LANES), vd = p.v.x.width;
  set_product(isa, t.q, ldq, t.kt + block * width * lds, lds, t.s, lds, m, padded, width);
  for (int64_t r = 0; r < m; ++r) {
    rescale<typename Isa::Vector>(t.s + r * lds, p.scale, padded);
    hide(p, t.s + r * lds, b, h, i + r, j, n);
    exponentiate<typename Isa::Vector>(t.s + r * lds, t.lse[r], padded);
  }
  if (p.go) set_product(isa, t.go, ldv, t.vt + block * vd * lds, lds, t.e, lds, m, padded, vd);
  else for (int64_t r = 0; r < m; ++r) zero(t.e + r * lds, padded);
  if (p.go) add_transposed(isa, t.s, lds, t.go, ldv, t.gv + j * ldv, ldv, n, vd, m);
  for (int64_t l = 0; p.through() && l < p.lanes; ++l) through_tile<Isa>(p, t, l, m, j, n);
  for (int64_t r = 0; r < m; ++r)
    draw<typename Isa::Vector>(t.e + r * lds, t.s + r * lds, t.d[r], padded);
  add_product(isa, t.e, lds, t.k + j * ldq, ldq, t.gq, ldq, m, width, n);
  add_transposed(isa, t.e, lds, t.q, ldq, t.gk + j * ldq, ldq, n, width, m);
}

// Adds a share's gradients of keys, values and their tangents to the first one's.
TBCM_INLINE void add_share(const Backward& p, float* first, const float* share) {
  for (int64_t i = 0; i < p.key_floats(); i += LANES) put(first + i, get(first + i) + get(share + i));
}

// Writes a head's gradients of keys, values and their tangents.
TBCM_INLINE void write_keys(const Backward& p, const float* gk, int64_t b, int64_t g) {
  const float *gv = gk + p.k_floats(), *gtk = gv + p.v_floats();
  const float* gtv = gtk + (p.gtk ? p.lanes * p.k_floats() : 0);
  for (int64_t n = 0; n < p.keys; ++n) {
    write(p.gk, p.gk.offset(0, b, g, n), gk + n * p.q_stride(), p.scale);
    write(p.gv, p.gv.offset(0, b, g, n), gv + n * p.v_stride(), 1);
    for (int64_t l = 0; l < p.lanes; ++l) {
      if (p.gtk) write(p.gtk, p.gtk.offset(l, b, g, n), gtk + l * p.k_floats() + n * p.q_stride(), p.scale);
      if (p.gtv) write(p.gtv, p.gtv.offset(l, b, g, n), gtv + l * p.v_floats() + n * p.v_stride(), 1);
    }
  }
}

// A block of queries against all keys: adds to the head's gradients, writes its own.
template <class Isa>
TBCM_INLINE void backward_queries(const Backward& p, const BackwardTiles& t, int64_t b, int64_t h, int64_t i) {
  const int64_t ldq = p.q_stride(), m = smaller(QUERIES, p.queries - i);
  const int64_t lanes = p.gtq ? p.lanes : 0;
  for (int64_t r = 0; r < m; ++r) load_row(p, t, b, h, i + r, r);
  zero(t.gq, QUERIES * ldq);
  if (lanes) zero(t.gtq, lanes * QUERIES * ldq);
  const int64_t seen = smaller(p.last_key(b), i + m + p.causal);
  for (int64_t j = 0; j < seen; j += p.span) backward_tile<Isa>(p, t, b, h, i, m, j, smaller(p.span, seen - j));
  for (int64_t r = 0; r < m; ++r) {
    write(p.gq, p.gq.offset(0, b, h, i + r), t.gq + r * ldq, p.scale);
    for (int64_t l = 0; l < lanes; ++l)
      write(p.gtq, p.gtq.offset(l, b, h, i + r), t.gtq + (l * QUERIES + r) * ldq, p.scale);
  }
}

template <class Isa>
TBCM_INLINE void backward_tasks(const Backward& p, int64_t begin, int64_t end) {
  BackwardTiles t;
  Arena arena{aligned_scratch(backward_floats(p, nullptr, &t))};
  backward_floats(p, &arena, &t);
  float* const first = t.gk;  // of the head, where it is the thread's alone, and behind it another share
  const int64_t shared = p.heads / p.groups, units = shared * p.query_blocks();
  int64_t packed = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t share = task % p.splits, head = task / p.splits, b = head / p.groups, g = head % p.groups;
    if (packed != head) pack_keys(p, t, b, g);
    packed = head;
    t.gk = p.partial ? p.partial + task * p.key_floats() : first + (share > 0 ? p.key_floats() : 0);
    t.gv = t.gk + p.k_floats();
    t.gtk = t.gv + p.v_floats();
    t.gtv = t.gtk + (p.gtk ? p.lanes * p.k_floats() : 0);
    zero(t.gk, p.key_floats());
    for (int64_t unit = units * share / p.splits; unit < units * (share + 1) / p.splits; ++unit)
      backward_queries<Isa>(p, t, b, g * shared + unit / p.query_blocks(), unit % p.query_blocks() * QUERIES);
    if (p.partial) continue;
    if (share > 0) add_share(p, first, t.gk);
    if (share == p.splits - 1) write_keys(p, first, b, g);
  }
}

TBCM_RUN_BEST(Backward, backward_tasks)

void describe(Problem& p, const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& q_weight,
              const Maybe& k_weight, const Maybe& tq, const Maybe& tk, const Maybe& tv, const Maybe& mask,
              const Maybe& key_mask, double scale, int64_t causal, double q_eps, double k_eps, int64_t span) {
  for (const Maybe* t : {&tq, &tk, &tv})
    if (*t) p.lanes = (*t)->size(0);
  p.q = input(q, tq, q_weight, p.lanes, q_eps);
  p.k = input(k, tk, k_weight, p.lanes, k_eps);
  p.v = input(v, tv, Maybe{}, p.lanes, 0);
  p.scale = float(scale);
  p.k.seen = p.v.seen = pointer<const uint8_t>(key_mask);
  p.batch = q.size(0), p.heads = q.size(1), p.queries = q.size(2);
  p.groups = k.size(1), p.keys = k.size(2), p.causal = causal;
  p.span = smaller(span, round_up(p.keys, LANES));
  if (!mask) return;
  p.mask = pointer<const char>(*mask);
  p.boolean = mask->scalar_type() != torch::headeronly::ScalarType::Float;
  for (int64_t d = 0; d < 4; ++d) p.mask_strides[d] = mask->stride(d);
}

constexpr int64_t FORWARD_SPAN = 256, BACKWARD_SPAN = 64;
// Enough tasks for many cores; a constant, so that sums do not depend on the number of threads.
constexpr int64_t BACKWARD_TASKS = 32;

}  // namespace

void forward(Tensor q, Tensor k, Tensor v, Maybe q_weight, Maybe k_weight, Maybe tq, Maybe tk, Maybe tv, Maybe mask,
             Maybe key_mask, Tensor o, Tensor lse, Maybe to, Maybe mu, double scale, int64_t causal, double q_eps,
             double k_eps) {
  Forward p;
  describe(p, q, k, v, q_weight, k_weight, tq, tk, tv, mask, key_mask, scale, causal, q_eps, k_eps, FORWARD_SPAN);
  p.o = operand(o), p.to = operand(to);
  p.lse = pointer<float>(lse), p.mu = pointer<float>(mu);
  parallel(p.batch * p.heads * p.query_blocks(), QUERIES * p.keys * 4, [&](int64_t a, int64_t z) { run(p, a, z); });
}

void backward(Maybe go, Maybe glse, Maybe gto, Maybe gmu, Tensor q, Tensor k, Tensor v, Maybe q_weight, Maybe k_weight,
              Maybe tq, Maybe tk, Maybe tv, Tensor o, Tensor lse, Maybe to, Maybe mu, Maybe mask, Maybe key_mask,
              Tensor gq, Tensor gk, Tensor gv, Maybe gtq, Maybe gtk, Maybe gtv, double scale, int64_t causal,
              double q_eps, double k_eps) {
  Backward p;
  describe(p, q, k, v, q_weight, k_weight, tq, tk, tv, mask, key_mask, scale, causal, q_eps, k_eps, BACKWARD_SPAN);
  p.go = operand(go), p.gto = operand(gto), p.o = operand(o), p.to = operand(to);
  p.gq = operand(gq), p.gk = operand(gk), p.gv = operand(gv);
  p.gtq = operand(gtq), p.gtk = operand(gtk), p.gtv = operand(gtv);
  p.lse = pointer<const float>(lse), p.mu = pointer<const float>(mu);
  p.glse = pointer<const float>(glse), p.gmu = pointer<const float>(gmu);
  const int64_t heads = p.batch * p.groups, units = p.groups ? p.heads / p.groups * p.query_blocks() : 0;
  if (heads == 0) return;
  p.splits = smaller((BACKWARD_TASKS + heads - 1) / heads, units > 0 ? units : 1);
  // Where heads alone keep the threads busy, a thread adds up the shares of its own as it goes, in the same order.
  const int64_t threads = torch::stable::get_num_threads(), busiest = (heads + threads - 1) / threads;
  const bool whole = p.splits == 1 || 4 * busiest * threads <= 5 * heads;
  const std::unique_ptr<float[]> partial(whole ? nullptr : new float[heads * p.splits * p.key_floats()]);
  p.partial = partial.get();
  const int64_t unit = whole ? p.splits : 1;  // of tasks
  parallel(heads * p.splits / unit, unit * QUERIES * p.keys * 4, [&](int64_t a, int64_t z) { run(p, a * unit, z * unit); });
  if (whole) return;
  parallel(heads, p.splits * p.key_floats(), [&](int64_t a, int64_t z) {
    for (int64_t head = a; head < z; ++head) {
      float* const first = p.partial + head * p.splits * p.key_floats();
      for (int64_t share = 1; share < p.splits; ++share) add_share(p, first, first + share * p.key_floats());
      write_keys(p, first, head / p.groups, head % p.groups);
    }
  });
}

}  // namespace tbcm::attention
