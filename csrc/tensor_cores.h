// Products of 16x16 and 16x8 tiles of 16-bit numbers with sums in fp32, and fp32 numbers as sums of factors in bf16.
//
// A lane has group g = lane / 4 and t = lane % 4. It holds of a factor on the left [16, 16] the rows g, g + 8 at
// columns 2t, 2t + 1, 2t + 8, 2t + 9; of one on the right [16, 8] these rows at column g; of the sum [16, 8] the
// rows g, g + 8 at columns 2t, 2t + 1. Which dimension of a tensor a row or column stands for is the caller's.
#pragma once

#include <type_traits>

#include "cuda.h"

namespace tbcm {

// c += a b. The words of a: (row g, columns 2t, 2t + 1), (row g + 8, the same), then both at 2t + 8, 2t + 9.
template <class T = bfloat16>
TBCM_D void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(sizeof(T) == 2);
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, bfloat16>)
    asm volatile(  // so that it stays where all lanes of the warp are
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif !defined(__CUDACC__)
  fibers::multiply(c, a, b, [](uint16_t bits) { return widen(T{bits}); });
#endif
}

TBCM_D uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
TBCM_D float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Both numbers rounded, `low` in the lower half.
template <class T>
TBCM_D uint32_t narrow_both(float low, float high) {
  uint32_t word;
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, bfloat16>) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
#else
  T parts[2];
  narrow(low, parts);
  narrow(high, parts + 1);
  std::memcpy(&word, parts, sizeof parts);
#endif
  return word;
}

// Two numbers, `low` in the lower half of each word, as sums of N in bf16: all but the last cut off, not rounded.
template <int N>
struct Split {
  uint32_t words[N];
  TBCM_D static Split of(float low, float high) {
    Split split;
    each<N - 1>([&](int i) {
      split.words[i] = bits_of(low) >> 16 | (bits_of(high) & 0xffff0000u);
      low -= float_of(bits_of(low) & 0xffff0000u);
      high -= float_of(bits_of(high) & 0xffff0000u);
    });
    split.words[N - 1] = narrow_both<bfloat16>(low, high);
    return split;
  }
};

// Numbers of bf16 that make one of T, which has 16 bits.
template <class T>
constexpr int PARTS = 2;
template <>
inline constexpr int PARTS<bfloat16> = 1;

// Factors of which each word is a sum of N.
template <int N>
struct Left {
  uint32_t parts[N][4];
  TBCM_D void put(int word, float low, float high) {
    const auto split = Split<N>::of(low, high);
    each<N>([&](int i) { parts[i][word] = split.words[i]; });
  }
};
struct Right {
  uint32_t parts[3][2];
  TBCM_D void put(int word, float low, float high) {
    const auto split = Split<3>::of(low, high);
    each<3>([&](int i) { parts[i][word] = split.words[i]; });
  }
};

// The p-th of the products that make one of N and three parts, but for what is less than 2^-24 of it, the least first.
template <int N>
constexpr int PRODUCTS = N == 1 ? 3 : 5;
template <int N>
TBCM_D void multiply(int p, float (&c)[4], const Left<N>& a, const Right& b) {
  static_assert(N <= 2);
  const int i = N == 2 && p < 2 ? 1 : 0;
  multiply(c, a.parts[i], b.parts[i ? 1 - p : PRODUCTS<N> - 1 - p]);
}

}  // namespace tbcm
