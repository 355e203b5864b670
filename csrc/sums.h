// The kernel that adds the parts of parameters' gradients, which the blocks of a backward kernel leave behind.
#pragma once

#include "cuda.h"

namespace tbcm {

constexpr int SUM_WARPS = 8, AHEAD = 8;  // of a block; loads of a thread

// A block adds a strip of columns, LANES threads side by side on V each, in a fixed order. Many parts are left to many
// threads, few of them to each: what takes time is to wait for them. Few parts are left to few threads, for whom they
// are on their way together.
template <int V, int LANES>
__global__ void __launch_bounds__(SUM_WARPS * WARP) sum_kernel(const Sums p) {
  constexpr int COLUMNS = LANES * V, STEP = SUM_WARPS * WARP / LANES;
  using Own = Pack<float, V>;
  __shared__ Own partial[SUM_WARPS][LANES];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int64_t strip = blockIdx.x % p.strips(COLUMNS);
  const int64_t b = blockIdx.x / p.strips(COLUMNS);
  Sum own = p.of[0];
  each<2>([&](int i) {
    if (strip < own.strips(COLUMNS)) return;
    strip -= own.strips(COLUMNS);
    own = p.of[i + 1];
  });
  const int64_t first = strip * COLUMNS, column = first + lane % LANES * V;
  float sum[V] = {};
  if (column < own.width) {
    const float* from = own.parts + b * p.count * own.width + column;
    for (int64_t i = threadIdx.x / LANES; i < p.count; i += AHEAD * STEP) {
      Own parts[AHEAD] = {};  // on their way together
      each<AHEAD>([&](int k) {
        if (i + k * STEP < p.count) parts[k] = *reinterpret_cast<const Own*>(from + (i + k * STEP) * own.width);
      });
      each<AHEAD * V>([&](int k) { sum[k % V] += parts[k / V].values[k % V]; });
    }
  }
#pragma unroll
  for (int distance = LANES; distance < WARP; distance *= 2)
    each<V>([&](int j) { sum[j] += __shfl_xor_sync(~0u, sum[j], distance); });
  if (lane < LANES) each<V>([&](int j) { partial[warp][lane].values[j] = sum[j]; });
  __syncthreads();
  if (int(threadIdx.x) < COLUMNS && first + int(threadIdx.x) < own.width) {
    float total = 0.f;
    for (int i = 0; i < SUM_WARPS; ++i) total += partial[i][threadIdx.x / V].values[threadIdx.x % V];
    own.sum[b * own.width + first + threadIdx.x] = total;
  }
}

template <int V, int LANES>
const char* start_sums(const Sums& p, void* stream) {
  return start(sum_kernel<V, LANES>, p.batch * p.strips(V * LANES), SUM_WARPS * WARP, p, stream);
}

// Queues it, if there is anything to add; null, or what is wrong.
inline const char* start(const Sums& p, void* stream) {
  bool vectors = true;
  for (const Sum& s : p.of) vectors = vectors && s.width % 4 == 0 && aligned(s.parts);
  if (p.count <= 64) return vectors ? start_sums<4, 32>(p, stream) : start_sums<1, 32>(p, stream);
  if (p.count > 256) return vectors ? start_sums<4, 2>(p, stream) : start_sums<1, 2>(p, stream);
  return vectors ? start_sums<4, 8>(p, stream) : start_sums<1, 8>(p, stream);
}

}  // namespace tbcm
