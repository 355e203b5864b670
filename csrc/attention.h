// What the tiles of attention are made of: operands read as fp32 rows, packed keys and values, masks,
// and the arithmetic of a row of logits.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "gemm.h"

namespace tbcm::attention {

constexpr int64_t QUERIES = 128, MAX_WIDTH = 256;
constexpr float HIDDEN = -std::numeric_limits<float>::infinity();

enum class Type { f32, bf16, f16 };

// An operand [T, B, H, N, D] of any element type; tangents have T lanes, primals one.
struct Operand {
  char* data = nullptr;
  Type type = Type::f32;
  int64_t lane = 0, batch = 0, head = 0, token = 0, width = 0;  // strides in elements
  explicit operator bool() const { return data != nullptr; }
  TBCM_INLINE int64_t offset(int64_t l, int64_t b, int64_t h, int64_t n) const {
    return l * lane + b * batch + h * head + n * token;
  }
};

// Row `at` as floats, with zeros up to a whole number of lanes.
TBCM_INLINE void read(float* dst, const Operand& x, int64_t at) {
  switch (x.type) {
    case Type::f32: load(dst, reinterpret_cast<const float*>(x.data) + at, x.width); break;
    case Type::bf16: load(dst, reinterpret_cast<const bfloat16*>(x.data) + at, x.width); break;
    case Type::f16: load(dst, reinterpret_cast<const float16*>(x.data) + at, x.width); break;
  }
  for (int64_t d = x.width; d < round_up(x.width, LANES); ++d) dst[d] = 0;
}

template <class T>
TBCM_INLINE void write_as(T* dst, const float* src, float factor, int64_t n) {
#pragma omp simd
  for (int64_t d = 0; d < n; ++d) narrow(src[d] * factor, &dst[d]);
}

TBCM_INLINE void write(const Operand& x, int64_t at, const float* src, float factor) {
  switch (x.type) {
    case Type::f32: write_as(reinterpret_cast<float*>(x.data) + at, src, factor, x.width); break;
    case Type::bf16: write_as(reinterpret_cast<bfloat16*>(x.data) + at, src, factor, x.width); break;
    case Type::f16: write_as(reinterpret_cast<float16*>(x.data) + at, src, factor, x.width); break;
  }
}

// RMSNorm of the rows of an operand, by each head or over all: r, and m = mean(x tx) of each lane.
struct Norm {
  const float* weight = nullptr;  // [D], or [H, D] over all heads
  bool all_heads = false;
  std::vector<float> r, m;  // [B, H or 1, N] and [T, B, H or 1, N]
};

// A primal and its tangents as the products read them: normalised, zero where hidden.
struct Input {
  Operand x, tx;
  int64_t heads = 0, tokens = 0, batch = 0;
  const uint8_t* seen = nullptr;  // [B, N], or null: all
  Norm norm;

  TBCM_INLINE int64_t statistic(int64_t l, int64_t b, int64_t h, int64_t n) const {
    return norm.all_heads ? (l * batch + b) * tokens + n : ((l * batch + b) * heads + h) * tokens + n;
  }
  TBCM_INLINE int64_t padded() const { return round_up(x.width, LANES); }

  TBCM_INLINE bool clear(float* dst, int64_t b, int64_t n) const {
    if (n < tokens && !(seen && !seen[b * tokens + n])) return false;
    for (int64_t d = 0; d < padded(); ++d) dst[d] = 0;
    return true;
  }

  TBCM_INLINE void normalize(float* dst, int64_t b, int64_t h, int64_t n) const {
    if (!norm.weight) return;
    const float* w = norm.weight + (norm.all_heads ? h * x.width : 0);
    const float r = norm.r[statistic(0, b, h, n)];
    for (int64_t d = 0; d < x.width; ++d) dst[d] *= w[d] * r;
  }

  // Row n of the primal; n may lie beyond the end.
  TBCM_INLINE void primal(float* dst, int64_t b, int64_t h, int64_t n) const {
    if (clear(dst, b, n)) return;
    read(dst, x, x.offset(0, b, h, n));
    normalize(dst, b, h, n);
  }

  // Row n of a lane of the tangent: w r (tx - x r^2 m) where there is a norm.
  TBCM_INLINE void tangent(float* dst, int64_t l, int64_t b, int64_t h, int64_t n) const {
    if (clear(dst, b, n)) return;
    read(dst, tx, tx.offset(l, b, h, n));
    if (norm.weight) {
      float row[MAX_WIDTH];
      read(row, x, x.offset(0, b, h, n));
      const float r = norm.r[statistic(0, b, h, n)], drift = r * r * norm.m[statistic(l, b, h, n)];
      for (int64_t d = 0; d < x.width; ++d) dst[d] -= row[d] * drift;
    }
    normalize(dst, b, h, n);
  }

  TBCM_INLINE void row(float* dst, bool moving, int64_t l, int64_t b, int64_t h, int64_t n) const {
    if (moving) tangent(dst, l, b, h, n);
    else primal(dst, b, h, n);
  }
};

// What the kernels share besides the operands; strides of the mask may be zero.
struct Problem {
  Input q, k, v;
  const char* mask = nullptr;
  bool boolean = false;
  int64_t mask_strides[4] = {};
  int64_t lanes = 0, batch = 0, heads = 0, groups = 0, queries = 0, keys = 0, causal = 0;
  float scale = 1;
  int64_t span = 0;  // keys of a block

  TBCM_INLINE int64_t query_blocks() const { return (queries + QUERIES - 1) / QUERIES; }
  TBCM_INLINE int64_t key_blocks() const { return keys ? (keys + span - 1) / span : 0; }
  TBCM_INLINE int64_t q_stride() const { return tile_stride(q.x.width); }
  TBCM_INLINE int64_t v_stride() const { return tile_stride(v.x.width); }
  TBCM_INLINE int64_t span_stride() const { return tile_stride(span); }
  // Keys of sample b up to the last that is not hidden: padding at the end costs nothing.
  TBCM_INLINE int64_t last_key(int64_t b) const {
    int64_t n = keys;
    while (k.seen && n > 0 && !k.seen[b * keys + n - 1]) --n;
    return n;
  }
  TBCM_INLINE int64_t all_keys() const { return key_blocks() * span; }
};

// Consecutive pieces of a thread's scratch, each on a cache line.
struct Arena {
  float* at;
  TBCM_INLINE float* take(int64_t floats) {
    float* piece = at;
    at += round_up(floats, LANES);
    return piece;
  }
  static float* begin(int64_t floats) {
    const auto address = reinterpret_cast<uintptr_t>(scratch(floats + LANES));
    return reinterpret_cast<float*>((address + 63) / 64 * 64);
  }
};

struct Piece {
  float** pointer;
  int64_t floats;
};

// The sum of all sizes; with an arena, points to the pieces too.
template <int count>
TBCM_INLINE int64_t take(Arena* arena, const Piece (&pieces)[count]) {
  int64_t total = 0;
  for (const Piece& piece : pieces) {
    total += round_up(piece.floats, LANES);
    if (arena) *piece.pointer = arena->take(piece.floats);
  }
  return total;
}

// Keys or values of one head: rows [S, D], and the transposed blocks [D, span] one after the other.
TBCM_INLINE void pack_rows(float* dst, const Problem& p, const Input& x, bool moving, int64_t l, int64_t b, int64_t h) {
  for (int64_t n = 0; n < p.all_keys(); ++n) x.row(dst + n * tile_stride(x.x.width), moving, l, b, h, n);
}

TBCM_INLINE void pack_transposed(float* dst, const Problem& p, const Input& x, bool moving, int64_t l, int64_t b,
                                 int64_t h) {
  float rows[LANES * MAX_WIDTH];
  for (int64_t j = 0; j < p.all_keys(); j += LANES) {
    float* corner = dst + j / p.span * x.x.width * p.span_stride() + j % p.span;
    for (int64_t i = 0; i < LANES; ++i) x.row(rows + i * MAX_WIDTH, moving, l, b, h, j + i);
    for (int64_t d = 0; d < x.x.width; ++d)
      for (int64_t i = 0; i < LANES; ++i) corner[d * p.span_stride() + i] = rows[i * MAX_WIDTH + d];
  }
}

// Adds the bias to the logits of query i and keys [first, first + n), and hides what it must not see.
TBCM_INLINE void hide(const Problem& p, float* s, int64_t b, int64_t h, int64_t i, int64_t first, int64_t n) {
  if (p.mask) {
    const int64_t step = p.mask_strides[3];
    const int64_t at = b * p.mask_strides[0] + h * p.mask_strides[1] + i * p.mask_strides[2] + first * step;
    if (p.boolean) {
      const uint8_t* seen = reinterpret_cast<const uint8_t*>(p.mask) + at;
      for (int64_t j = 0; j < n; ++j) s[j] = seen[j * step] ? s[j] : HIDDEN;
    } else {
      const float* bias = reinterpret_cast<const float*>(p.mask) + at;
      for (int64_t j = 0; j < n; ++j) s[j] += bias[j * step];
    }
  }
  if (const uint8_t* seen = p.k.seen)
    for (int64_t j = 0; j < n; ++j) s[j] = seen[b * p.keys + first + j] ? s[j] : HIDDEN;
  const int64_t last = i + p.causal - first;  // the last key that the query sees
  for (int64_t j = last < 0 ? 0 : last + 1; j < n; ++j) s[j] = HIDDEN;
  for (int64_t j = n; j < round_up(n, LANES); ++j) s[j] = HIDDEN;
}

template <class Vector>
constexpr int64_t width_of = sizeof(Vector) / sizeof(float);

template <class Vector>
TBCM_INLINE float sum(Vector v) {
  for (int64_t n = width_of<Vector> / 2; n > 0; n /= 2)
    for (int64_t i = 0; i < n; ++i) v[i] += v[i + n];
  return v[0];
}

template <class Vector>
TBCM_INLINE float greatest(const float* s, int64_t n) {
  Vector top = get<Vector>(s);
  for (int64_t j = width_of<Vector>; j < n; j += width_of<Vector>) {
    const Vector v = get<Vector>(s + j);
    top = v > top ? v : top;
  }
  float m = top[0];
  for (int64_t i = 1; i < width_of<Vector>; ++i) m = top[i] > m ? top[i] : m;
  return m;
}

// s = exp(s - shift); returns the sum.
template <class Vector>
TBCM_INLINE float exponentiate(float* s, float shift, int64_t n) {
  Vector total = {};
  for (int64_t j = 0; j < n; j += width_of<Vector>) {
    const Vector e = exponential(get<Vector>(s + j) - shift);
    put(s + j, e);
    total += e;
  }
  return sum(total);
}

// t = e (scale t); returns the sum.
template <class Vector>
TBCM_INLINE float weigh(float* t, const float* e, float scale, int64_t n) {
  Vector total = {};
  for (int64_t j = 0; j < n; j += width_of<Vector>) {
    const Vector v = get<Vector>(e + j) * (get<Vector>(t + j) * scale);
    put(t + j, v);
    total += v;
  }
  return sum(total);
}

template <class Vector>
TBCM_INLINE void rescale(float* x, float factor, int64_t n) {
  for (int64_t j = 0; j < n; j += width_of<Vector>) put(x + j, get<Vector>(x + j) * factor);
}

// In fp64: D = G.O is subtracted from GV', which is nearly the same where few keys are seen.
TBCM_INLINE float dot(const float* a, const float* b, int64_t n) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < n; ++j) total += double(a[j]) * b[j];
  return float(total);
}

TBCM_INLINE void zero(float* x, int64_t n) { std::memset(x, 0, n * sizeof(float)); }

TBCM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace tbcm::attention
