// Element types shared by all kernels, and loop helpers of those for CPUs.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>

// One source, three instruction sets: the loader picks AVX-512, AVX2 or the baseline at run time.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define TBCM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TBCM_CLONES
#endif
// run(p, begin, end) for both element types, each compiled for all instruction sets.
#define TBCM_RUN(Params, function)                                                   \
  TBCM_CLONES void run(const Params<float>& p, int64_t begin, int64_t end) {         \
    function(p, begin, end);                                                         \
  }                                                                                  \
  TBCM_CLONES void run(const Params<bfloat16>& p, int64_t begin, int64_t end) {      \
    function(p, begin, end);                                                         \
  }
#define TBCM_INLINE inline __attribute__((always_inline))

#if defined(__CUDACC__)
#define TBCM_HD __host__ __device__ __forceinline__
#else
#define TBCM_HD TBCM_INLINE
#endif

namespace tbcm {

struct bfloat16 {
  uint16_t bits;
};

TBCM_HD float widen(float x) { return x; }

TBCM_HD float widen(bfloat16 x) {
  float f;
#if defined(__CUDA_ARCH__)
  asm("mov.b32 %0, {0, %1};" : "=f"(f) : "h"(x.bits));
#else
  uint32_t u = uint32_t(x.bits) << 16;
  std::memcpy(&f, &u, sizeof f);
#endif
  return f;
}

TBCM_HD void narrow(float x, float* out) { *out = x; }

// Round to nearest even; a NaN stays a NaN.
TBCM_HD void narrow(float x, bfloat16* out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
#else
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  out->bits = uint16_t(x != x ? 0x7fc0u : rounded);
#endif
}

struct float16 {
  uint16_t bits;
};

// The exponent is shifted by a product, which also makes subnormal numbers normal.
TBCM_HD float widen(float16 x) {
  float f;
#if defined(__CUDA_ARCH__)
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
#else
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  const uint32_t special = (x.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  std::memcpy(&f, &magnitude, sizeof f);
  f *= 5.192296858534828e33f;  // 2^112
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  u |= special | uint32_t(x.bits & 0x8000u) << 16;
  std::memcpy(&f, &u, sizeof f);
#endif
  return f;
}

// Round to nearest even; too large becomes infinite, and a NaN stays a NaN.
TBCM_HD void narrow(float x, float16* out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
#else
  uint32_t u, small;
  std::memcpy(&u, &x, sizeof u);
  const uint32_t sign = u >> 16 & 0x8000u;
  u &= 0x7fffffffu;
  float f;
  std::memcpy(&f, &u, sizeof f);
  f += 0.5f;  // subnormal halves are the last bits of a sum with one half
  std::memcpy(&small, &f, sizeof small);
  const uint32_t normal = (u + 0xc8000fffu + (u >> 13 & 1u)) >> 13;
  uint32_t bits = u < 0x38800000u ? small - 0x3f000000u : normal;
  bits = u >= 0x477ff000u ? 0x7c00u : bits;
  out->bits = uint16_t(sign | (u > 0x7f800000u ? 0x7e00u : bits));
#endif
}

template <class T>
TBCM_INLINE void load(float* dst, const T* src, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) dst[i] = widen(src[i]);
}

// Writes a row and leaves in `src` what was stored, so that later arithmetic sees the stored values.
template <class T>
TBCM_INLINE void store(T* dst, float* src, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    narrow(src[i], &dst[i]);
    src[i] = widen(dst[i]);
  }
}

// dst += a (row of T) * b (row of float); a null b means 1.
template <class T>
TBCM_INLINE void multiply_add(float* dst, const T* a, const float* b, int64_t n) {
  if (b) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) dst[i] += widen(a[i]) * b[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) dst[i] += widen(a[i]);
  }
}

// A [B, N, C] operand with unit stride along C, or nothing; a stride of 0 broadcasts.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t stride_b = 0, stride_n = 0;
  TBCM_HD explicit operator bool() const { return data != nullptr; }
  TBCM_HD T* at(int64_t b, int64_t n) const {
    return data ? data + b * stride_b + n * stride_n : nullptr;
  }
};

// Parts of a gradient, [batch, count, width], and the place of their sums, [batch, width].
struct Sum {
  float *parts = nullptr, *sum = nullptr;
  int64_t width = 0;
  TBCM_HD int64_t strips(int64_t columns) const { return (width + columns - 1) / columns; }
};

// Those of one backward pass.
struct Sums {
  Sum of[3];
  int64_t batch = 0, count = 0;
  TBCM_HD int64_t strips(int64_t columns) const {
    return of[0].strips(columns) + of[1].strips(columns) + of[2].strips(columns);
  }
};

// Scratch of a thread, kept between calls and not initialised.
struct Scratch {
  std::unique_ptr<float[]> data;
  int64_t size = 0;
};

inline Scratch& own_scratch() {
  static thread_local Scratch own;
  return own;
}

inline float* scratch(int64_t floats) {
  Scratch& own = own_scratch();
  if (own.size < floats) {
    own.data.reset();  // first, so that both are never there together
    own.data.reset(new float[floats]);
    own.size = floats;
  }
  return own.data.get();
}

// Gives back what is too much to keep.
inline void trim_scratch() {
  constexpr int64_t kept = 1 << 21;  // 8 MiB
  if (own_scratch().size > kept) own_scratch() = {};
}

}  // namespace tbcm
