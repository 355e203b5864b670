// CPU kernels of linear_attention: a task is one head of one sample, tiles of tokens in fp32, products
// from gemm.h. The ones of v' = [v, 1] are a column of the tiles, so that the normaliser is one, too.
#include "operands.h"

namespace tbcm::linear_attention {
namespace {

constexpr int64_t TOKENS = 64;
enum class Feature { relu, elu, identity };

// x = phi(x), slope = phi'(x), for n features.
template <class Vector>
TBCM_INLINE void apply(Feature feature, float* x, float* slope, int64_t n) {
  constexpr int64_t step = sizeof(Vector) / sizeof(float);
  for (int64_t d = 0; d < n; d += step) {
    const Vector v = get<Vector>(x + d), one = Vector{} + 1.f;
    if (feature == Feature::relu) {
      put(x + d, v < 0 ? Vector{} : v);  // a NaN stays one
      put(slope + d, v > 0 ? one : Vector{});
    } else if (feature == Feature::elu) {
      const Vector e = exponential(v > 0 ? Vector{} : v);
      put(x + d, v > 0 ? v + 1.f : e);
      put(slope + d, e);
    } else {
      put(slope + d, one);
    }
  }
}

struct Problem {
  Input q, k, v;
  Feature feature;
  float eps;
  int64_t batch = 0, heads = 0;
  TBCM_INLINE int64_t width() const { return q.x.width; }
  TBCM_INLINE int64_t columns() const { return v.x.width + 1; }
  TBCM_INLINE int64_t ldq() const { return tile_stride(width()); }
  TBCM_INLINE int64_t ldv() const { return tile_stride(columns()); }
};

// Row n of [v, 1], or of [tv, 0].
TBCM_INLINE void value(const Problem& p, float* dst, bool moving, int64_t b, int64_t h, int64_t n) {
  if (moving) p.v.tangent(dst, 0, b, h, n);
  else p.v.primal(dst, b, h, n);
  for (int64_t d = p.columns(); d < round_up(p.columns(), LANES); ++d) dst[d] = 0;
  dst[p.columns() - 1] = moving ? 0.f : 1.f;
}

// Row n of phi(x) and of phi'(x), and of phi'(x) tx where there is a tangent.
template <class Vector>
TBCM_INLINE void feature_row(const Problem& p, const Input& in, float* x, float* slope, float* tx, int64_t b, int64_t h,
                             int64_t n) {
  in.primal(x, b, h, n);
  apply<Vector>(p.feature, x, slope, in.padded());
  if (!in.tx) return;
  in.tangent(tx, 0, b, h, n);
  for (int64_t d = 0; d < in.padded(); ++d) tx[d] *= slope[d];
}

struct Forward : Problem {
  Operand o, to;
  float* state;  // [B, H, D, Dv + 1]
};

struct ForwardTiles {
  float *x, *tx, *slope;       // features of a tile of tokens, and their tangents
  float *v, *tv;               // [v, 1] and [tv, 0]; then n and its tangent
  float *state, *tstate;
};

TBCM_INLINE int64_t forward_floats(const Forward& p, Arena* arena, ForwardTiles* t) {
  const int64_t x = TOKENS * p.ldq(), v = TOKENS * p.ldv(), state = round_up(p.width(), 8) * p.ldv();
  const Piece pieces[] = {{&t->x, x}, {&t->tx, x},         {&t->slope, p.ldq()}, {&t->v, v},
                          {&t->tv, v}, {&t->state, state}, {&t->tstate, state}};
  return take(arena, pieces);
}

// S = phi(k)' v' and its tangent, over all keys.
template <class Isa>
TBCM_INLINE void gather(const Forward& p, const ForwardTiles& t, int64_t b, int64_t h) {
  const Isa isa;
  const int64_t width = p.width(), columns = p.columns(), ldq = p.ldq(), ldv = p.ldv();
  zero(t.state, round_up(width, 8) * ldv);
  zero(t.tstate, round_up(width, 8) * ldv);
  for (int64_t i = 0; i < p.k.tokens; i += TOKENS) {
    const int64_t m = smaller(TOKENS, p.k.tokens - i);
    for (int64_t r = 0; r < m; ++r) {
      feature_row<typename Isa::Vector>(p, p.k, t.x + r * ldq, t.slope, t.tx + r * ldq, b, h, i + r);
      value(p, t.v + r * ldv, false, b, h, i + r);
      if (p.v.tx) value(p, t.tv + r * ldv, true, b, h, i + r);
    }
    add_transposed(isa, t.x, ldq, t.v, ldv, t.state, ldv, width, columns, m);
    if (p.k.tx) add_transposed(isa, t.tx, ldq, t.v, ldv, t.tstate, ldv, width, columns, m);
    if (p.v.tx) add_transposed(isa, t.x, ldq, t.tv, ldv, t.tstate, ldv, width, columns, m);
  }
}

template <class Isa>
TBCM_INLINE void forward_tasks(const Forward& p, int64_t begin, int64_t end) {
  const Isa isa;
  ForwardTiles t;
  Arena arena{Arena::begin(forward_floats(p, nullptr, &t))};
  forward_floats(p, &arena, &t);
  const int64_t width = p.width(), columns = p.columns(), ldq = p.ldq(), ldv = p.ldv();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / p.heads, h = task % p.heads;
    gather<Isa>(p, t, b, h);
    for (int64_t d = 0; d < width; ++d) std::memcpy(p.state + (task * width + d) * columns, t.state + d * ldv, columns * sizeof(float));
    for (int64_t i = 0; i < p.q.tokens; i += TOKENS) {
      const int64_t m = smaller(TOKENS, p.q.tokens - i);
      for (int64_t r = 0; r < m; ++r)
        feature_row<typename Isa::Vector>(p, p.q, t.x + r * ldq, t.slope, t.tx + r * ldq, b, h, i + r);
      set_product(isa, t.x, ldq, t.state, ldv, t.v, ldv, m, columns, width);
      if (p.to) set_product(isa, t.x, ldq, t.tstate, ldv, t.tv, ldv, m, columns, width);
      if (p.q.tx) add_product(isa, t.tx, ldq, t.state, ldv, t.tv, ldv, m, columns, width);
      for (int64_t r = 0; r < m; ++r) {  // o = n_v / (n_1 + eps), to = (tn_v - o tn_1) / (n_1 + eps)
        float *n = t.v + r * ldv, *tn = t.tv + r * ldv;
        const float inverse = 1.f / (n[columns - 1] + p.eps), drift = p.to ? tn[columns - 1] : 0.f;
        for (int64_t d = 0; d < columns; ++d) n[d] *= inverse;
        write(p.o, p.o.offset(0, b, h, i + r), n, 1);
        if (!p.to) continue;
        for (int64_t d = 0; d < columns; ++d) tn[d] -= n[d] * drift;
        write(p.to, p.to.offset(0, b, h, i + r), tn, inverse);
      }
    }
  }
  trim_scratch();
}

TBCM_RUN_BEST(Forward, forward_tasks)

struct Backward : Problem {
  Operand go, gq, gk, gv;
  const float* state;
};

struct BackwardTiles {
  float *x, *slope, *gx;          // features of a tile of tokens, their slopes and gradients
  float *v, *n;                   // [v, 1] or g_n; n or gv
  float *state, *turned, *gstate;  // S, a transposed state, gS
};

TBCM_INLINE int64_t backward_floats(const Backward& p, Arena* arena, BackwardTiles* t) {
  const int64_t x = TOKENS * p.ldq(), v = TOKENS * p.ldv(), state = round_up(p.width(), 8) * p.ldv();
  const Piece pieces[] = {{&t->x, x}, {&t->slope, x},     {&t->gx, x},      {&t->v, v},
                          {&t->n, v}, {&t->state, state}, {&t->turned, p.columns() * p.ldq()}, {&t->gstate, state}};
  return take(arena, pieces);
}

TBCM_INLINE void turn(const Problem& p, float* to, const float* from) {
  for (int64_t d = 0; d < p.width(); ++d)
    for (int64_t c = 0; c < p.columns(); ++c) to[c * p.ldq() + d] = from[d * p.ldv() + c];
}

// The gradient of normalised tokens: gphi phi'(x).
TBCM_INLINE void write_gradient(const Problem& p, const BackwardTiles& t, const Operand& out, int64_t b, int64_t h, int64_t i,
                        int64_t m) {
  for (int64_t r = 0; r < m; ++r) {
    float* g = t.gx + r * p.ldq();
    for (int64_t d = 0; d < p.width(); ++d) g[d] *= t.slope[r * p.ldq() + d];
    write(out, out.offset(0, b, h, i + r), g, 1);
  }
}

// g_n = [g, -g.o] / (n_1 + eps), from row n; gphi(q) = g_n S'; gS += phi(q)' g_n.
template <class Isa>
TBCM_INLINE void backward_queries(const Backward& p, const BackwardTiles& t, int64_t b, int64_t h, int64_t i, int64_t m) {
  const Isa isa;
  const int64_t width = p.width(), columns = p.columns(), ldq = p.ldq(), ldv = p.ldv();
  for (int64_t r = 0; r < m; ++r) {
    p.q.primal(t.x + r * ldq, b, h, i + r);
    apply<typename Isa::Vector>(p.feature, t.x + r * ldq, t.slope + r * ldq, p.q.padded());
  }
  set_product(isa, t.x, ldq, t.state, ldv, t.n, ldv, m, columns, width);
  for (int64_t r = 0; r < m; ++r) {
    float *g = t.v + r * ldv, *n = t.n + r * ldv;
    const float inverse = 1.f / (n[columns - 1] + p.eps);
    read(g, p.go, p.go.offset(0, b, h, i + r));
    for (int64_t d = columns; d < round_up(columns, LANES); ++d) g[d] = 0;
    g[columns - 1] = -dot(g, n, columns - 1) * inverse;
    for (int64_t d = 0; d < columns; ++d) g[d] *= inverse;
  }
  set_product(isa, t.v, ldv, t.turned, ldq, t.gx, ldq, m, width, columns);
  add_transposed(isa, t.x, ldq, t.v, ldv, t.gstate, ldv, width, columns, m);
  write_gradient(p, t, p.gq, b, h, i, m);
}

// gphi(k) = v' gS', gv = (phi(k) gS)_v.
template <class Isa>
TBCM_INLINE void backward_keys(const Backward& p, const BackwardTiles& t, int64_t b, int64_t h, int64_t i, int64_t m) {
  const Isa isa;
  const int64_t width = p.width(), columns = p.columns(), ldq = p.ldq(), ldv = p.ldv();
  for (int64_t r = 0; r < m; ++r) {
    p.k.primal(t.x + r * ldq, b, h, i + r);
    apply<typename Isa::Vector>(p.feature, t.x + r * ldq, t.slope + r * ldq, p.k.padded());
    value(p, t.v + r * ldv, false, b, h, i + r);
  }
  set_product(isa, t.v, ldv, t.turned, ldq, t.gx, ldq, m, width, columns);
  set_product(isa, t.x, ldq, t.gstate, ldv, t.n, ldv, m, columns, width);
  write_gradient(p, t, p.gk, b, h, i, m);
  for (int64_t r = 0; r < m; ++r) write(p.gv, p.gv.offset(0, b, h, i + r), t.n + r * ldv, 1);
}

template <class Isa>
TBCM_INLINE void backward_tasks(const Backward& p, int64_t begin, int64_t end) {
  BackwardTiles t;
  Arena arena{Arena::begin(backward_floats(p, nullptr, &t))};
  backward_floats(p, &arena, &t);
  const int64_t width = p.width(), columns = p.columns(), ldv = p.ldv();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / p.heads, h = task % p.heads;
    zero(t.state, round_up(width, 8) * ldv);
    for (int64_t d = 0; d < width; ++d) std::memcpy(t.state + d * ldv, p.state + (task * width + d) * columns, columns * sizeof(float));
    turn(p, t.turned, t.state);
    zero(t.gstate, round_up(width, 8) * ldv);
    for (int64_t i = 0; i < p.q.tokens; i += TOKENS)
      backward_queries<Isa>(p, t, b, h, i, smaller(TOKENS, p.q.tokens - i));
    turn(p, t.turned, t.gstate);
    for (int64_t i = 0; i < p.k.tokens; i += TOKENS)
      backward_keys<Isa>(p, t, b, h, i, smaller(TOKENS, p.k.tokens - i));
  }
  trim_scratch();
}

TBCM_RUN_BEST(Backward, backward_tasks)

void describe(Problem& p, const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& q_weight, const Maybe& k_weight,
              const Maybe& tq, const Maybe& tk, const Maybe& tv, int64_t feature, double eps, double q_eps,
              double k_eps) {
  p.q = input(q, tq, q_weight, 1, q_eps);
  p.k = input(k, tk, k_weight, 1, k_eps);
  p.v = input(v, tv, Maybe{}, 1, 0);
  p.feature = Feature(feature), p.eps = float(eps);
  p.batch = q.size(0), p.heads = q.size(1);
}

}  // namespace

void forward(Tensor q, Tensor k, Tensor v, Maybe q_weight, Maybe k_weight, Maybe tq, Maybe tk, Maybe tv, Tensor o,
             Maybe to, Tensor state, int64_t feature, double eps, double q_eps, double k_eps) {
  Forward p;
  describe(p, q, k, v, q_weight, k_weight, tq, tk, tv, feature, eps, q_eps, k_eps);
  p.o = operand(o), p.to = operand(to), p.state = pointer<float>(state);
  const int64_t cost = (p.q.tokens + p.k.tokens) * p.width();
  parallel(p.batch * p.heads, cost, [&](int64_t a, int64_t z) { run(p, a, z); });
}

void backward(Tensor go, Tensor q, Tensor k, Tensor v, Maybe q_weight, Maybe k_weight, Tensor state, Tensor gq,
              Tensor gk, Tensor gv, int64_t feature, double eps, double q_eps, double k_eps) {
  Backward p;
  describe(p, q, k, v, q_weight, k_weight, {}, {}, {}, feature, eps, q_eps, k_eps);
  p.go = operand(go), p.gq = operand(gq), p.gk = operand(gk), p.gv = operand(gv);
  p.state = pointer<const float>(state);
  const int64_t cost = (p.q.tokens + p.k.tokens) * p.width();
  parallel(p.batch * p.heads, cost, [&](int64_t a, int64_t z) { run(p, a, z); });
}

}  // namespace tbcm::linear_attention
