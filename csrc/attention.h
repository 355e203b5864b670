// What the tiles of softmax attention are made of: packed keys and values, masks, and the arithmetic of
// a row of logits.
#pragma once

#include <limits>

#include "operands.h"

namespace tbcm::attention {

constexpr int64_t QUERIES = 128;
constexpr float HIDDEN = -std::numeric_limits<float>::infinity();

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

// Keys or values of one head: rows [S, D], and the transposed blocks [D, span] one after the other.
TBCM_CLONES static void pack_rows(float* dst, const Problem& p, const Input& x, bool moving, int64_t l, int64_t b, int64_t h) {
  for (int64_t n = 0; n < p.all_keys(); ++n) read_row(dst + n * tile_stride(x.x.width), x, moving, l, b, h, n);
}

TBCM_CLONES static void pack_transposed(float* dst, const Problem& p, const Input& x, bool moving, int64_t l, int64_t b,
                                 int64_t h) {
  float rows[LANES * MAX_WIDTH];
  for (int64_t j = 0; j < p.all_keys(); j += LANES) {
    float* corner = dst + j / p.span * x.x.width * p.span_stride() + j % p.span;
    for (int64_t i = 0; i < LANES; ++i) read_row(rows + i * MAX_WIDTH, x, moving, l, b, h, j + i);
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
TBCM_INLINE float greatest(const float* s, int64_t n) {
  Vector top = get<Vector>(s);
  for (int64_t j = lanes<Vector>; j < n; j += lanes<Vector>) {
    const Vector v = get<Vector>(s + j);
    top = v > top ? v : top;
  }
  float m = top[0];
  for (int64_t i = 1; i < lanes<Vector>; ++i) m = top[i] > m ? top[i] : m;
  return m;
}

// s = exp(s - shift); returns the sum.
template <class Vector>
TBCM_INLINE float exponentiate(float* s, float shift, int64_t n) {
  Vector sum = {};
  for (int64_t j = 0; j < n; j += lanes<Vector>) {
    const Vector e = exponential(get<Vector>(s + j) - shift);
    put(s + j, e);
    sum += e;
  }
  return total(sum);
}

// The sum of e t.
template <class Vector>
TBCM_INLINE float moment(const float* t, const float* e, int64_t n) {
  Vector sum = {};
  for (int64_t j = 0; j < n; j += lanes<Vector>) sum += get<Vector>(e + j) * get<Vector>(t + j);
  return total(sum);
}

// t = e (scale t - center); returns the sum.
template <class Vector>
TBCM_INLINE float weigh(float* t, const float* e, float scale, float center, int64_t n) {
  Vector sum = {};
  for (int64_t j = 0; j < n; j += lanes<Vector>) {
    const Vector v = get<Vector>(e + j) * (get<Vector>(t + j) * scale - center);
    put(t + j, v);
    sum += v;
  }
  return total(sum);
}

}  // namespace tbcm::attention
