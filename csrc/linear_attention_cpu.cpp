// CPU kernels of linear_attention: a task is a few heads of one sample, tiles of tokens in fp32, products
// from gemm.h. Of v' = [v, 1] the tiles hold v; the ones make sums of features, z, and the normaliser q.z.
// A head's row of 32 numbers is short and the next one lies a whole token away, on another page: heads that
// are neighbours in memory are read together.
#include "operands.h"

namespace tbcm::linear_attention {
namespace {

constexpr int64_t TOKENS = 16, GROUP = 32, BLOCK = 512;
enum class Feature { relu, elu, identity };

// phi(x) and phi'(x).
template <class Vector>
struct Mapped {
  Vector value, slope;
};

template <class Vector>
TBCM_INLINE Mapped<Vector> map(Feature feature, Vector x) {
  const Vector one = Vector{} + 1.f;
  if (feature == Feature::relu) return {x < 0 ? Vector{} : x, x > 0 ? one : Vector{}};  // a NaN stays one
  if (feature == Feature::identity) return {x, one};
  const Vector e = exponential(x > 0 ? Vector{} : x);
  return {x > 0 ? x + 1.f : e, e};
}

struct Problem {
  Input q, k, v;
  Feature feature;
  float eps;
  int64_t batch = 0, heads = 0, group = 1;  // heads of a task
  TBCM_INLINE int64_t groups() const { return (heads + group - 1) / group; }
  TBCM_INLINE int64_t floats() const { return round_up(width(), 8) * ldv(); }  // of a state
  TBCM_INLINE int64_t width() const { return q.x.width; }
  TBCM_INLINE int64_t columns() const { return v.x.width; }
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

TBCM_INLINE void value(const Problem& p, float* dst, bool moving, int64_t b, int64_t h, int64_t n) {
  look_ahead(moving ? p.v.tx : p.v.x, b, h, n, p.v.tokens);
  read_row(dst, p.v, moving, 0, b, h, n);
}

// Calls f(d) for the vectors of a row of n numbers, which is padded to a whole number of lanes.
template <class Vector, class F>
TBCM_INLINE void for_row(int64_t n, const F& f) {
  for (int64_t d = 0; d < round_up(n, LANES); d += lanes<Vector>) f(d);
}

// z += the sum of m rows.
template <class Vector>
TBCM_INLINE void add_rows(float* z, const float* x, int64_t ldx, int64_t m, int64_t n) {
  for_row<Vector>(n, [&](int64_t d) __attribute__((always_inline)) {
    Vector sum = {};
    for (int64_t r = 0; r < m; ++r) sum += get<Vector>(x + r * ldx + d);
    put(z + d, get<Vector>(z + d) + sum);
  });
}

// y += a x
template <class Vector>
TBCM_INLINE void add_scaled(float* y, float a, const float* x, int64_t n) {
  for_row<Vector>(n, [&](int64_t d) __attribute__((always_inline)) {
    put(y + d, get<Vector>(y + d) + a * get<Vector>(x + d));
  });
}

// a.b in fp32, of rows that are padded with zeros.
template <class Vector>
TBCM_INLINE float inner(const float* a, const float* b, int64_t n) {
  Vector sum = {};
  for_row<Vector>(n, [&](int64_t d) __attribute__((always_inline)) { sum += get<Vector>(a + d) * get<Vector>(b + d); });
  return total(sum);
}

// After the last tile of a block its sums are added to those of the blocks before: one chain of additions over all tokens
// would lose digits.
TBCM_INLINE void carry(float* sums, float* all, int64_t n, int64_t tokens) {
  if (tokens % BLOCK) return;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) all[j] += sums[j];
  zero(sums, n);
}

// sums = all + sums
TBCM_INLINE void finish(float* sums, const float* all, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) sums[j] += all[j];
}

// Row n of phi(x), zero up to a whole number of lanes; calls f(d, phi'(x)) for its vectors.
template <class Vector, class F>
TBCM_INLINE void feature_row(const Problem& p, const Input& in, float* x, int64_t b, int64_t h, int64_t n, const F& f) {
  look_ahead(in.x, b, h, n, in.tokens);
  read_row(x, in, false, 0, b, h, n);
  for_row<Vector>(in.x.width, [&](int64_t d) __attribute__((always_inline)) {
    const Mapped<Vector> phi = map(p.feature, get<Vector>(x + d));
    put(x + d, phi.value);
    f(d, phi.slope);
  });
  for (int64_t d = in.x.width; d < in.padded(); ++d) x[d] = 0;
}

// Row n of phi(x), and of phi'(x) tx where there is a tangent.
template <class Vector>
TBCM_INLINE void pair_row(const Problem& p, const Input& in, float* x, float* tx, int64_t b, int64_t h, int64_t n) {
  look_ahead(in.tx, b, h, n, in.tokens);
  if (in.tx) read_row(tx, in, true, 0, b, h, n);
  feature_row<Vector>(p, in, x, b, h, n, [&](int64_t d, Vector slope) __attribute__((always_inline)) {
    if (in.tx) put(tx + d, get<Vector>(tx + d) * slope);
  });
}

struct Forward : Problem {
  Operand o, to;
  float* state;  // [B, H, D, Dv + 1]: S, and z in the last column
  TBCM_INLINE bool state_moves() const { return k.tx || v.tx; }
};

struct ForwardTiles {
  float *x, *tx;  // features of a tile of tokens, and their tangents
  float *v, *tv;  // v and its tangent; then n and its tangent
  float *state, *z, *tstate, *tz, *all;  // sums over a block, side by side, and over those before it
};

TBCM_INLINE int64_t forward_floats(const Forward& p, Arena* arena, ForwardTiles* t) {
  const int64_t x = p.group * TOKENS * p.ldq(), v = p.group * TOKENS * p.ldv(), state = p.group * p.floats();
  const int64_t z = p.group * p.ldq();
  const Piece pieces[] = {{&t->x, x},         {&t->tx, x}, {&t->v, v},          {&t->tv, v},
                          {&t->state, state}, {&t->z, z},  {&t->tstate, state}, {&t->tz, z},
                          {&t->all, 2 * (state + z)}};
  return take(arena, pieces);
}

// S = phi(k)' v, z = sum of phi(k), and their tangents, over all keys, of heads [h, h + count).
template <class Isa>
TBCM_INLINE void gather(const Forward& p, const ForwardTiles& t, int64_t b, int64_t h, int64_t count) {
  using Vector = typename Isa::Vector;
  const Isa isa;
  const int64_t width = p.width(), columns = p.columns(), ldq = p.ldq(), ldv = p.ldv();
  const int64_t sums = (p.to ? t.tz : t.z) + count * ldq - t.state;
  zero(t.state, sums);
  zero(t.all, sums);
  for (int64_t i = 0; i < p.k.tokens; i += TOKENS) {
    const int64_t m = smaller(TOKENS, p.k.tokens - i);
    for (int64_t r = 0; r < m; ++r)
      for (int64_t g = 0; g < count; ++g) {
        const int64_t row = g * TOKENS + r;
        pair_row<Vector>(p, p.k, t.x + row * ldq, t.tx + row * ldq, b, h + g, i + r);
        value(p, t.v + row * ldv, false, b, h + g, i + r);
        if (p.v.tx) value(p, t.tv + row * ldv, true, b, h + g, i + r);
      }
    for (int64_t g = 0; g < count; ++g) {
      const int64_t q = g * TOKENS * ldq, v = g * TOKENS * ldv, s = g * p.floats();
      add_transposed(isa, t.x + q, ldq, t.v + v, ldv, t.state + s, ldv, width, columns, m);
      add_rows<Vector>(t.z + g * ldq, t.x + q, ldq, m, width);
      if (p.k.tx) add_transposed(isa, t.tx + q, ldq, t.v + v, ldv, t.tstate + s, ldv, width, columns, m);
      if (p.k.tx) add_rows<Vector>(t.tz + g * ldq, t.tx + q, ldq, m, width);
      if (p.v.tx) add_transposed(isa, t.x + q, ldq, t.tv + v, ldv, t.tstate + s, ldv, width, columns, m);
    }
    carry(t.state, t.all, sums, i + TOKENS);
  }
  finish(t.state, t.all, sums);
}

// o = n / (q.z + eps), to = (tn - o (q.z)') / (q.z + eps), for row r of n and tn of head g of the group.
template <class Vector>
TBCM_INLINE void divide(const Forward& p, const ForwardTiles& t, int64_t b, int64_t h, int64_t g, int64_t i, int64_t r) {
  const int64_t width = p.width(), row = g * TOKENS + r;
  const float *x = t.x + row * p.ldq(), *tx = t.tx + row * p.ldq(), *z = t.z + g * p.ldq();
  float *n = t.v + row * p.ldv(), *tn = t.tv + row * p.ldv();
  const float inverse = 1.f / (inner<Vector>(x, z, width) + p.eps);
  rescale<Vector>(n, inverse, round_up(p.columns(), LANES));
  write(p.o, p.o.offset(0, b, h + g, i + r), n, 1);
  if (!p.to) return;
  const float drift = (p.k.tx ? inner<Vector>(x, t.tz + g * p.ldq(), width) : 0) + (p.q.tx ? inner<Vector>(tx, z, width) : 0);
  add_scaled<Vector>(tn, -drift, n, p.columns());
  write(p.to, p.to.offset(0, b, h + g, i + r), tn, inverse);
}

// S and z of heads [h, h + count) for backward.
TBCM_INLINE void write_state(const Forward& p, const ForwardTiles& t, int64_t b, int64_t h, int64_t count) {
  const int64_t columns = p.columns();
  float* row = p.state + (b * p.heads + h) * p.width() * (columns + 1);
  for (int64_t g = 0; g < count; ++g)
    for (int64_t d = 0; d < p.width(); ++d, row += columns + 1) {
      std::memcpy(row, t.state + g * p.floats() + d * p.ldv(), columns * sizeof(float));
      row[columns] = t.z[g * p.ldq() + d];
    }
}

template <class Isa>
TBCM_INLINE void forward_tasks(const Forward& p, int64_t begin, int64_t end) {
  using Vector = typename Isa::Vector;
  const Isa isa;
  ForwardTiles t;
  Arena arena{aligned_scratch(forward_floats(p, nullptr, &t))};
  forward_floats(p, &arena, &t);
  const int64_t width = p.width(), columns = p.columns(), ldq = p.ldq(), ldv = p.ldv();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / p.groups(), h = task % p.groups() * p.group, count = smaller(p.group, p.heads - h);
    gather<Isa>(p, t, b, h, count);
    write_state(p, t, b, h, count);
    for (int64_t i = 0; i < p.q.tokens; i += TOKENS) {
      const int64_t m = smaller(TOKENS, p.q.tokens - i);
      for (int64_t r = 0; r < m; ++r)
        for (int64_t g = 0; g < count; ++g) {
          const int64_t row = (g * TOKENS + r) * ldq;
          pair_row<Vector>(p, p.q, t.x + row, t.tx + row, b, h + g, i + r);
        }
      for (int64_t g = 0; g < count; ++g) {
        const int64_t q = g * TOKENS * ldq, v = g * TOKENS * ldv, s = g * p.floats();
        set_product(isa, t.x + q, ldq, t.state + s, ldv, t.v + v, ldv, m, columns, width);
        if (p.q.tx) set_product(isa, t.tx + q, ldq, t.state + s, ldv, t.tv + v, ldv, m, columns, width);
        else if (p.to) zero(t.tv + v, m * ldv);
        if (p.state_moves()) add_product(isa, t.x + q, ldq, t.tstate + s, ldv, t.tv + v, ldv, m, columns, width);
      }
      for (int64_t r = 0; r < m; ++r)
        for (int64_t g = 0; g < count; ++g) divide<Vector>(p, t, b, h, g, i, r);
    }
  }
}

TBCM_RUN_BEST(Forward, forward_tasks)

struct Backward : Problem {
  Operand go, gq, gk, gv;
  const float* state;
};

struct BackwardTiles {
  float *x, *slope, *gx;           // features of a tile of tokens, their slopes and gradients
  float *v, *n, *rate;             // v or the gradient of n; n or gv; the gradient of q.z
  float *state, *turned, *z;       // S, a transposed state, z
  float *gstate, *gz, *all;        // gS and gz over a block, side by side, and over those before it
};

TBCM_INLINE int64_t backward_floats(const Backward& p, Arena* arena, BackwardTiles* t) {
  const int64_t x = p.group * TOKENS * p.ldq(), v = p.group * TOKENS * p.ldv(), state = p.group * p.floats();
  const int64_t turned = p.group * p.columns() * p.ldq(), z = p.group * p.ldq();
  const Piece pieces[] = {{&t->x, x},           {&t->slope, x},   {&t->gx, x}, {&t->v, v},
                          {&t->n, v},           {&t->rate, p.group * TOKENS}, {&t->state, state},
                          {&t->turned, turned}, {&t->z, z},       {&t->gstate, state}, {&t->gz, z},
                          {&t->all, state + z}};
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
  feature_row<Vector>(p, in, t.x + row * p.ldq(), b, h, n, [&](int64_t d, Vector slope) __attribute__((always_inline)) {
    put(t.slope + row * p.ldq() + d, slope);
  });
}

// The gradient of a normalised token: (gphi + a z) phi'(x).
template <class Vector>
TBCM_INLINE void write_gradient(const Problem& p, const BackwardTiles& t, const Operand& out, int64_t row, int64_t at,
                                float a, const float* z) {
  float *g = t.gx + row * p.ldq(), *slope = t.slope + row * p.ldq();
  for_row<Vector>(p.width(), [&](int64_t d) __attribute__((always_inline)) {
    put(g + d, (get<Vector>(g + d) + a * get<Vector>(z + d)) * get<Vector>(slope + d));
  });
  write(out, at, g, 1);
}

// From row r of n: the gradients of n, g / (q.z + eps), and of q.z, -g.o / (q.z + eps).
template <class Vector>
TBCM_INLINE void divide(const Backward& p, const BackwardTiles& t, int64_t b, int64_t h, int64_t g, int64_t i, int64_t r) {
  const int64_t row = g * TOKENS + r, columns = p.columns();
  float *gn = t.v + row * p.ldv(), *n = t.n + row * p.ldv();
  const float inverse = 1.f / (inner<Vector>(t.x + row * p.ldq(), t.z + g * p.ldq(), p.width()) + p.eps);
  look_ahead(p.go, b, h + g, i + r, p.q.tokens);
  read(gn, p.go, p.go.offset(0, b, h + g, i + r));
  t.rate[row] = -dot(gn, n, columns) * inverse * inverse;
  rescale<Vector>(gn, inverse, round_up(columns, LANES));
}

// A tile of queries: gphi(q) = gn S' + rate z, gS += phi(q)' gn, gz += rate phi(q).
template <class Isa>
TBCM_INLINE void backward_queries(const Backward& p, const BackwardTiles& t, int64_t b, int64_t h, int64_t count, int64_t i,
                                  int64_t m) {
  using Vector = typename Isa::Vector;
  const Isa isa;
  const int64_t width = p.width(), columns = p.columns(), ldq = p.ldq(), ldv = p.ldv();
  for (int64_t r = 0; r < m; ++r)
    for (int64_t g = 0; g < count; ++g) slopes_row<Vector>(p, p.q, t, g * TOKENS + r, b, h + g, i + r);
  for (int64_t g = 0; g < count; ++g)
    set_product(isa, t.x + g * TOKENS * ldq, ldq, t.state + g * p.floats(), ldv, t.n + g * TOKENS * ldv, ldv, m, columns,
                width);
  for (int64_t r = 0; r < m; ++r)
    for (int64_t g = 0; g < count; ++g) divide<Vector>(p, t, b, h, g, i, r);
  for (int64_t g = 0; g < count; ++g) {
    const int64_t q = g * TOKENS * ldq, v = g * TOKENS * ldv;
    set_product(isa, t.v + v, ldv, t.turned + g * columns * ldq, ldq, t.gx + q, ldq, m, width, columns);
    add_transposed(isa, t.x + q, ldq, t.v + v, ldv, t.gstate + g * p.floats(), ldv, width, columns, m);
    for (int64_t r = 0; r < m; ++r) add_scaled<Vector>(t.gz + g * ldq, t.rate[g * TOKENS + r], t.x + q + r * ldq, width);
  }
  for (int64_t r = 0; r < m; ++r)
    for (int64_t g = 0; g < count; ++g) {
      const int64_t row = g * TOKENS + r;
      write_gradient<Vector>(p, t, p.gq, row, p.gq.offset(0, b, h + g, i + r), t.rate[row], t.z + g * ldq);
    }
}

// A tile of keys: gphi(k) = v gS' + gz, gv = phi(k) gS.
template <class Isa>
TBCM_INLINE void backward_keys(const Backward& p, const BackwardTiles& t, int64_t b, int64_t h, int64_t count, int64_t i,
                               int64_t m) {
  using Vector = typename Isa::Vector;
  const Isa isa;
  const int64_t width = p.width(), columns = p.columns(), ldq = p.ldq(), ldv = p.ldv();
  for (int64_t r = 0; r < m; ++r)
    for (int64_t g = 0; g < count; ++g) {
      slopes_row<Vector>(p, p.k, t, g * TOKENS + r, b, h + g, i + r);
      value(p, t.v + (g * TOKENS + r) * ldv, false, b, h + g, i + r);
    }
  for (int64_t g = 0; g < count; ++g) {
    const int64_t q = g * TOKENS * ldq, v = g * TOKENS * ldv;
    set_product(isa, t.v + v, ldv, t.turned + g * columns * ldq, ldq, t.gx + q, ldq, m, width, columns);
    set_product(isa, t.x + q, ldq, t.gstate + g * p.floats(), ldv, t.n + v, ldv, m, columns, width);
  }
  for (int64_t r = 0; r < m; ++r)
    for (int64_t g = 0; g < count; ++g) {
      write_gradient<Vector>(p, t, p.gk, g * TOKENS + r, p.gk.offset(0, b, h + g, i + r), 1, t.gz + g * ldq);
      write(p.gv, p.gv.offset(0, b, h + g, i + r), t.n + (g * TOKENS + r) * ldv, 1);
    }
}

TBCM_INLINE void read_state(const Backward& p, const BackwardTiles& t, int64_t b, int64_t h, int64_t count) {
  const int64_t columns = p.columns();
  const float* row = p.state + (b * p.heads + h) * p.width() * (columns + 1);
  zero(t.state, count * p.floats());
  zero(t.z, count * p.ldq());
  for (int64_t g = 0; g < count; ++g)
    for (int64_t d = 0; d < p.width(); ++d, row += columns + 1) {
      std::memcpy(t.state + g * p.floats() + d * p.ldv(), row, columns * sizeof(float));
      t.z[g * p.ldq() + d] = row[columns];
    }
}

template <class Isa>
TBCM_INLINE void backward_tasks(const Backward& p, int64_t begin, int64_t end) {
  BackwardTiles t;
  Arena arena{aligned_scratch(backward_floats(p, nullptr, &t))};
  backward_floats(p, &arena, &t);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / p.groups(), h = task % p.groups() * p.group, count = smaller(p.group, p.heads - h);
    read_state(p, t, b, h, count);
    turn(p, t.turned, t.state, count);
    const int64_t sums = t.gz + count * p.ldq() - t.gstate;
    zero(t.gstate, sums);
    zero(t.all, sums);
    for (int64_t i = 0; i < p.q.tokens; i += TOKENS) {
      backward_queries<Isa>(p, t, b, h, count, i, smaller(TOKENS, p.q.tokens - i));
      carry(t.gstate, t.all, sums, i + TOKENS);
    }
    finish(t.gstate, t.all, sums);
    turn(p, t.turned, t.gstate, count);
    for (int64_t i = 0; i < p.k.tokens; i += TOKENS)
      backward_keys<Isa>(p, t, b, h, count, i, smaller(TOKENS, p.k.tokens - i));
  }
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
  // The busiest thread takes its heads in groups, and a group as long as three heads more: the fewer lie side by side,
  // the less the caches look ahead. A head's sums are the same in any group.
  const int64_t threads = torch::stable::get_num_threads(), widest = GROUP * 32 / (p.width() > 32 ? p.width() : 32);
  int64_t least = INT64_MAX;
  for (int64_t group = 1; group <= smaller(widest, p.heads); ++group) {
    const int64_t tasks = p.batch * ((p.heads + group - 1) / group), time = (tasks + threads - 1) / threads * (group + 3);
    if (time <= least) least = time, p.group = group;
  }
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
