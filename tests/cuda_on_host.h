// Runs CUDA kernels on the host: the threads of a block are fibers that take turns, and wait for one
// another where they exchange values. Included before a kernel's source, in place of nvcc.
//
// Asynchronous copies arrive no sooner than they are waited for, and a block's shared memory begins as NaNs.
//
// Launches differ in the order of threads, so that a missing barrier shows: as they are or in reverse, each in turn
// or one warp as far as it comes. A case launches three kernels, so its second run meets other orders and gives
// other bits.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __maxnreg__(...)

struct float2 {
  float x, y;
};
struct dim3 {
  unsigned x;
};
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 0, cudaDevAttrMaxSharedMemoryPerBlockOptin = 0,
              cudaDevAttrMultiProcessorCount = 1;
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

inline dim3 blockIdx, blockDim, threadIdx;

namespace fibers {

constexpr int WARP = 32, STACK = 1 << 16;

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  std::vector<char> stack = std::vector<char>(STACK);
  bool started, done;
  int waits;  // for how many threads: those of its warp, or of its block
  int times[2];  // it has waited for its warp, and for its block
};

inline std::vector<Fiber> all;
inline std::vector<float> exchanged;
inline std::function<void()> body;
inline jmp_buf scheduler;
inline int current;

struct Copy {
  void* to;
  const void* from;  // null for zeros
  size_t bytes;
};
inline std::vector<std::vector<std::vector<Copy>>> copies;  // of each thread, in groups; the last is open
alignas(16) inline unsigned char shared[228 << 10];

inline void copy(void* to, const void* from, size_t bytes) { copies[current].back().push_back({to, from, bytes}); }
inline void commit() { copies[current].emplace_back(); }
// WITHOUT_WAITS is a planted fault, as WITHOUT_BARRIERS below.
inline void wait_for_copies(int left) {
  static const bool without = std::getenv("WITHOUT_WAITS") != nullptr;
  auto& groups = copies[current];
  while (!without && int(groups.size()) - 1 > left) {
    for (const Copy& c : groups.front())
      if (c.from) std::memcpy(c.to, c.from, c.bytes);
      else std::memset(c.to, 0, c.bytes);
    groups.erase(groups.begin());
  }
}

inline void wait(int threads) {
  all[current].waits = threads;
  ++all[current].times[threads > WARP];
  if (!_setjmp(all[current].at)) _longjmp(scheduler, 1);
}

inline void enter() {
  body();
  all[current].done = true;
  _longjmp(scheduler, 1);
}

inline void resume(int thread) {
  Fiber& f = all[thread];
  current = thread;
  threadIdx.x = unsigned(thread);
  f.waits = 0;
  if (_setjmp(scheduler)) return;
  if (f.started) _longjmp(f.at, 1);
  f.started = true;
  getcontext(&f.start);
  f.start.uc_stack.ss_sp = f.stack.data();
  f.start.uc_stack.ss_size = STACK;
  makecontext(&f.start, enter, 0);
  setcontext(&f.start);
}

// Whether all threads that this one waits for have come as far; those that have ended count.
inline bool ready(int thread, int threads) {
  const int group = all[thread].waits, kind = group > WARP;
  if (group == 0) return true;
  for (int i = thread / group * group; i < thread / group * group + group && i < threads; ++i)
    if (!all[i].done && all[i].times[kind] < all[thread].times[kind]) return false;
  return true;
}

inline void run_block(int threads, int launch) {
  std::memset(shared, 0xff, sizeof shared);
  copies.assign(threads, {{}});
  for (int i = 0; i < threads; ++i) {
    all[i].started = all[i].done = false;
    all[i].waits = all[i].times[0] = all[i].times[1] = 0;
  }
  for (int left = threads; left > 0;) {
    std::vector<int> able;  // decided before anyone moves on
    for (int i = 0; i < threads; ++i)
      if (!all[i].done && ready(i, threads)) able.push_back(i);
    if (able.empty()) __builtin_trap();  // threads that wait for one another for ever
    if (launch % 2) std::reverse(able.begin(), able.end());
    if (launch / 2 % 2) {
      const int warp = able[0] / WARP;
      std::erase_if(able, [&](int i) { return i / WARP != warp; });
    }
    for (const int i : able) {
      resume(i);
      left -= all[i].done;
    }
  }
}

}  // namespace fibers

// WITHOUT_BARRIERS is the planted fault that the proofs must find.
inline void __syncthreads() {
  static const bool without = std::getenv("WITHOUT_BARRIERS") != nullptr;
  if (!without) fibers::wait(int(blockDim.x));
}

inline void __syncwarp() {
  static const bool without = std::getenv("WITHOUT_BARRIERS") != nullptr;
  if (!without) fibers::wait(fibers::WARP);
}

inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }

inline float __shfl_xor_sync(unsigned, float v, int lanes) {
  const int me = fibers::current;
  fibers::exchanged[me] = v;
  fibers::wait(fibers::WARP);
  const float got = fibers::exchanged[me ^ lanes];
  fibers::wait(fibers::WARP);
  return got;
}

inline cudaError_t cudaGetDevice(int*) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : int(sizeof fibers::shared);
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, int, int) { return cudaSuccess; }

inline int launches = 0;

template <class P>
cudaError_t cudaLaunchKernel(void (*kernel)(P), dim3 blocks, dim3 threads, void** arguments, size_t, cudaStream_t) {
  ++launches;
  blockDim = threads;
  if (fibers::all.size() < threads.x) fibers::all.resize(threads.x);
  fibers::exchanged.resize(threads.x);
  fibers::body = [=] { kernel(*static_cast<P*>(arguments[0])); };
  for (blockIdx.x = 0; blockIdx.x < blocks.x; ++blockIdx.x) fibers::run_block(int(threads.x), launches);
  return cudaSuccess;
}
