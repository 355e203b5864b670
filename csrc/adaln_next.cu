// The next CUDA kernels of adaln: a warp keeps a row in registers, or a block a wide one; in backward two warps
// or more walk a chunk of rows.
//
// Floor: each operand of x's size crosses the memory bus once, 8 of them forward with all tangents and 6
// backward. What a row takes beside its elements (operands that may be absent, addresses, sums over threads) is
// the same for 8 elements a thread as for 40, so a thread has as many as its registers hold: 40 of 16 bits or 20
// of 32 forward, 20 in backward, beside whose 60 sums for the parameters the row waits in shared memory.
#include "next.h"
#include "rows.h"

namespace tbcm::adaln::next {
namespace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int REGISTERS = 136;
#else
constexpr int REGISTERS = 128;  // so that eight blocks of two warps fit, and 1024 chunks are one wave of an H200
#endif

template <class T, class N, class S, bool TANGENT>
__global__ void __launch_bounds__(S::ALONE ? ROWS * WARP : MAX_WARPS * WARP, S::ALONE ? (TANGENT ? 4 : 6) : 1)
    forward_kernel(const Forward<T, N> p) {
  __shared__ float2 partial[2][MAX_WARPS];
  const int width = int(p.width);
  const int64_t row = S::ALONE ? int64_t(blockIdx.x) * ROWS + threadIdx.x / WARP : blockIdx.x;
  if (row >= p.batch * p.tokens) return;
  const int64_t b = uint32_t(row) / uint32_t(p.tokens), n = uint32_t(row) % uint32_t(p.tokens);
  // All on their way before the first is used. x and tx become the residual sum and its tangent, as they are
  // stored: fp32 in their place would spill registers.
  Part<T, S> x(p.x.at(b, n), width), tx(TANGENT ? p.tx.at(b, n) : nullptr, width);
  const Part<N, S> h(p.h.at(b, n), width), th(TANGENT ? p.th.at(b, n) : nullptr, width);
  const auto place = [&](const auto& operand) { return place_of<S>(operand.at(b, n), width); };
  if (p.h) {
    const auto ones = Few<float, S::V>::of([](int) { return 1.f; });
    const auto gates = place(p.gate), tgates = place(p.tgate);
    const auto out = place(p.out), tout = place(p.tout);
    each<S::PACKS>([&](int k) {
      const auto gate = gates.get(k, ones);
      x.packs[k] = Few<T, S::V>::of([&](int j) { return x.packs[k][j] + gate[j] * h.packs[k][j]; });
      out.put(k, x.packs[k]);
      if (TANGENT && p.tout) {
        float tv[S::V];
        each<S::V>([&](int j) { tv[j] = tx.packs[k][j]; });
        if (p.th) each<S::V>([&](int j) { tv[j] += gate[j] * th.packs[k][j]; });
        if (p.tgate) {
          const auto tgate = tgates.get(k);
          each<S::V>([&](int j) { tv[j] += tgate[j] * h.packs[k][j]; });
        }
        tx.packs[k] = Few<T, S::V>::of([&](int j) { return tv[j]; });
        tout.put(k, tx.packs[k]);
      }
    });
  }
  const float2 mean = means<S, true>(width, partial[0], [&](int i) { return float2{x[i], TANGENT ? tx[i] : 0.f}; });
  const float2 second = means<S, false>(width, partial[1], [&](int i) {
    const float center = x[i] - mean.x;
    return float2{center * center, TANGENT ? center * (tx[i] - mean.y) : 0.f};
  });
  const float r = rsqrtf(second.x + p.eps), m = r * second.y;
  const auto scales = place(p.scale), shifts = place(p.shift), tscales = place(p.tscale), tshifts = place(p.tshift);
  const auto y = place(p.y), ty = place(p.ty);
  const bool moves = p.h ? bool(p.tout) : bool(p.tx);
  each<S::PACKS>([&](int k) {
    const auto scale = scales.get(k), shift = shifts.get(k);
    float xhat[S::V];
    each<S::V>([&](int j) { xhat[j] = normalise(x.packs[k][j], mean.x, r); });
    y.put(k, Few<N, S::V>::of([&](int j) { return modulate(xhat[j], scale[j], shift[j]); }));
    if (TANGENT) {
      const auto tscale = tscales.get(k), tshift = tshifts.get(k);
      // A tangent that is not there adds nothing, not a product of zero with what may be infinite.
      ty.put(k, Few<N, S::V>::of([&](int j) {
        float sum = tshift[j];
        if (p.tscale) sum += xhat[j] * tscale[j];
        if (moves) sum += normalise_tangent(xhat[j], tx.packs[k][j], mean.y, m, r) * (1.f + scale[j]);
        return sum;
      }));
    }
  });
}

template <class T, class N, class S>
__global__ void __maxnreg__(S::V == 1 ? 128 : sizeof(T) == 4 ? 168 : REGISTERS)
    backward_kernel(const Backward<T, N> p) {
  __shared__ float2 partial[2][MAX_WARPS];
  TBCM_DYNAMIC_SHARED(shared);
  enum { X, GY, GOUT, H };
  const int width = int(p.width);
  const uint32_t chunks = uint32_t((p.tokens + p.chunk - 1) / p.chunk);
  const int64_t b = blockIdx.x / chunks, part = blockIdx.x % chunks, first = part * p.chunk;
  const int rows = int(p.chunk < p.tokens - first ? p.chunk : p.tokens - first);
  Queue<S, 4, sizeof(T)> queue(shared);
  const auto ask = [&](int row) {
    const int64_t n = first + row;
    queue.ask(X, p.gy ? p.x.at(b, n) : nullptr, width);
    queue.ask(GY, p.gy.at(b, n), width);
    queue.ask(GOUT, p.gout.at(b, n), width);
    queue.ask(H, p.ggate ? p.h.at(b, n) : nullptr, width);
  };
  float ggate[S::E] = {}, gscale[S::E] = {}, gshift[S::E] = {};
  queue.begin(ask);
  for (int row = 0; row < rows; ++row) {
    const int64_t n = first + row;
    queue.step(row, rows, ask);
    float g[S::E] = {};
    if (p.gy) {
      const Place<const float, S> scales(p.scale.at(b, n), width);
      const auto x = queue.template get<T>(X, width);
      each<S::PACKS>([&](int k) {
        const auto scale = scales.get(k);
        const auto gy = queue.template get<N>(GY, k, width);
        each<S::V>([&](int j) { g[k * S::V + j] = gy[j] * (1.f + scale[j]); });
      });
      const float2 mean = means<S, true>(width, partial[0], [&](int i) { return float2{x[i], g[i]}; });
      const float2 second = means<S, false>(width, partial[1], [&](int i) {
        const float center = x[i] - mean.x;
        return float2{center * center, center * (g[i] - mean.y)};
      });
      const float r = rsqrtf(second.x + p.eps), m = r * second.y;
      each<S::PACKS>([&](int k) {  // read again: registers are needed for sums
        const auto x = queue.template get<T>(X, k, width);
        const auto gy = queue.template get<N>(GY, k, width);
        each<S::V>([&](int j) {
          const int i = k * S::V + j;
          const float xhat = normalise(x[j], mean.x, r);
          gscale[i] += gy[j] * xhat;
          gshift[i] += gy[j];
          g[i] = normalise_gradient(g[i], xhat, mean.y, m, r);
        });
      });
    }
    if (p.gout) {
      const auto gout = queue.template get<T>(GOUT, width);
      each<S::E>([&](int i) { g[i] += gout[i]; });
    }
    const Place<T, S> gx(p.gx.at(b, n), width);
    const Place<N, S> gh(p.gh.at(b, n), width);
    const Place<const float, S> gates(p.gate.at(b, n), width);
    each<S::PACKS>([&](int k) { gx.put(k, Few<T, S::V>::of([&](int j) { return g[k * S::V + j]; })); });
    if (p.ggate) {
      const auto h = queue.template get<N>(H, width);
      each<S::E>([&](int i) { ggate[i] += g[i] * h[i]; });
    }
    if (p.gh) each<S::PACKS>([&](int k) {
        const auto gate = gates.get(k);
        gh.put(k, Few<N, S::V>::of([&](int j) { return gate[j] * g[k * S::V + j]; }));
      });
  }
  const auto store = [&](const Rows<float>& operand, const float (&sums)[S::E]) {
    const Place<float, S> to(operand.at(b, part), width);
    each<S::PACKS>([&](int k) { to.put(k, Few<float, S::V>::of([&](int j) { return sums[k * S::V + j]; })); });
  };
  store(p.ggate, ggate);
  store(p.gscale, gscale);
  store(p.gshift, gshift);
}

template <class S, class T, class N>
const char* launch_rows(const Forward<T, N>& p, void* stream) {
  const int64_t rows = p.batch * p.tokens;
  if (rows > UINT32_MAX) return "the CUDA kernels of adaln take up to 2^32 rows";
  const auto kernel = p.ty ? forward_kernel<T, N, S, true> : forward_kernel<T, N, S, false>;
  return start_rows<S>(kernel, rows, p, stream);
}

template <class S, class T, class N>
const char* launch_rows(const Backward<T, N>& p, void* stream) {
  const int64_t blocks = p.batch * ((p.tokens + p.chunk - 1) / p.chunk);
  const int threads = threads_of(p.width, S::E);
  const int shared = Queue<S, 4, sizeof(T)>::bytes(threads);
  return start(backward_kernel<T, N, S>, blocks, threads, shared, PARTIAL_BYTES, p, stream);
}

constexpr const char* TOO_WIDE = "the CUDA kernels of adaln take widths up to 4096";

}  // namespace

template <class T, class N>
const char* launch(const Forward<T, N>& p, void* stream) {
  constexpr int V = 16 / sizeof(T), E = 5 * V;
  if (p.width > MAX_WIDTH) return TOO_WIDE;
  const bool vectors = p.width % V == 0 && all_aligned(p.x, p.h, p.tx, p.th, p.gate, p.scale, p.shift, p.tgate,
                                                       p.tscale, p.tshift, p.out, p.y, p.tout, p.ty);
  if (!vectors) return launch_rows<Spread<1, 8, false>>(p, stream);
  if (p.width > WARP * E) return launch_rows<Spread<V, E, false>>(p, stream);
  return launch_rows<Spread<V, E, true>>(p, stream);
}

template <class T, class N>
const char* launch(const Backward<T, N>& p, void* stream) {
  if (p.width > MAX_WIDTH) return TOO_WIDE;
  const bool vectors = p.width % 4 == 0 && all_aligned(p.gout, p.gy, p.x, p.h, p.gate, p.scale, p.gx, p.gh, p.ggate,
                                                       p.gscale, p.gshift);
  if (!vectors) return launch_rows<Spread<1, 8, false>>(p, stream);
  return launch_rows<Spread<4, 20, false>>(p, stream);
}

#define TBCM_INSTANCES_OF_BOTH(T, N)                        \
  template const char* launch(const Forward<T, N>&, void*); \
  template const char* launch(const Backward<T, N>&, void*);
TBCM_INSTANCES_OF_BOTH(float, float)
TBCM_INSTANCES_OF_BOTH(float, bfloat16)
TBCM_INSTANCES_OF_BOTH(float, float16)
TBCM_INSTANCES_OF_BOTH(bfloat16, bfloat16)
TBCM_INSTANCES_OF_BOTH(float16, float16)

}  // namespace tbcm::adaln::next
