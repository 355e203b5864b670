// CUDA kernels of adaln: a warp keeps a row in registers, or a block a wide one; a block walks a chunk of rows.
//
// Floor: each operand of x's size crosses the memory bus once, 8 of them forward with all tangents and 6
// backward. What a row takes beside its elements (operands that may be absent, addresses, sums over threads) is
// the same for 8 elements a thread as for 40, so a thread has as many as its registers hold: 40 of 16 bits or 20
// of 32 forward. Backward has 12, beside whose 36 sums for the parameters the row waits in shared memory: widths are
// multiples of 384 more often than of 640, and six warps hide more of a scheduler's waits than four. There too are the
// modulations: read from memory, each pack of them was one more wait for every row, a quarter of backward's time.
#include "adaln.h"
#include "rows.h"
#include "sums.h"

namespace tbcm::adaln {
namespace {

constexpr int WARPS = 4;  // of a block whose warps have rows of their own
// Such blocks of a multiprocessor; fp16, which takes more instructions to widen, spills with four.
template <class T, bool TANGENT>
constexpr int BLOCKS = !TANGENT ? 5 : std::is_same_v<T, float16> ? 3 : 4;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int REGISTERS = 128;
#else
constexpr int REGISTERS = 80;  // so that eight blocks of three warps fit, and 1024 chunks are one wave of an H200
#endif

// The rows of a block: a chunk of the tokens of one sample.
struct Chunk {
  int b, part;
  int64_t first;
  int rows;
  TBCM_D Chunk(int64_t tokens, int64_t chunk) {
    const uint32_t chunks = uint32_t((tokens + chunk - 1) / chunk);
    b = blockIdx.x / chunks;
    part = blockIdx.x % chunks;
    first = part * chunk;
    rows = int(chunk < tokens - first ? chunk : tokens - first);
  }
};

// A modulation in shared memory as the lanes of a warp read it, 16 bytes side by side, filled up where it ends.
template <class S>
struct Kept {
  static constexpr int V = S::V < 4 ? S::V : 4, SIZE = WARP * S::E;
  using Quad = Few<float, V>;
  float* first;

  TBCM_D Quad& quad(int i) const { return *reinterpret_cast<Quad*>(first + i * (WARP * V)); }
  TBCM_D void put(int k, const Few<float, S::V>& few) const {
    each<S::V / V>([&](int i) { quad(k * (S::V / V) + i) = Quad::of([&](int j) { return few[i * V + j]; }); });
  }
  TBCM_D Few<float, S::V> get(int k, const Few<float, S::V>& = {}) const {
    Few<float, S::V> few;
    each<S::V / V>([&](int i) {
      const Quad found = quad(k * (S::V / V) + i);
      each<V>([&](int j) { few.words[i * V + j] = found.words[j]; });
    });
    return few;
  }
  // Two of each thread's own.
  TBCM_HD static int bytes(int threads) { return 2 * S::E * threads * int(sizeof(float)); }
  TBCM_D static Kept own(unsigned char* shared, int slot) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    return {reinterpret_cast<float*>(shared) + (2 * warp + slot) * SIZE + lane * V};
  }
  TBCM_D void keep(const float* row, int width) const {
    const auto from = place_of<S>(row, width);
    each<S::PACKS>([&](int k) { put(k, from.get(k)); });
  }
};

// Modulations, of which those that all rows of the chunk share wait in shared memory, one slot each.
template <class S>
struct Modulations {
  float* slots;
  int width;

  TBCM_D Modulations(unsigned char* shared, int width) : slots(reinterpret_cast<float*>(shared)), width(width) {}
  TBCM_HD static int bytes(int count, int64_t width) {
    return count * (S::ALONE ? Kept<S>::SIZE : int(width)) * int(sizeof(float));
  }
  TBCM_HD static bool shared(const Rows<const float>& m) { return m && m.stride_n == 0; }
  // Where a warp has a row alone all are shared, and one warp keeps one for all.
  TBCM_D void keep(int slot, const Rows<const float>& m, int64_t b, float otherwise = 0.f) const {
    const auto from = place_of<S>(m.at(b, 0), width);
    if constexpr (S::ALONE) {
      if (slot % WARPS != int(threadIdx.x) / WARP) return;
      const auto fill = Few<float, S::V>::of([&](int) { return otherwise; });
      each<S::PACKS>([&](int k) { of(slot, m, 0, 0).put(k, from.get(k, fill)); });
    } else if (shared(m)) {
      const auto to = place_of<S>(slots + slot * width, width);
      each<S::PACKS>([&](int k) { to.put(k, from.get(k)); });
    }
  }
  TBCM_D auto of(int slot, const Rows<const float>& m, int64_t b, int64_t n) const {
    if constexpr (S::ALONE) return Kept<S>{slots + slot * Kept<S>::SIZE + threadIdx.x % WARP * Kept<S>::V};
    else return place_of<S>(shared(m) ? slots + slot * width : m.at(b, n), width);
  }
};

template <class T, class N, class S, bool TANGENT>
__global__ void __launch_bounds__(S::ALONE ? WARPS * WARP : MAX_WARPS * WARP, S::ALONE ? BLOCKS<T, TANGENT> : 1)
    forward_kernel(const Forward<T, N> p) {
  alignas(16) __shared__ float2 partial[2][PARTIALS];
  TBCM_DYNAMIC_SHARED(shared);
  enum { GATE, SCALE, SHIFT, TGATE, TSCALE, TSHIFT };
  const int width = int(p.width);
  const Chunk chunk(p.tokens, p.chunk);
  int b = chunk.b;
  const Modulations<S> modulations(shared, width);
  modulations.keep(GATE, p.gate, b, 1.f);
  modulations.keep(SCALE, p.scale, b);
  modulations.keep(SHIFT, p.shift, b);
  if (TANGENT) {
    modulations.keep(TGATE, p.tgate, b);
    modulations.keep(TSCALE, p.tscale, b);
    modulations.keep(TSHIFT, p.tshift, b);
  }
  __syncthreads();
  for (int row = S::ALONE ? threadIdx.x / WARP : 0; row < chunk.rows; row += S::ALONE ? WARPS : 1) {
    const int64_t n = chunk.first + row;
    asm volatile("" : "+r"(b));  // compilers would hold each operand's address over all rows: registers spill
    // All on their way before the first is used. x and tx become the residual sum and its tangent, as they are
    // stored: fp32 in their place would spill registers.
    Part<T, S> x(p.x.at(b, n), width), tx(TANGENT ? p.tx.at(b, n) : nullptr, width);
    const Part<N, S> h(p.h.at(b, n), width), th(TANGENT ? p.th.at(b, n) : nullptr, width);
    if (p.h) {
      const auto ones = Few<float, S::V>::of([](int) { return 1.f; });
      const auto gates = modulations.of(GATE, p.gate, b, n), tgates = modulations.of(TGATE, p.tgate, b, n);
      const auto out = place_of<S>(p.out.at(b, n), width), tout = place_of<S>(p.tout.at(b, n), width);
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
    const auto scales = modulations.of(SCALE, p.scale, b, n), shifts = modulations.of(SHIFT, p.shift, b, n);
    const auto tscales = modulations.of(TSCALE, p.tscale, b, n), tshifts = modulations.of(TSHIFT, p.tshift, b, n);
    const auto y = place_of<S>(p.y.at(b, n), width), ty = place_of<S>(p.ty.at(b, n), width);
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
}

template <class T, class N, class S>
__global__ void __maxnreg__(S::V == 1 || sizeof(T) == 4 ? 128 : REGISTERS)
    backward_kernel(const Backward<T, N> p) {
  alignas(16) __shared__ float2 partial[2][PARTIALS];
  TBCM_DYNAMIC_SHARED(shared);
  enum { X, GY, GOUT, H };
  enum { SCALE, GATE };  // each thread reads what it wrote
  const int width = int(p.width);
  const Chunk chunk(p.tokens, p.chunk);
  const int b = chunk.b;
  const Kept<S> scales = Kept<S>::own(shared, SCALE), gates = Kept<S>::own(shared, GATE);
  Queue<S, 4, sizeof(T)> queue(shared + Kept<S>::bytes(blockDim.x));
  const auto walk = [&](const auto& rows, bool there) { return Walk(rows, there, b, chunk.first); };
  auto xs = walk(p.x, bool(p.gy)), gouts = walk(p.gout, true);
  auto gys = walk(p.gy, true), hs = walk(p.h, bool(p.ggate));
  auto gxs = walk(p.gx, true);
  auto ghs = walk(p.gh, true);
  const auto ask = [&] {
    queue.ask(X, xs.next(), width);
    queue.ask(GY, gys.next(), width);
    queue.ask(GOUT, gouts.next(), width);
    queue.ask(H, hs.next(), width);
  };
  float ggate[S::E] = {}, gscale[S::E] = {}, gshift[S::E] = {};
  queue.begin(ask);
  for (int row = 0; row < chunk.rows; ++row) {
    queue.step(row, chunk.rows, ask);
    if (row == 0 || p.scale.stride_n != 0) scales.keep(p.scale.at(b, chunk.first + row), width);
    if (row == 0 || p.gate.stride_n != 0) gates.keep(p.gate.at(b, chunk.first + row), width);
    float g[S::E] = {};
    if (p.gy) {
      const auto x = queue.template get<T>(X);
      each<S::PACKS>([&](int k) {
        const auto scale = scales.get(k);
        const auto gy = queue.template get<N>(GY, k);
        each<S::V>([&](int j) { g[k * S::V + j] = gy[j] * (1.f + scale[j]); });
      });
      const float2 mean = means<S, true>(width, partial[0], [&](int i) { return float2{x[i], g[i]}; });
      const float2 second = means<S, false>(width, partial[1], [&](int i) {
        const float center = x[i] - mean.x;
        return float2{center * center, center * (g[i] - mean.y)};
      });
      const float r = rsqrtf(second.x + p.eps), m = r * second.y;
      each<S::PACKS>([&](int k) {  // read again: registers are needed for sums
        const auto x = queue.template get<T>(X, k);
        const auto gy = queue.template get<N>(GY, k);
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
      const auto gout = queue.template get<T>(GOUT);
      each<S::E>([&](int i) { g[i] += gout[i]; });
    }
    const auto gx = place_of<S>(gxs.next(), width);
    each<S::PACKS>([&](int k) { gx.put(k, Few<T, S::V>::of([&](int j) { return g[k * S::V + j]; })); });
    if (p.ggate) {
      const auto h = queue.template get<N>(H);
      each<S::E>([&](int i) { ggate[i] += g[i] * h[i]; });
    }
    if (p.gh) {
      const auto gh = place_of<S>(ghs.next(), width);
      each<S::PACKS>([&](int k) {
        const auto gate = gates.get(k);
        gh.put(k, Few<N, S::V>::of([&](int j) { return gate[j] * g[k * S::V + j]; }));
      });
    }
  }
  const auto store = [&](const Rows<float>& operand, const float (&sums)[S::E]) {
    const Place<float, S> to(operand.at(b, chunk.part), width);
    each<S::PACKS>([&](int k) { to.put(k, Few<float, S::V>::of([&](int j) { return sums[k * S::V + j]; })); });
  };
  store(p.ggate, ggate);
  store(p.gscale, gscale);
  store(p.gshift, gshift);
}

template <class S, bool TANGENT, class T, class N>
const char* launch_rows(Forward<T, N> p, void* stream) {
  const auto kernel = forward_kernel<T, N, S, TANGENT>;
  const int threads = S::ALONE ? WARPS * WARP : threads_of(p.width, S::E);
  const int shared = Modulations<S>::bytes(TANGENT ? 6 : 3, p.width);
  p.chunk = chunk_of_wave(kernel, p.batch, p.tokens, threads, shared, PARTIAL_BYTES);
  return start(kernel, p.batch * ((p.tokens + p.chunk - 1) / p.chunk), threads, shared, PARTIAL_BYTES, p, stream);
}

template <class S, class T, class N>
const char* launch_rows(const Forward<T, N>& p, void* stream) {
  return p.ty ? launch_rows<S, true>(p, stream) : launch_rows<S, false>(p, stream);
}

template <class S, class T, class N>
const char* launch_rows(const Backward<T, N>& p, void* stream) {
  const int64_t blocks = p.batch * ((p.tokens + p.chunk - 1) / p.chunk);
  const int threads = threads_of(p.width, S::E);
  const int shared = Kept<S>::bytes(threads) + Queue<S, 4, sizeof(T)>::bytes(threads);
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
  const Rows<const float> modulations[] = {p.gate, p.scale, p.shift, p.tgate, p.tscale, p.tshift};
  bool shared = true;
  for (const auto& m : modulations) shared = shared && m.stride_n == 0;
  if (!shared || p.width > WARP * E) return launch_rows<Spread<V, E, false>>(p, stream);
  return launch_rows<Spread<V, E, true>>(p, stream);
}

template <class T, class N>
const char* launch(const Backward<T, N>& p, void* stream) {
  if (p.width > MAX_WIDTH) return TOO_WIDE;
  const bool vectors = p.width % 4 == 0 && all_aligned(p.gout, p.gy, p.x, p.h, p.gate, p.scale, p.gx, p.gh, p.ggate,
                                                       p.gscale, p.gshift);
  const char* fault = vectors ? launch_rows<Spread<4, 12, false>>(p, stream) : launch_rows<Spread<1, 8, false>>(p, stream);
  return fault ? fault : start(p.sums, stream);
}

#define TBCM_INSTANCES_OF_BOTH(T, N)                        \
  template const char* launch(const Forward<T, N>&, void*); \
  template const char* launch(const Backward<T, N>&, void*);
TBCM_INSTANCES_OF_BOTH(float, float)
TBCM_INSTANCES_OF_BOTH(float, bfloat16)
TBCM_INSTANCES_OF_BOTH(float, float16)
TBCM_INSTANCES_OF_BOTH(bfloat16, bfloat16)
TBCM_INSTANCES_OF_BOTH(float16, float16)

}  // namespace tbcm::adaln
