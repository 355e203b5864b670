// CPU kernels of linear_attention: a task is a few heads of one sample, tiles of tokens in fp32, products
// from gemm.h. The ones of v' = [v, 1] are a column of the tiles, so that the normaliser is one, too.
// A head's row of 32 numbers is short and the next one lies a whole token away: heads that are
// neighbours in memory are read together.
#include "operands.h"

namespace tbcm::linear_attention {
namespace {

constexpr int64_t TOKENS = 32, GROUP = 4;
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
  int64_t batch = 0, heads = 0, group = 1;  // heads of a task
  TBCM_INLINE int64_t groups() const { return (heads + group - 1) / group; }
  TBCM_INLINE int64_t floats() const { return round_up(width(), 8) * ldv(); }  // of a state
  TBCM_INLINE int64_t width() const { return q.x.width; }
  TBCM_INLINE int64_t columns() const { return v.x.width + 1; }
  TBCM_INLINE int64_t ldq() const { return tile_stride(width()); }
  TBCM_INLINE int64_t ldv() const { return tile_stride(columns()); }
};

// No hardware looks a token ahead: ask for the row of the next tile while this one is worked on.
TBCM_INLINE void look_ahead(const Operand& x, int64_t b, int64_t h, int64_t n, int64_t tokens) {
  if (!x || n + TOKENS >= tokens) return;
  const int64_t bytes = x.type == Type::f32 ? 4 : 2;
  const char* row = x.data + x.offset(0, b, h, n + TOKENS) * bytes;
  for (int64_t at = 0; at < x.width * bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
}

// Row n of [v, 1], or of [tv, 0].
TBCM_INLINE void value(const Problem& p, float* dst, bool moving, int64_t b, int64_t h, int64_t n) {
  look_ahead(moving ? p.v.tx : p.v.x, b, h, n, p.v.tokens);
  if (moving) p.v.tangent(dst, 0, b, h, n);
  else p.v.primal(dst, b, h, n);
  for (int64_t d = p.columns(); d < round_up(p.columns(), LANES); ++d) dst[d] = 0;
  dst[p.columns() - 1] = moving ? 0.f : 1.f;
}

// Row n of phi(x) and of phi'(x), and of phi'(x) tx where there is a tangent.
template <class Vector>
TBCM_INLINE void feature_row(const Problem& p, const Input& in, float* x, float* slope, float* tx, int64_t b, int64_t h,
                             int64_t n) {
  look_ahead(in.x, b, h, n, in.tokens);
  look_ahead(in.tx, b, h, n, in.tokens);
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
  const int64_t x = p.group * TOKENS * p.ldq(), v = p.group * TOKENS * p.ldv(), state = p.group * p.floats();
  const Piece pieces[] = {{&t->x, x}, {&t->tx, x},         {&t->slope, p.ldq()}, {&t->v, v},
                          {&t->tv, v}, {&t->state, state}, {&t->tstate, state}};
  return take(arena, pieces);
}

// S = phi(k)' v' and its tangent, over all keys, of heads [h, h + count).
template <class Isa>
TBCM_INLINE void gather(const Forward& p, const ForwardTiles& t, int64_t b, int64_t h, int64_t count) {
  const Isa isa;
  const int64_t width = p.width(), columns = p.columns(), ldq = p.ldq(), ldv = p.ldv();
  zero(t.state, count * p.floats());
  zero(t.tstate, count * p.floats());
  for (int64_t i = 0; i < p.k.tokens; i += TOKENS) {
    const int64_t m = smaller(TOKENS, p.k.tokens - i);
    for (int64_t r = 0; r < m; ++r)
      for (int64_t g = 0; g < count; ++g) {
        const int64_t row = g * TOKENS + r;
        feature_row<typename Isa::Vector>(p, p.k, t.x + row * ldq, t.slope, t.tx + row * ldq, b, h + g, i + r);
        value(p, t.v + row * ldv, false, b, h + g, i + r);
        if (p.v.tx) value(p, t.tv + row * ldv, true, b, h + g, i + r);
      }
    for (int64_t g = 0; g < count; ++g) {
      const int64_t q = g * TOKENS * ldq, v = g * TOKENS * ldv, s = g * p.floats();
      add_transposed(isa, t.x + q, ldq, t.v + v, ldv, t.state + s, ldv, width, columns, m);
      if (p.k.tx) add_transposed(isa, t.tx + q, ldq, t.v + v, ldv, t.tstate + s, ldv, width, columns, m);
      if (p.v.tx) add_transposed(isa, t.x + q, ldq, t.tv + v, ldv, t.tstate + s, ldv, width, columns, m);
    }
  }
}

// o = n_v / (n_1 + eps), to = (tn_v - o tn_1) / (n_1 + eps), from a row of n and tn.
TBCM_INLINE void divide(const Forward& p, float* n, float* tn, int64_t b, int64_t h, int64_t at) {
  const int64_t last = p.columns() - 1;
  const float inverse = 1.f / (n[last] + p.eps), drift = p.to ? tn[last] : 0.f;
  for (int64_t d = 0; d < last; ++d) n[d] *= inverse;
  write(p.o, p.o.offset(0, b, h, at), n, 1);
  if (!p.to) return;
  for (int64_t d = 0; d < last; ++d) tn[d] -= n[d] * drift;
  write(p.to, p.to.offset(0, b, h, at), tn, inverse);
}

template <class Isa>
TBCM_INLINE void forward_tasks(const Forward& p, int64_t begin, int64_t end) {
  const Isa isa;
  ForwardTiles t;
  Arena arena{Arena::begin(forward_floats(p, nullptr, &t))};
  forward_floats(p, &arena, &t);
  const int64_t width = p.width(), columns = p.columns(), ldq = p.ldq(), ldv = p.ldv();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / p.groups(), h = task % p.groups() * p.group, count = smaller(p.group, p.heads - h);
    gather<Isa>(p, t, b, h, count);
    for (int64_t g = 0; g < count; ++g)
      for (int64_t d = 0; d < width; ++d)
        std::memcpy(p.state + ((b * p.heads + h + g) * width + d) * columns, t.state + g * p.floats() + d * ldv,
                    columns * sizeof(float));
    for (int64_t i = 0; i < p.q.tokens; i += TOKENS) {
      const int64_t m = smaller(TOKENS, p.q.tokens - i);
      for (int64_t r = 0; r < m; ++r)
        for (int64_t g = 0; g < count; ++g) {
          const int64_t row = (g * TOKENS + r) * ldq;
          feature_row<typename Isa::Vector>(p, p.q, t.x + row, t.slope, t.tx + row, b, h + g, i + r);
        }
      for (int64_t g = 0; g < count; ++g) {
        const int64_t q = g * TOKENS * ldq, v = g * TOKENS * ldv, s = g * p.floats();
        set_product(isa, t.x + q, ldq, t.state + s, ldv, t.v + v, ldv, m, columns, width);
        if (p.to) set_product(isa, t.x + q, ldq, t.tstate + s, ldv, t.tv + v, ldv, m, columns, width);
        if (p.q.tx) add_product(isa, t.tx + q, ldq, t.state + s, ldv, t.tv + v, ldv, m, columns, width);
      }
      for (int64_t r = 0; r < m; ++r)
        for (int64_t g = 0; g < count; ++g) {
          const int64_t row = (g * TOKENS + r) * ldv;
          divide(p, t.v + row, t.tv + row, b, h + g, i + r);
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
  const int64_t x = p.group * TOKENS * p.ldq(), v = p.group * TOKENS * p.ldv(), state = p.group * p.floats();
  const Piece pieces[] = {{&t->x, x}, {&t->slope, x},     {&t->gx, x},      {&t->v, v},
                          {&t->n, v}, {&t->state, state}, {&t->turned, p.group * p.columns() * p.ldq()}, {&t->gstate, state}};
  return take(arena, pieces);
}

TBCM_INLINE void turn(const Problem& p, float* to, const float* from, int64_t count) {
  for (int64_t g = 0; g < count; ++g)
    for (int64_t d = 0; d < p.width(); ++d)
      for (int64_t c = 0; c < p.columns(); ++c)
        to[(g * p.columns() + c) * p.ldq() + d] = from[g * p.floats() + d * p.ldv() + c];
}

// Row n of phi(x) and of phi'(x).
template <class Vector>
TBCM_INLINE void slopes_row(const Problem& p, const Input& in, const BackwardTiles& t, int64_t row, int64_t b, int64_t h,
                            int64_t n) {
  look_ahead(in.x, b, h, n, in.tokens);
  in.primal(t.x + row * p.ldq(), b, h, n);
  apply<Vector>(p.feature, t.x + row * p.ldq(), t.slope + row * p.ldq(), in.padded());
}

// The gradient of a normalised token: gphi phi'(x).
TBCM_INLINE void write_gradient(const Problem& p, const BackwardTiles& t, const Operand& out, int64_t row, int64_t at) {
  float* g = t.gx + row * p.ldq();
  for (int64_t d = 0; d < p.width(); ++d) g[d] *= t.slope[row * p.ldq() + d];
  write(out, at, g, 1);
}

// From n in t.n, row n of g_n = [g, -g.o] / (n_1 + eps).
TBCM_INLINE void divide(const Backward& p, float* g, const float* n, int64_t b, int64_t h, int64_t at) {
  const int64_t last = p.columns() - 1;
  const float inverse = 1.f / (n[last] + p.eps);
  look_ahead(p.go, b, h, at, p.q.tokens);
  read(g, p.go, p.go.offset(0, b, h, at));
  for (int64_t d = last + 1; d < round_up(last + 1, LANES); ++d) g[d] = 0;
  g[last] = -dot(g, n, last) * inverse;
  for (int64_t d = 0; d <= last; ++d) g[d] *= inverse;
}

// A tile of queries: gphi(q) = g_n S', gS += phi(q)' g_n.
template <class Isa>
TBCM_INLINE void backward_queries(const Backward& p, const BackwardTiles& t, int64_t b, int64_t h, int64_t count, int64_t i,
                                  int64_t m) {
  const Isa isa;
  const int64_t width = p.width(), columns = p.columns(), ldq = p.ldq(), ldv = p.ldv();
  for (int64_t r = 0; r < m; ++r)
    for (int64_t g = 0; g < count; ++g) slopes_row<typename Isa::Vector>(p, p.q, t, g * TOKENS + r, b, h + g, i + r);
  for (int64_t g = 0; g < count; ++g)
    set_product(isa, t.x + g * TOKENS * ldq, ldq, t.state + g * p.floats(), ldv, t.n + g * TOKENS * ldv, ldv, m, columns,
                width);
  for (int64_t r = 0; r < m; ++r)
    for (int64_t g = 0; g < count; ++g) {
      const int64_t row = (g * TOKENS + r) * ldv;
      divide(p, t.v + row, t.n + row, b, h + g, i + r);
    }
  for (int64_t g = 0; g < count; ++g) {
    const int64_t q = g * TOKENS * ldq, v = g * TOKENS * ldv;
    set_product(isa, t.v + v, ldv, t.turned + g * columns * ldq, ldq, t.gx + q, ldq, m, width, columns);
    add_transposed(isa, t.x + q, ldq, t.v + v, ldv, t.gstate + g * p.floats(), ldv, width, columns, m);
  }
  for (int64_t r = 0; r < m; ++r)
    for (int64_t g = 0; g < count; ++g) write_gradient(p, t, p.gq, g * TOKENS + r, p.gq.offset(0, b, h + g, i + r));
}

// A tile of keys: gphi(k) = v' gS', gv = (phi(k) gS)_v.
template <class Isa>
TBCM_INLINE void backward_keys(const Backward& p, const BackwardTiles& t, int64_t b, int64_t h, int64_t count, int64_t i,
                               int64_t m) {
  const Isa isa;
  const int64_t width = p.width(), columns = p.columns(), ldq = p.ldq(), ldv = p.ldv();
  for (int64_t r = 0; r < m; ++r)
    for (int64_t g = 0; g < count; ++g) {
      slopes_row<typename Isa::Vector>(p, p.k, t, g * TOKENS + r, b, h + g, i + r);
      value(p, t.v + (g * TOKENS + r) * ldv, false, b, h + g, i + r);
    }
  for (int64_t g = 0; g < count; ++g) {
    const int64_t q = g * TOKENS * ldq, v = g * TOKENS * ldv;
    set_product(isa, t.v + v, ldv, t.turned + g * columns * ldq, ldq, t.gx + q, ldq, m, width, columns);
    set_product(isa, t.x + q, ldq, t.gstate + g * p.floats(), ldv, t.n + v, ldv, m, columns, width);
  }
  for (int64_t r = 0; r < m; ++r)
    for (int64_t g = 0; g < count; ++g) {
      write_gradient(p, t, p.gk, g * TOKENS + r, p.gk.offset(0, b, h + g, i + r));
      write(p.gv, p.gv.offset(0, b, h + g, i + r), t.n + (g * TOKENS + r) * ldv, 1);
    }
}

template <class Isa>
TBCM_INLINE void backward_tasks(const Backward& p, int64_t begin, int64_t end) {
  BackwardTiles t;
  Arena arena{Arena::begin(backward_floats(p, nullptr, &t))};
  backward_floats(p, &arena, &t);
  const int64_t width = p.width(), columns = p.columns(), ldv = p.ldv();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / p.groups(), h = task % p.groups() * p.group, count = smaller(p.group, p.heads - h);
    zero(t.state, count * p.floats());
    for (int64_t g = 0; g < count; ++g)
      for (int64_t d = 0; d < width; ++d)
        std::memcpy(t.state + g * p.floats() + d * ldv, p.state + ((b * p.heads + h + g) * width + d) * columns,
                    columns * sizeof(float));
    turn(p, t.turned, t.state, count);
    zero(t.gstate, count * p.floats());
    for (int64_t i = 0; i < p.q.tokens; i += TOKENS)
      backward_queries<Isa>(p, t, b, h, count, i, smaller(TOKENS, p.q.tokens - i));
    turn(p, t.turned, t.gstate, count);
    for (int64_t i = 0; i < p.k.tokens; i += TOKENS)
      backward_keys<Isa>(p, t, b, h, count, i, smaller(TOKENS, p.k.tokens - i));
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
  // As long as there are tasks for many cores; a head's sums are the same in any group.
  const int64_t enough = p.batch * p.heads / 16;
  p.group = enough < 1 ? 1 : smaller(enough, GROUP);
}

}  // namespace

void forward(Tensor q, Tensor k, Tensor v, Maybe q_weight, Maybe k_weight, Maybe tq, Maybe tk, Maybe tv, Tensor o,
             Maybe to, Tensor state, int64_t feature, double eps, double q_eps, double k_eps) {
  Forward p;
  describe(p, q, k, v, q_weight, k_weight, tq, tk, tv, feature, eps, q_eps, k_eps);
  p.o = operand(o), p.to = operand(to), p.state = pointer<float>(state);
  const int64_t cost = p.group * (p.q.tokens + p.k.tokens) * p.width();
  parallel(p.batch * p.groups(), cost, [&](int64_t a, int64_t z) { run(p, a, z); });
}

void backward(Tensor go, Tensor q, Tensor k, Tensor v, Maybe q_weight, Maybe k_weight, Tensor state, Tensor gq,
              Tensor gk, Tensor gv, int64_t feature, double eps, double q_eps, double k_eps) {
  Backward p;
  describe(p, q, k, v, q_weight, k_weight, {}, {}, {}, feature, eps, q_eps, k_eps);
  p.go = operand(go), p.gq = operand(gq), p.gk = operand(gk), p.gv = operand(gv);
  p.state = pointer<const float>(state);
  const int64_t cost = p.group * (p.q.tokens + p.k.tokens) * p.width();
  parallel(p.batch * p.groups(), cost, [&](int64_t a, int64_t z) { run(p, a, z); });
}

}  // namespace tbcm::linear_attention
