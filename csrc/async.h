// Copies from global to shared memory that pass no register and are waited for later (cp.async).
#pragma once

#include "cuda.h"

namespace tbcm {

// An address in shared memory that stays in a register, since compilers would rather find it again at each use.
struct Shared {
#if defined(__CUDA_ARCH__)
  uint32_t address;
  TBCM_D explicit Shared(void* p) : address(uint32_t(__cvta_generic_to_shared(p))) { asm volatile("" : "+r"(address)); }
#else
  unsigned char* address;
  TBCM_D explicit Shared(void* p) : address(static_cast<unsigned char*>(p)) {}
#endif
  TBCM_D Shared operator+(int bytes) const {
    Shared moved = *this;
    moved.address += bytes;
    return moved;
  }
};

// Starts to copy a pack of 4, 8 or 16 bytes, or zeros where it is not `there`. One of 2 bytes is copied at once.
template <class Pack>
TBCM_D void copy_async(Shared to, const Pack* from, bool there = true) {
  constexpr int SIZE = int(sizeof(Pack));
  static_assert(SIZE == 2 || SIZE == 4 || SIZE == 8 || SIZE == 16);
#if defined(__CUDA_ARCH__)
  const int bytes = there ? SIZE : 0;
  if constexpr (SIZE == 2) {
    const uint16_t x = there ? *reinterpret_cast<const uint16_t*>(from) : uint16_t(0);
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(to.address), "h"(x) : "memory");
  } else if constexpr (SIZE == 16) {  // past L1, which only this size can
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address), "l"(from), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to.address), "l"(from), "n"(SIZE), "r"(bytes)
                 : "memory");
  }
#elif !defined(__CUDACC__)
  if (SIZE == 2) *reinterpret_cast<Pack*>(to.address) = there ? *from : Pack{};
  else fibers::copy(to.address, there ? from : nullptr, SIZE);
#endif
}

// The pack of 2, 4, 8 or 16 bytes at an address.
template <class Pack>
TBCM_D Pack load(Shared from) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Pack) == 2) {
    uint16_t x;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(from.address));
    return reinterpret_cast<const Pack&>(x);
  } else {
    uint4 x;
    if constexpr (sizeof(Pack) == 4) asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x.x) : "r"(from.address));
    else if constexpr (sizeof(Pack) == 8)
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(from.address));
    else
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(from.address));
    Pack pack;
    std::memcpy(&pack, &x, sizeof pack);
    return pack;
  }
#else
  return *reinterpret_cast<const Pack*>(from.address);
#endif
}

// Makes a group of the thread's copies since the last group.
TBCM_D void commit_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif !defined(__CUDACC__)
  fibers::commit();
#endif
}

// Waits until all but the last N groups of this thread are there, for this thread.
template <int N>
TBCM_D void wait_for_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#elif !defined(__CUDACC__)
  fibers::wait_for_copies(N);
#endif
}

// The block's shared memory whose size the launch says.
#if defined(__CUDACC__)
#define TBCM_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#define TBCM_DYNAMIC_SHARED(name) unsigned char* const name = fibers::shared
#endif

// Lets the kernel have so many bytes of it, beside at most `fixed` of static shared memory; null, or what is wrong.
template <class P>
const char* allow(void (*kernel)(P), int shared, int fixed) {
  if (shared + fixed <= 48 << 10) return nullptr;
  int device = 0, most = 0;  // more has to be asked for: always as much as there is, since others launch it too
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (shared + fixed > most) return "this GPU has too little shared memory for such rows; another impl takes them";
  cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                       most - fixed);
  return nullptr;
}

// Queues the kernel with it; null, or what is wrong.
template <class P>
const char* start(void (*kernel)(P), int64_t blocks, int threads, int shared, int fixed, const P& p, void* stream) {
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "the tensors are too large for one grid";
  if (const char* fault = allow(kernel, shared, fixed)) return fault;
  void* arguments[] = {const_cast<P*>(&p)};
  const cudaError_t error = cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(threads), arguments, size_t(shared),
                                             static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace tbcm
