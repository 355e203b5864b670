// CUDA kernels of rms_norm: a warp keeps a row in registers, or a block a wide one; in backward a block walks a
// chunk of rows, which wait in shared memory.
//
// Floor: forward reads x and writes y, with the tangent twice that, and backward reads gy, x and writes gx, at
// about 3 FLOPs a byte.
#include "rms_norm.h"
#include "rows.h"
#include "sums.h"

namespace tbcm::rms_norm {
namespace {


template <class T, class S, bool TANGENT>
__global__ void __launch_bounds__(S::ALONE ? ROWS * WARP : MAX_WARPS * WARP, S::ALONE ? 5 : 1)
    forward_kernel(const Forward<T> p) {
  alignas(16) __shared__ float2 partial[PARTIALS];
  const int width = int(p.width);
  const int64_t n = S::ALONE ? int64_t(blockIdx.x) * ROWS + threadIdx.x / WARP : blockIdx.x;
  if (n >= p.count) return;
  const Part<T, S> x(p.x.at(0, n), width), tx(TANGENT ? p.tx.at(0, n) : nullptr, width);
  const float2 mean = means<S, true>(width, partial, [&](int i) { return float2{x[i] * x[i], x[i] * tx[i]}; });
  const float r = rsqrtf(mean.x + p.eps), m = mean.y;
  const auto ones = Few<float, S::V>::of([](int) { return 1.f; });
  const Place<const float, S> weights(p.weight, width), tweights(TANGENT ? p.tweight : nullptr, width);
  const Place<T, S> y(p.y.at(0, n), width), ty(p.ty.at(0, n), width);
  each<S::PACKS>([&](int k) {
    const auto weight = weights.get(k, ones);
    y.put(k, Few<T, S::V>::of([&](int j) { return weight[j] * x.packs[k][j] * r; }));
    if (TANGENT) {
      const auto tweight = tweights.get(k);
      ty.put(k, Few<T, S::V>::of([&](int j) {
        const float moved = p.tx ? weight[j] * tangent(x.packs[k][j], tx.packs[k][j], m, r) : 0.f;
        return p.tweight ? moved + tweight[j] * x.packs[k][j] * r : moved;
      }));
    }
  });
}

template <class T, class S>
__global__ void __maxnreg__(80) backward_kernel(const Backward<T> p) {
  alignas(16) __shared__ float2 partial[2][PARTIALS];
  TBCM_DYNAMIC_SHARED(shared);
  enum { X, GY };
  Queue<S, 2, sizeof(T)> queue(shared);
  const int width = int(p.width);
  const int64_t first = int64_t(blockIdx.x) * p.chunk;
  const int rows = int(p.chunk < p.count - first ? p.chunk : p.count - first);
  Walk xs(p.x, true, 0, first), gys(p.gy, true, 0, first);
  Walk gxs(p.gx, true, 0, first);
  const auto ask = [&] {
    queue.ask(X, xs.next(), width);
    queue.ask(GY, gys.next(), width);
  };
  const auto ones = Few<float, S::V>::of([](int) { return 1.f; });
  const Place<const float, S> weights(p.weight, width);
  Few<float, S::V> weight[S::PACKS];
  each<S::PACKS>([&](int k) { weight[k] = weights.get(k, ones); });
  float gweight[S::E] = {};
  queue.begin(ask);
  for (int row = 0; row < rows; ++row) {
    queue.step(row, rows, ask);
    const auto x = queue.template get<T>(X), gy = queue.template get<T>(GY);
    float g[S::E];
    each<S::E>([&](int i) { g[i] = weight[i / S::V][i % S::V] * gy[i]; });
    const auto squares = [&](int i) { return float2{x[i] * x[i], x[i] * g[i]}; };
    const float2 mean = means<S, true>(width, partial[row % 2], squares);
    const float r = rsqrtf(mean.x + p.eps);
    each<S::E>([&](int i) { gweight[i] += gy[i] * x[i] * r; });
    const Place<T, S> gx(gxs.next(), width);
    each<S::PACKS>([&](int k) {
      gx.put(k, Few<T, S::V>::of([&](int j) { return gradient(x.packs[k][j], g[k * S::V + j], mean.y, r); }));
    });
  }
  const Place<float, S> sums(p.gweight.at(0, blockIdx.x), width);
  each<S::PACKS>([&](int k) { sums.put(k, Few<float, S::V>::of([&](int j) { return gweight[k * S::V + j]; })); });
}

template <class S, class T>
const char* launch_rows(const Forward<T>& p, void* stream) {
  const auto kernel = p.ty ? forward_kernel<T, S, true> : forward_kernel<T, S, false>;
  return start_rows<S>(kernel, p.count, p, stream);
}

template <class S, class T>
const char* launch_rows(const Backward<T>& p, void* stream) {
  const int threads = threads_of(p.width, S::E);
  const int64_t chunks = (p.count + p.chunk - 1) / p.chunk;
  const int shared = Queue<S, 2, sizeof(T)>::bytes(threads);
  return start(backward_kernel<T, S>, chunks, threads, shared, PARTIAL_BYTES, p, stream);
}

constexpr const char* TOO_WIDE = "the CUDA kernels of rms_norm take widths up to 4096";

}  // namespace

template <class T>
const char* launch(const Forward<T>& p, void* stream) {
  constexpr int V = 16 / sizeof(T), E = 5 * V;
  if (p.width > MAX_WIDTH) return TOO_WIDE;
  const bool vectors = p.width % V == 0 && all_aligned(p.x, p.tx, p.weight, p.tweight, p.y, p.ty);
  if (!vectors) return launch_rows<Spread<1, 8, false>>(p, stream);
  if (p.width <= WARP * V) return launch_rows<Spread<V, V, true>>(p, stream);
  if (p.width <= WARP * E) return launch_rows<Spread<V, E, true>>(p, stream);
  return launch_rows<Spread<V, E, false>>(p, stream);
}

template <class T>
const char* launch(const Backward<T>& p, void* stream) {
  if (p.width > MAX_WIDTH) return TOO_WIDE;
  const bool vectors = p.width % 4 == 0 && all_aligned(p.gy, p.x, p.weight, p.gx, p.gweight);
  const char* fault = vectors ? launch_rows<Spread<4, 12, false>>(p, stream) : launch_rows<Spread<1, 8, false>>(p, stream);
  return fault ? fault : start(p.sums, stream);
}

TBCM_INSTANCES

}  // namespace tbcm::rms_norm
