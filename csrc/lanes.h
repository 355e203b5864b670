// Sixteen floats at a time, through the compiler's vector types: the clones of TBCM_CLONES lower them
// to one, two or four registers. Loops where that is too slow take the vector type as a parameter.
#pragma once

#include <type_traits>

#include "vector.h"

namespace tbcm {

constexpr int64_t LANES = 16;
typedef float Lanes __attribute__((vector_size(64)));
template <class Vector>
constexpr int64_t lanes = sizeof(Vector) / sizeof(float);

template <class Vector = Lanes>
TBCM_INLINE Vector get(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class Vector>
TBCM_INLINE void put(float* p, Vector v) {
  std::memcpy(p, &v, sizeof v);
}

// Scratch that starts on a cache line.
TBCM_INLINE float* aligned_scratch(int64_t floats) {
  const auto address = reinterpret_cast<uintptr_t>(scratch(floats + LANES));
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

// The first n lanes of a row of T; the others are zero.
template <class Vector = Lanes, class T>
TBCM_INLINE Vector get(const T* p, int64_t n) {
  float buffer[lanes<Vector>] = {};
  if (n == lanes<Vector>) {
    for (int64_t i = 0; i < lanes<Vector>; ++i) buffer[i] = widen(p[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) buffer[i] = widen(p[i]);
  }
  return get<Vector>(buffer);
}

// narrow() of all lanes; left to itself the compiler takes them one by one, for the sake of the NaN.
template <class Vector>
TBCM_INLINE void narrow(Vector v, bfloat16* p) {
  using Words = decltype(v < v);
  typedef uint16_t Halves __attribute__((vector_size(sizeof(Vector) / 2)));
  Words u;
  std::memcpy(&u, &v, sizeof u);
  const Words nan = (0x7f800000 - (u & 0x7fffffff)) >> 31;  // all ones, or zero
  u &= ~nan;  // whose sum would overflow
  u = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  const Halves bits = __builtin_convertvector(u | (nan & 0x7fc0), Halves);
  std::memcpy(p, &bits, sizeof bits);
}

template <class T, class Vector>
TBCM_INLINE void put(T* p, Vector v, int64_t n) {
  float buffer[lanes<Vector>];
  put(buffer, v);
  if (n == lanes<Vector>) {
    if constexpr (std::is_same_v<T, bfloat16>) narrow(v, p);
    else for (int64_t i = 0; i < lanes<Vector>; ++i) narrow(buffer[i], &p[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) narrow(buffer[i], &p[i]);
  }
}

// Calls f(i, n) with the n lanes at each i of a row. Those of a whole vector are a constant: loops then call no memcpy,
// which would empty the registers. f must be inlined too, or it is compiled for the baseline.
template <class Vector = Lanes, class F>
TBCM_INLINE void for_lanes(int64_t begin, int64_t end, const F& f) {
  constexpr int64_t width = lanes<Vector>;
  for (; begin + width <= end; begin += width) f(begin, std::integral_constant<int64_t, width>{});
  if (begin < end) f(begin, end - begin);
}

// Calls f(begin, end) for each block of a row. Sums of a block in fp32, and of the blocks in fp64, keep a wide row's digits
// in every instruction set.
template <class F>
TBCM_INLINE void for_blocks(int64_t n, const F& f) {
  constexpr int64_t BLOCK = 512;
  for (int64_t begin = 0; begin < n; begin += BLOCK) f(begin, begin + BLOCK < n ? begin + BLOCK : n);
}

// x *= factor, of n numbers or up to a vector more.
template <class Vector>
TBCM_INLINE void rescale(float* x, float factor, int64_t n) {
  for (int64_t j = 0; j < n; j += lanes<Vector>) put(x + j, get<Vector>(x + j) * factor);
}

// The sum of all lanes, by halves.
template <class Vector>
TBCM_INLINE auto total(Vector v) {
  using Number = std::remove_cvref_t<decltype(v[0])>;
  if constexpr (sizeof v == 2 * sizeof(Number)) return v[0] + v[1];
  else {
    typedef Number Half __attribute__((vector_size(sizeof(Vector) / 2)));
    Half halves[2];
    std::memcpy(halves, &v, sizeof v);
    return total(Half(halves[0] + halves[1]));
  }
}

// exp(x) within 1.1 units in the last place for -87.3 <= x < 88.3; 0 below, infinity above, and
// a NaN stays a NaN. x = n ln 2 + r, |r| <= ln 2 / 2, and a polynomial of degree 7 for exp(r).
template <class Vector>
TBCM_INLINE Vector exponential(Vector x) {
  using Integers = decltype(x < x);
  const Integers tiny = x < -87.3f;
  x = x > 89.f ? Vector{} + 89.f : x;
  x = tiny ? Vector{} - 87.3f : x;
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vector n = (x * 1.44269504f + magic) - magic;
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector p = r * (1.f / 5040.f) + 1.f / 720.f;
  p = p * r + 1.f / 120.f;
  p = p * r + 1.f / 24.f;
  p = p * r + 1.f / 6.f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.f;
  const Integers bits = (__builtin_convertvector(n, Integers) + 127) << 23;
  Vector power;
  std::memcpy(&power, &bits, sizeof power);
  return tiny ? Vector{} : p * power;
}

// sigmoid(x) and 1 - sigmoid(x) = sigmoid(-x), the latter without cancellation.
template <class Vector>
struct Logistic {
  Vector s, rest;
};

template <class Vector>
TBCM_INLINE Logistic<Vector> logistic(Vector x) {
  const Vector e = exponential(-x), s = 1.f / (1.f + e);
  return {s, e > 1.f ? 1.f - s : e * s};
}

}  // namespace tbcm
