// What the CUDA kernels share: wide accesses, sums over a block, launches. Free of PyTorch.
#pragma once

#include "vector.h"

#define TBCM_D __device__ __forceinline__

namespace tbcm {

constexpr int WARP = 32;

// V neighbours that move in one access of up to 16 bytes.
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T values[V];
};

// Element j. Of two bfloat16 in a register the upper one is a float already, but for its last bits.
template <class T, int V>
TBCM_D float widen(const Pack<T, V>& pack, int j) {
  return widen(pack.values[j]);
}
TBCM_D float widen(const Pack<bfloat16, 2>& pack, int j) {
  uint32_t bits;
  float x;
  std::memcpy(&bits, &pack, sizeof bits);
  bits = j == 0 ? bits << 16 : bits & 0xffff0000u;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// f(0), ..., f(N - 1), unrolled, so that arrays indexed by the argument stay in registers.
template <int N, class F>
TBCM_D void each(const F& f) {
#pragma unroll
  for (int i = 0; i < N; ++i) f(i);
}

// p + count * stride in one instruction: where compilers see that the product stays the same in a loop,
// they keep it in two registers and add it in two or four.
template <class T>
TBCM_D T* ahead(T* p, int count, int stride) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(stride));
#endif
  return p + int64_t(count) * stride;
}

// 2^x and 1 / x as the hardware has them: two units in the last place, and 0 for subnormal results.
TBCM_D float quick_exp2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

TBCM_D float quick_reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x > 0x1p126f ? 0.f : 1.f / x;
#endif
}

// Both sums over the threads of a block, in a fixed order; `partial` has a place for each warp.
TBCM_D float2 block_sum(float2 v, float2* partial) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) {
    v.x += __shfl_xor_sync(~0u, v.x, distance);
    v.y += __shfl_xor_sync(~0u, v.y, distance);
  }
  if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = v;
  __syncthreads();
  float2 total = {0.f, 0.f};
  for (int warp = 0; warp < int(blockDim.x) / WARP; ++warp) {
    total.x += partial[warp].x;
    total.y += partial[warp].y;
  }
  return total;
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether every row starts at a multiple of 16 bytes.
template <class T>
bool aligned(const Rows<T>& rows) {
  return aligned(rows.data) && rows.stride_b * sizeof(T) % 16 == 0 && rows.stride_n * sizeof(T) % 16 == 0;
}

// Queues the kernel; null, or what is wrong.
template <class P>
const char* start(void (*kernel)(P), int64_t blocks, int threads, const P& p, void* stream) {
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "the tensors are too large for one grid";
  void* arguments[] = {const_cast<P*>(&p)};
  const cudaError_t error =
      cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(threads), arguments, 0, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// The launches of an op, for every element type; stands in the op's namespace.
#define TBCM_INSTANCES_OF(T)                             \
  template const char* launch(const Forward<T>&, void*); \
  template const char* launch(const Backward<T>&, void*);
#define TBCM_INSTANCES TBCM_INSTANCES_OF(float) TBCM_INSTANCES_OF(bfloat16) TBCM_INSTANCES_OF(float16)

}  // namespace tbcm
