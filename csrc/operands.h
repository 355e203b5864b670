// Operands [B, H, N, D] of both attentions: read as fp32 rows of any element type, normalised on the way
// from row statistics; and the tiles that they are read into.
#pragma once

#include <cmath>
#include <vector>

#include "bindings.h"
#include "gemm.h"

namespace tbcm {

constexpr int64_t MAX_WIDTH = 256;

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

// n numbers of a row as floats, with zeros up to a whole number of lanes.
template <class T>
TBCM_INLINE void read_as(float* dst, const T* src, int64_t n) {
  int64_t d = 0;
  for (; d + LANES <= n; d += LANES) load(dst + d, src + d, LANES);
  if (d == n) return;
  std::memset(dst + d, 0, LANES * sizeof(float));
  load(dst + d, src + d, n - d);
}

TBCM_INLINE void read(float* dst, const Operand& x, int64_t at) {
  switch (x.type) {
    case Type::f32: read_as(dst, reinterpret_cast<const float*>(x.data) + at, x.width); break;
    case Type::bf16: read_as(dst, reinterpret_cast<const bfloat16*>(x.data) + at, x.width); break;
    case Type::f16: read_as(dst, reinterpret_cast<const float16*>(x.data) + at, x.width); break;
  }
}

template <class T>
TBCM_INLINE void write_as(T* dst, const float* src, float factor, int64_t n) {
  int64_t d = 0;
  for (; d + LANES <= n; d += LANES) put(dst + d, get(src + d) * factor, LANES);
  for (; d < n; ++d) narrow(src[d] * factor, &dst[d]);
}

TBCM_CLONES static void write(const Operand& x, int64_t at, const float* src, float factor) {
  switch (x.type) {
    case Type::f32: write_as(reinterpret_cast<float*>(x.data) + at, src, factor, x.width); break;
    case Type::bf16: write_as(reinterpret_cast<bfloat16*>(x.data) + at, src, factor, x.width); break;
    case Type::f16: write_as(reinterpret_cast<float16*>(x.data) + at, src, factor, x.width); break;
  }
}

// RMSNorm of the rows of an operand, by each head or over all: r, and m = mean(x tx) of each lane.
struct Norm {
  bool all_heads = false;
  std::vector<float> weight;  // [D], or [H, D] over all heads, rows padded with zeros; empty: no norm
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

  TBCM_INLINE bool hidden(int64_t b, int64_t n) const { return n >= tokens || (seen && !seen[b * tokens + n]); }
};

// Row n of the primal, or of a lane of the tangent: w r (tx - x r^2 m) where there is a norm; n may lie beyond the end.
TBCM_INLINE void read_row(float* dst, const Input& in, bool moving, int64_t l, int64_t b, int64_t h, int64_t n) {
  if (in.hidden(b, n)) return void(std::memset(dst, 0, in.padded() * sizeof(float)));
  read(dst, moving ? in.tx : in.x, moving ? in.tx.offset(l, b, h, n) : in.x.offset(0, b, h, n));
  if (in.norm.weight.empty()) return;
  const float* w = in.norm.weight.data() + (in.norm.all_heads ? h * in.padded() : 0);
  const float r = in.norm.r[in.statistic(0, b, h, n)];
  if (moving) {
    float row[MAX_WIDTH];
    read(row, in.x, in.x.offset(0, b, h, n));
    const float drift = r * in.norm.m[in.statistic(l, b, h, n)];
    for (int64_t d = 0; d < in.padded(); d += LANES)
      for (int64_t i = d; i < d + LANES; ++i) dst[i] -= row[i] * r * drift;  // r * r may overflow
  }
  for (int64_t d = 0; d < in.padded(); d += LANES)
    for (int64_t i = d; i < d + LANES; ++i) dst[i] *= w[i] * r;
}

// Consecutive pieces of a thread's scratch, each on a cache line.
struct Arena {
  float* at;
  TBCM_INLINE float* take(int64_t floats) {
    float* piece = at;
    at += round_up(floats, LANES);
    return piece;
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

TBCM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Sums of products in fp64: D = G.O is subtracted from GV', which is nearly the same where few keys are seen.
typedef double Doubles __attribute__((vector_size(LANES * sizeof(double))));

TBCM_INLINE double exact_dot(const float* a, const float* b, int64_t n) {
  Doubles sum = {};
  for_lanes(0, n, [&](int64_t d, auto there) __attribute__((always_inline)) {
    sum += __builtin_convertvector(get(a + d, there), Doubles) * __builtin_convertvector(get(b + d, there), Doubles);
  });
  return total(sum);
}

TBCM_INLINE float dot(const float* a, const float* b, int64_t n) { return float(exact_dot(a, b, n)); }

TBCM_INLINE void zero(float* x, int64_t n) { std::memset(x, 0, n * sizeof(float)); }

inline Type type_of(const Tensor& x) {
  using torch::headeronly::ScalarType;
  return x.scalar_type() == ScalarType::BFloat16 ? Type::bf16 : x.scalar_type() == ScalarType::Half ? Type::f16 : Type::f32;
}

// [B, H, N, D], or [T, B, H, N, D]; the Python adapter has made the last stride 1.
inline Operand operand(const Tensor& x) {
  const int64_t d = x.dim() - 4;
  return {pointer<char>(x), type_of(x), d ? x.stride(0) : 0, x.stride(d), x.stride(d + 1), x.stride(d + 2), x.size(d + 3)};
}

inline Operand operand(const Maybe& x) { return x ? operand(*x) : Operand{}; }

// Heads that lie side by side, and fit into a row of scratch, are read as one.
TBCM_INLINE int64_t heads_in_a_row(const Operand& x) { return x.head == x.width ? MAX_WIDTH / x.width : 1; }

// m heads of a token, from `at` on.
TBCM_INLINE void read_heads(float* dst, Operand x, int64_t m, int64_t at) {
  x.width *= m;
  read(dst, x, at);
}

// The row statistics of an input's norm: r of each row, and mean(x tx) of each lane, for some rows.
TBCM_CLONES static void measure_rows(Input& in, int64_t lanes, float eps, int64_t begin, int64_t end) {
  const int64_t heads = in.norm.all_heads ? 1 : in.heads, summed = in.norm.all_heads ? in.heads : 1;
  const int64_t rows = in.batch * heads * in.tokens, width = in.x.width * summed;
  const int64_t step = smaller(heads_in_a_row(in.x), in.tx ? heads_in_a_row(in.tx) : MAX_WIDTH);
  float x[MAX_WIDTH], tx[MAX_WIDTH];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row % in.tokens, h = row / in.tokens % heads, b = row / in.tokens / heads;
    for (int64_t l = -1; l < (in.tx ? lanes : 0); ++l) {
      double sum = 0;
      for (int64_t s = 0; s < summed; s += step) {
        const int64_t m = smaller(step, summed - s);
        read_heads(x, in.x, m, in.x.offset(0, b, h + s, n));
        if (l >= 0) read_heads(tx, in.tx, m, in.tx.offset(l, b, h + s, n));
        sum += exact_dot(x, l >= 0 ? tx : x, m * in.x.width);
      }
      const float mean = float(sum / double(width));
      if (l < 0) in.norm.r[row] = 1 / __builtin_sqrtf(mean + eps);
      else in.norm.m[l * rows + row] = mean;
    }
  }
}

inline void measure(Input& in, int64_t lanes, double eps) {
  const int64_t rows = in.batch * (in.norm.all_heads ? 1 : in.heads) * in.tokens;
  in.norm.r.resize(rows);
  in.norm.m.resize(in.tx ? lanes * rows : 0);
  const int64_t cost = in.x.width * (in.norm.all_heads ? in.heads : 1) * (1 + lanes);
  parallel(rows, cost, [&](int64_t begin, int64_t end) { measure_rows(in, lanes, float(eps), begin, end); });
}

inline Input input(const Tensor& x, const Maybe& tx, const Maybe& weight, int64_t lanes, double eps) {
  Input in{operand(x), operand(tx), x.size(1), x.size(2), x.size(0)};
  if (weight) {
    in.norm.all_heads = weight->size(0) != x.size(3);
    const int64_t heads = in.norm.all_heads ? in.heads : 1;
    in.norm.weight.resize(heads * in.padded());
    for (int64_t h = 0; h < heads; ++h)
      load(in.norm.weight.data() + h * in.padded(), pointer<const float>(*weight) + h * in.x.width, in.x.width);
    measure(in, lanes, eps);
  }
  return in;
}

}  // namespace tbcm
