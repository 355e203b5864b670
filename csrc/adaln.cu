// CUDA kernels of adaln: a block keeps a row in registers; in backward it walks a chunk of rows.
//
// Floor: each operand of x's size crosses the memory bus once, 8 of them forward with all tangents and
// 6 backward; about 5 FLOPs a byte, far below what a GPU has. Modulations that the tokens of a sample
// share come out of L1. Rows of registers at 64 a thread leave 1024 threads to a multiprocessor, each
// with up to 64 bytes in flight, about twice what hides the latency of HBM; without a tangent a thread has
// half of that in flight, and 40 registers let half as many more of them in. Backward asks for the next row
// before it works on one.
#include "adaln.h"
#include "cuda.h"

namespace tbcm::adaln {
namespace {

constexpr int THREADS = 512, E = 8;

// A thread's E columns of a row, V neighbours an access, those of neighbouring threads side by side.
template <class T, int V>
struct Slice {
  Pack<T, V> packs[E / V];

  TBCM_D static int column(int i) { return (i / V * int(blockDim.x) + int(threadIdx.x)) * V + i % V; }
  TBCM_D float operator[](int i) const { return widen(packs[i / V].values[i % V]); }

  // Stores what f gives for each element.
  template <class F>
  TBCM_D void put(T* row, int width, const F& f) {
    each<E>([&](int i) { narrow(f(i), &packs[i / V].values[i % V]); });
    each<E / V>([&](int k) {
      if (column(k * V) < width) *reinterpret_cast<Pack<T, V>*>(row + column(k * V)) = packs[k];
    });
  }
};

// Zeros beyond the row, and where there is no row.
template <int V, class T>
TBCM_D Slice<T, V> get(const T* row, int width) {
  Slice<T, V> slice = {};
  if (row)
    each<E / V>([&](int k) {
      const int c = slice.column(k * V);
      if (c < width) slice.packs[k] = *reinterpret_cast<const Pack<T, V>*>(row + c);
    });
  return slice;
}

// Means over the row of a function of the element that gives two numbers.
template <class Slice, class F>
TBCM_D float2 means(int width, float2* partial, const F& f) {
  float2 sum = {0.f, 0.f};
  each<E>([&](int i) {
    if (Slice::column(i) < width) {
      const float2 v = f(i);
      sum.x += v.x;
      sum.y += v.y;
    }
  });
  sum = block_sum(sum, partial);
  return {sum.x / float(width), sum.y / float(width)};
}

template <class T, int V, bool TANGENT>
__global__ void __launch_bounds__(THREADS, TANGENT || V == 1 ? 2 : 3) forward_kernel(const Forward<T> p) {
  using Own = Slice<T, V>;
  __shared__ float2 partial[2][THREADS / WARP];
  const int width = int(p.width);
  const int64_t b = blockIdx.x / uint32_t(p.tokens), n = blockIdx.x % uint32_t(p.tokens);
  // All on their way before the first is used.
  const Own x = get<V>(p.x.at(b, n), width), h = get<V>(p.h.at(b, n), width);
  const Own tx = get<V>(TANGENT ? p.tx.at(b, n) : nullptr, width), th = get<V>(TANGENT ? p.th.at(b, n) : nullptr, width);
  float v[E], tv[E];
  each<E>([&](int i) { v[i] = x[i], tv[i] = tx[i]; });
  if (p.h) {
    const auto gate = get<V>(p.gate.at(b, n), width);
    each<E>([&](int i) { v[i] += p.gate ? gate[i] * h[i] : h[i]; });
    if (TANGENT && p.tgate) {
      const auto tgate = get<V>(p.tgate.at(b, n), width);
      each<E>([&](int i) { tv[i] += tgate[i] * h[i]; });
    }
    if (TANGENT && p.th) each<E>([&](int i) { tv[i] += p.gate ? gate[i] * th[i] : th[i]; });
    Own stored;
    stored.put(p.out.at(b, n), width, [&](int i) { return v[i]; });
    each<E>([&](int i) { v[i] = stored[i]; });
    if (TANGENT && p.tout) {
      stored.put(p.tout.at(b, n), width, [&](int i) { return tv[i]; });
      each<E>([&](int i) { tv[i] = stored[i]; });
    }
  }
  const float2 mean = means<Own>(width, partial[0], [&](int i) { return float2{v[i], tv[i]}; });
  const float2 second = means<Own>(width, partial[1], [&](int i) {
    const float center = v[i] - mean.x;
    return float2{center * center, center * (tv[i] - mean.y)};
  });
  const float r = 1.f / sqrtf(second.x + p.eps), m = r * second.y;
  const auto scale = get<V>(p.scale.at(b, n), width), shift = get<V>(p.shift.at(b, n), width);
  Own value;
  value.put(p.y.at(b, n), width, [&](int i) { return modulate(normalise(v[i], mean.x, r), scale[i], shift[i]); });
  if (TANGENT) {
    const auto tscale = get<V>(p.tscale.at(b, n), width), tshift = get<V>(p.tshift.at(b, n), width);
    value.put(p.ty.at(b, n), width, [&](int i) {
      const float xhat = normalise(v[i], mean.x, r);
      return modulate_tangent(xhat, normalise_tangent(xhat, tv[i], mean.y, m, r), scale[i], tscale[i], tshift[i]);
    });
  }
}

template <class T, int V>
__global__ void __maxnreg__(96) backward_kernel(const Backward<T> p) {
  using Own = Slice<T, V>;
  __shared__ float2 partial[2][THREADS / WARP];
  const int width = int(p.width);
  const uint32_t chunks = uint32_t((p.tokens + p.chunk - 1) / p.chunk);
  const int64_t b = blockIdx.x / chunks, part = blockIdx.x % chunks;
  const int64_t last = (part + 1) * p.chunk < p.tokens ? (part + 1) * p.chunk : p.tokens;
  float ggate[E] = {}, gscale[E] = {}, gshift[E] = {};
  struct Read {
    Own x, gy, gout, h;
  } next;
  const auto fetch = [&](int64_t n) {
    next = {get<V>(p.gy ? p.x.at(b, n) : nullptr, width), get<V>(p.gy.at(b, n), width),
            get<V>(p.gout.at(b, n), width), get<V>(p.ggate ? p.h.at(b, n) : nullptr, width)};
  };
  constexpr bool AHEAD = V == 8;  // where a row is few registers
  if (AHEAD) fetch(part * p.chunk);
  for (int64_t n = part * p.chunk; n < last; ++n) {
    if (!AHEAD) fetch(n);
    const auto [x, gy, gout, h] = next;
    if (AHEAD && n + 1 < last) fetch(n + 1);
    float g[E] = {};
    if (p.gy) {
      const auto scale = get<V>(p.scale.at(b, n), width);
      each<E>([&](int i) { g[i] = gy[i] * (1.f + scale[i]); });
      const float2 mean = means<Own>(width, partial[0], [&](int i) { return float2{x[i], g[i]}; });
      const float2 second = means<Own>(width, partial[1], [&](int i) {
        const float center = x[i] - mean.x;
        return float2{center * center, center * (g[i] - mean.y)};
      });
      const float r = 1.f / sqrtf(second.x + p.eps);
      each<E>([&](int i) {
        const float xhat = normalise(x[i], mean.x, r);
        gscale[i] += gy[i] * xhat;
        gshift[i] += gy[i];
        g[i] = normalise_gradient(g[i], xhat, mean.y, r * second.y, r);
      });
    }
    if (p.gout) each<E>([&](int i) { g[i] += gout[i]; });
    Own stored;
    stored.put(p.gx.at(b, n), width, [&](int i) { return g[i]; });
    if (p.ggate) each<E>([&](int i) { ggate[i] += g[i] * h[i]; });
    if (p.gh) {
      const auto gate = get<V>(p.gate.at(b, n), width);
      stored.put(p.gh.at(b, n), width, [&](int i) { return gate[i] * g[i]; });
    }
  }
  Slice<float, V> sums;
  if (p.ggate) sums.put(p.ggate.at(b, part), width, [&](int i) { return ggate[i]; });
  if (p.gscale) sums.put(p.gscale.at(b, part), width, [&](int i) { return gscale[i]; });
  if (p.gshift) sums.put(p.gshift.at(b, part), width, [&](int i) { return gshift[i]; });
}

template <class P>
const char* launch_rows(void (*kernel)(P), int64_t blocks, const P& p, void* stream) {
  if (p.width > THREADS * E) return "the CUDA kernels of adaln take widths up to 4096";
  const int warps = int((p.width + WARP * E - 1) / (WARP * E));
  return start(kernel, blocks, warps * WARP, p, stream);
}

template <class... Operands>
bool all_aligned(const Operands&... operands) {
  return (aligned(operands) && ...);
}

}  // namespace

template <class T>
const char* launch(const Forward<T>& p, void* stream) {
  constexpr int V = 16 / sizeof(T);
  const bool vectors = p.width % V == 0 && all_aligned(p.x, p.h, p.tx, p.th, p.gate, p.scale, p.shift, p.tgate,
                                                       p.tscale, p.tshift, p.out, p.y, p.tout, p.ty);
  const auto value = vectors ? forward_kernel<T, V, false> : forward_kernel<T, 1, false>;
  const auto both = vectors ? forward_kernel<T, V, true> : forward_kernel<T, 1, true>;
  return launch_rows(p.ty ? both : value, p.batch * p.tokens, p, stream);
}

template <class T>
const char* launch(const Backward<T>& p, void* stream) {
  constexpr int V = 16 / sizeof(T);
  const bool vectors = p.width % V == 0 && all_aligned(p.gout, p.gy, p.x, p.h, p.gate, p.scale, p.gx, p.gh, p.ggate,
                                                       p.gscale, p.gshift);
  const int64_t blocks = p.batch * ((p.tokens + p.chunk - 1) / p.chunk);
  return launch_rows(vectors ? backward_kernel<T, V> : backward_kernel<T, 1>, blocks, p, stream);
}

TBCM_INSTANCES

}  // namespace tbcm::adaln
