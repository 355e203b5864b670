// Small fp32 matrix products on tiles in cache, for AVX-512, AVX2 and the baseline.
//
// A row of a tile starts on a cache line and is an odd number of lines long, so that a column of rows
// spreads over all sets of the first cache.
#pragma once

#include "lanes.h"

namespace tbcm {

typedef float Vector16 __attribute__((vector_size(64)));
typedef float Vector8 __attribute__((vector_size(32)));
typedef float Vector4 __attribute__((vector_size(16)));

// The block of the result that is held in registers: its vectors, those of eight columns, its rows and
// columns. A wide block asks for ten loads in sixteen products, half as many as one of 8 by 16.
struct Wide {
  using Vector = Vector16;
  using Half = Vector8;
  static constexpr int rows = 8, columns = 32;
};
struct Middle {
  using Vector = Vector8;
  using Half = Vector8;
  static constexpr int rows = 4, columns = 16;
};
struct Narrow {
  using Vector = Vector4;
  using Half = Vector4;
  static constexpr int rows = 2, columns = 16;
};

TBCM_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Floats from one row of a tile to the next.
TBCM_INLINE int64_t tile_stride(int64_t columns) { return ((columns + LANES - 1) / LANES | 1) * LANES; }

constexpr int64_t CHAIN = 32;

template <class Vector, int rows, int columns, bool Transposed>
TBCM_INLINE void block(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth,
                       bool add) {
  constexpr int width = lanes<Vector>, vectors = columns / width;
  Vector sum[rows][vectors] = {};
#pragma GCC unroll 2  // half of the branches; four turns are no faster
  for (int64_t k = 0; k < depth; ++k) {
    Vector row[vectors];
    for (int j = 0; j < vectors; ++j) row[j] = get<Vector>(b + k * ldb + j * width);
    for (int i = 0; i < rows; ++i) {
      const float x = Transposed ? a[k * lda + i] : a[i * lda + k];
      for (int j = 0; j < vectors; ++j) sum[i][j] += x * row[j];
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vectors; ++j) {
      float* at = c + i * ldc + j * width;
      put(at, add ? get<Vector>(at) + sum[i][j] : sum[i][j]);
    }
}

// C = A B, or C += A B; A is [m, depth], or [depth, m] where Transposed. m and n are rounded up to
// multiples of 8: the tiles have room for them. At most CHAIN terms are added one after the other, so
// that rounding does not grow with the depth.
template <class Isa, bool Transposed, bool Add>
TBCM_INLINE void blocks(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t m,
                        int64_t n, int64_t depth) {
  int64_t j = 0;
  const auto panels = [&]<class Vector, int columns>() __attribute__((always_inline)) {
    for (; j + columns - 8 < n; j += columns)
      for (int64_t k = 0; k == 0 || k < depth; k += CHAIN)
        for (int64_t i = 0; i < round_up(m, 8); i += Isa::rows) {
          const float* from = a + (Transposed ? k * lda + i : i * lda + k);
          const int64_t terms = depth - k < CHAIN ? depth - k : CHAIN;
          block<Vector, Isa::rows, columns, Transposed>(from, lda, b + k * ldb + j, ldb, c + i * ldc + j, ldc, terms,
                                                        Add || k > 0);
        }
  };
  panels.template operator()<typename Isa::Vector, Isa::columns>();
  if constexpr (Isa::columns > LANES) panels.template operator()<typename Isa::Vector, LANES>();
  panels.template operator()<typename Isa::Half, 8>();
}

#define TBCM_GEMM(Isa, attribute, name, transposed, add)                                                               \
  attribute __attribute__((noinline)) inline void name(Isa, const float* a, int64_t lda, const float* b, int64_t ldb,  \
                                                       float* c, int64_t ldc, int64_t m, int64_t n, int64_t depth) {   \
    blocks<Isa, transposed, add>(a, lda, b, ldb, c, ldc, m, n, depth);                                                 \
  }
#define TBCM_GEMMS(Isa, attribute)                      \
  TBCM_GEMM(Isa, attribute, set_product, false, false)  \
  TBCM_GEMM(Isa, attribute, add_product, false, true)   \
  TBCM_GEMM(Isa, attribute, add_transposed, true, true)

#if defined(__x86_64__) && defined(__GNUC__)
#define TBCM_WIDE __attribute__((target("arch=x86-64-v4")))
#define TBCM_MIDDLE __attribute__((target("arch=x86-64-v3")))
TBCM_GEMMS(Wide, TBCM_WIDE)
TBCM_GEMMS(Middle, TBCM_MIDDLE)
inline bool has_wide() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512cd");
}
inline bool has_middle() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
// run(p, begin, end) = function<Isa>(p, begin, end) for the best instruction set of this machine.
#define TBCM_RUN_BEST(Params, function)                                                                       \
  TBCM_WIDE void function##_wide(const Params& p, int64_t a, int64_t z) { function<Wide>(p, a, z); }          \
  TBCM_MIDDLE void function##_middle(const Params& p, int64_t a, int64_t z) { function<Middle>(p, a, z); }    \
  void function##_narrow(const Params& p, int64_t a, int64_t z) { function<Narrow>(p, a, z); }                \
  void run(const Params& p, int64_t a, int64_t z) {                                                           \
    using Run = void(const Params&, int64_t, int64_t);                                                        \
    static Run* const best = has_wide()     ? static_cast<Run*>(function##_wide)                              \
                             : has_middle() ? static_cast<Run*>(function##_middle)                            \
                                            : static_cast<Run*>(function##_narrow);                           \
    best(p, a, z);                                                                                            \
  }
#else
#define TBCM_RUN_BEST(Params, function) \
  void run(const Params& p, int64_t a, int64_t z) { function<Narrow>(p, a, z); }
#endif
TBCM_GEMMS(Narrow, )

}  // namespace tbcm
