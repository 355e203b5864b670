// CUDA kernels of conv_glu: a block walks down a strip of rows, and each row of u passes through shared
// memory once, where threads read their neighbours.
//
// Floor per token and channel pair, in elements: forward moves 3, with the tangent 6, backward 5. Beside
// them stand 18, 36 and 54 multiply-adds and two or three sigmoids, about 50, 90 and 120 instructions:
// in bf16 an H200 needs as long to issue them as to move the bytes. So u = silu(a) is computed once for
// each element, a warp holds both halves of 16 channels (their exchange is a shuffle), and the stencil
// scatters a row into sums of three rows, PX pixels a thread, which takes (PX + 2) / PX reads a value.
#include "conv_glu.h"
#include "cuda.h"

namespace tbcm::conv_glu {
namespace {

constexpr int THREADS = 512;
constexpr int CHANNELS = 16;  // channel pairs of a warp: first halves, then second halves
constexpr int LARGEST = 640;  // floats of a plane for each pixel of a thread, at 8 columns

// sigmoid(x) and 1 - sigmoid(x). Where the bound acts s is 0, and so are all factors of `rest`.
struct Logistic {
  float s, rest;
};
template <class T>
TBCM_D Logistic logistic(float x) {
  const float bound = fminf(-x, 88.f);
  if constexpr (sizeof(T) == 4) {
    const float e = expf(bound), s = 1.f / (1.f + e);
    return {s, e * s};
  } else {  // a few instructions less; their error is far below what rounding to 16 bits adds
    const float e = __expf(bound), s = __fdividef(1.f, 1.f + e);
    return {s, e * s};
  }
}

// How images are cut. A block has `columns` pixels of TILE rows and `channels` channel pairs.
template <int PX>
struct Tiling {
  int columns, channels, margin, across, down, deep;
  TBCM_HD Tiling(const Shape& p, int margin) : margin(margin) {
    columns = p.width <= 8 ? 8 : p.width <= 16 ? 16 : int(TILE);
    channels = THREADS / WARP * CHANNELS * PX / columns;
    across = int(tiles(p.width, columns - 2 * margin));
    down = int(tiles(p.height, TILE));
    deep = int(tiles(p.channels, channels));
  }
  TBCM_HD int64_t blocks(const Shape& p) const { return p.batch * across * down * deep; }
};

// Where this block and this thread stand.
template <int PX>
struct Place : Tiling<PX> {
  int width, height, pairs, image, strip, x0, y0, y1, first, channel, half, pixel;
  bool there;  // whether the thread's channel exists
  TBCM_D Place(const Shape& p, int margin)
      : Tiling<PX>(p, margin), width(p.width), height(p.height), pairs(p.channels) {
    const int tile = blockIdx.x / this->deep, warp = threadIdx.x / WARP, warps = this->columns / PX;
    strip = tile % (this->across * this->down);
    image = tile / (this->across * this->down);
    x0 = strip % this->across * (this->columns - 2 * this->margin) - this->margin;
    y0 = strip / this->across * int(TILE);
    y1 = y0 + int(TILE) < height ? y0 + int(TILE) : height;
    half = threadIdx.x % WARP / CHANNELS;
    pixel = warp % warps * PX;
    first = int(blockIdx.x % this->deep) * this->channels;
    channel = first + warp / warps * CHANNELS + threadIdx.x % CHANNELS;
    there = channel < pairs;
  }
  // The plane of shared memory: for each sixteen channels the columns with one more at both ends, and of
  // each pixel the lanes of a warp.
  TBCM_D int spot(int group, int column, int lane) const { return (group * (this->columns + 2) + column + 1) * WARP + lane; }
  TBCM_D int own() const { return spot(threadIdx.x / WARP / (this->columns / PX), pixel, threadIdx.x % WARP); }
  TBCM_D bool inside(int i) const { return there && unsigned(x0 + pixel + i) < unsigned(width); }
  TBCM_D bool owned(int i, int y) const {  // whether this block stores the gradient of the pixel
    const int column = pixel + i;
    return inside(i) && column >= this->margin && column < this->columns - this->margin && y >= y0 && y < y1;
  }
  TBCM_D int64_t row(int y) const { return (int64_t(image) * height + y) * width + x0; }
};

// Carries rows of a from memory to planes, V channels an access, whatever thread needs them there.
template <class T, int V, int PX>
struct Carrier {
  static constexpr int SLOTS = (LARGEST * PX / V + THREADS - 1) / THREADS;
  using Row = Pack<T, V>[SLOTS];
  int from[SLOTS], to[SLOTS];  // negative where there is nothing to read, or no place to put it

  TBCM_D explicit Carrier(const Place<PX>& t) {
    each<SLOTS>([&](int k) {
      const int packs = t.channels / V, i = k * THREADS + threadIdx.x, part = i / packs;
      const int c = i % packs * V, half = part % 2, column = part / 2 - 1;
      const bool there = t.first + c < t.pairs && unsigned(t.x0 + column) < unsigned(t.width);
      from[k] = there ? (2 * (column + 1) + half) * t.pairs + t.first + c : -1;
      to[k] = column <= t.columns ? t.spot(c / CHANNELS, column, half * CHANNELS + c % CHANNELS) : -1;
    });
  }
  // Zeros where there is nothing; silu and its slope times zero are zeros, too.
  TBCM_D void fetch(const T* row, int pairs, Row& packs) const {
    row -= 2 * pairs;  // `from` counts from the pixel before the first
    each<SLOTS>([&](int k) {
      packs[k] = from[k] < 0 ? Pack<T, V>{} : *reinterpret_cast<const Pack<T, V>*>(row + from[k]);
    });
  }
  // f(k, j) gives the two numbers that go to the planes for element j of pack k.
  template <class F>
  TBCM_D void put(float* plane, float* other, const F& f) const {
    constexpr int N = V < 4 ? V : 4;
    each<SLOTS>([&](int k) {
      if (to[k] < 0) return;
      each<V / N>([&](int part) {
        Pack<float, N> u, v;
        each<N>([&](int j) {
          const float2 values = f(k, part * N + j);
          u.values[j] = values.x;
          v.values[j] = values.y;
        });
        *reinterpret_cast<Pack<float, N>*>(plane + to[k] + part * N) = u;
        if (other) *reinterpret_cast<Pack<float, N>*>(other + to[k] + part * N) = v;
      });
    });
  }
};

// Sums of three rows of an output, of which a row of input completes the one above.
template <int PX>
struct Sums {
  float above[PX], here[PX], below[PX];

  TBCM_D explicit Sums(float start) { each<PX>([&](int i) { above[i] = here[i] = below[i] = start; }); }
  // Row y of a plane meets row 2 of the taps above it, row 1 in its own row, row 0 below.
  TBCM_D void add(const float (&v)[PX + 2], const float (&w)[9]) {
    each<PX>([&](int i) {
      each<3>([&](int dx) {
        above[i] += w[6 + dx] * v[i + dx];
        here[i] += w[3 + dx] * v[i + dx];
        below[i] += w[dx] * v[i + dx];
      });
    });
  }
  TBCM_D void add_transposed(const float (&v)[PX + 2], const float (&w)[9]) {
    each<PX>([&](int i) {
      each<3>([&](int dx) {
        above[i] += w[2 - dx] * v[i + dx];
        here[i] += w[5 - dx] * v[i + dx];
        below[i] += w[8 - dx] * v[i + dx];
      });
    });
  }
  TBCM_D void step(float start) {
    each<PX>([&](int i) { above[i] = here[i], here[i] = below[i], below[i] = start; });
  }
};

template <int PX>
TBCM_D void neighbours(const float* plane, float (&v)[PX + 2]) {
  each<PX + 2>([&](int i) { v[i] = plane[(i - 1) * WARP]; });
}

template <int PX>
TBCM_D float taps(const Shape& p, const Place<PX>& t, float (&w)[9]) {
  const int c = t.half * t.pairs + t.channel;
  each<9>([&](int tap) { w[tap] = t.there ? p.weight[tap * 2 * int64_t(t.pairs) + c] : 0.f; });
  return p.bias && t.there ? p.bias[c] : 0.f;
}

constexpr int FORWARD_PX = 4, BACKWARD_PX = 2;

template <class T, int V, bool TANGENT>
__global__ void __launch_bounds__(THREADS, V == 8 ? 2 : 1) forward_kernel(const Forward<T> p) {
  constexpr int PX = FORWARD_PX;
  alignas(16) __shared__ float planes[2][1 + TANGENT][LARGEST * PX];
  const Place<PX> t(p, 0);
  const Carrier<T, V, PX> carrier(t);
  float w[9];
  const float bias = taps(p, t, w);
  Sums<PX> c(bias), tc(0.f);
  typename Carrier<T, V, PX>::Row a = {}, ta = {};
  const auto fetch = [&](int y) {
    carrier.fetch(p.a + t.row(y) * 2 * t.pairs, t.pairs, a);
    if (TANGENT) carrier.fetch(p.ta + t.row(y) * 2 * t.pairs, t.pairs, ta);
  };
  const auto activate = [&](int y) {
    carrier.put(planes[y & 1][0], TANGENT ? planes[y & 1][TANGENT] : nullptr, [&](int k, int j) {
      const float x = widen(a[k].values[j]);
      const Logistic l = logistic<T>(x);
      return float2{x * l.s, TANGENT ? silu_slope(x, l.s, l.rest) * widen(ta[k].values[j]) : 0.f};
    });
  };
  const auto store = [&](int y) {  // the first half of the warp takes the first pixels, the second the others
    each<PX / 2>([&](int i) {
      const auto exchange = [&](const float (&v)[PX], float& v1, float& v2) {
        const float mine = t.half ? v[i + PX / 2] : v[i];
        const float got = __shfl_xor_sync(~0u, t.half ? v[i] : v[i + PX / 2], CHANNELS);
        v1 = t.half ? got : mine;
        v2 = t.half ? mine : got;
      };
      float c1, c2, tc1, tc2;
      exchange(c.above, c1, c2);
      if (TANGENT) exchange(tc.above, tc1, tc2);
      const int k = i + t.half * PX / 2;
      if (!t.inside(k)) return;
      const int64_t at = (t.row(y) + t.pixel + k) * t.pairs + t.channel;
      const Logistic l = logistic<T>(c2);
      narrow(c1 * c2 * l.s, p.y + at);
      if (TANGENT) narrow(tc1 * c2 * l.s + c1 * silu_slope(c2, l.s, l.rest) * tc2, p.ty + at);
    });
  };
  const int first = t.y0 > 0 ? t.y0 - 1 : 0, last = t.y1 < t.height ? t.y1 : t.height - 1;
  fetch(first);
  activate(first);
  __syncthreads();
  for (int y = first; y <= t.y1; ++y) {
    if (y < last) fetch(y + 1);
    if (y <= last) {
      float v[PX + 2];
      neighbours<PX>(planes[y & 1][0] + t.own(), v);
      c.add(v, w);
      if (TANGENT) {
        neighbours<PX>(planes[y & 1][TANGENT] + t.own(), v);
        tc.add(v, w);
      }
    }
    if (y > t.y0) store(y - 1);
    c.step(bias);
    tc.step(0.f);
    if (y < last) activate(y + 1);
    __syncthreads();
  }
}

template <class T, int V>
__global__ void __launch_bounds__(THREADS, 1) backward_kernel(const Backward<T> p) {
  constexpr int PX = BACKWARD_PX, PLANE = LARGEST * PX;
  alignas(16) __shared__ float u[2][PLANE], slopes[4][PLANE], gc[2][PLANE];
  const Place<PX> t(p, int(overlap(p.width)));
  const Carrier<T, V, PX> carrier(t);
  float w[9], gw[9] = {}, gb = 0.f;
  const float bias = taps(p, t, w);
  Sums<PX> c(bias), gu(0.f);
  float seen[3][PX] = {};  // u at the thread's pixels in rows y - 2, y - 1, y; 0 where another block sums
  T gy[PX] = {};
  typename Carrier<T, V, PX>::Row a = {};
  const auto activate = [&](int y) {
    carrier.put(u[y & 1], slopes[y & 3], [&](int k, int j) {
      const float x = widen(a[k].values[j]);
      const Logistic l = logistic<T>(x);
      return float2{x * l.s, silu_slope(x, l.s, l.rest)};
    });
  };
  for (int i = threadIdx.x; i < 2 * PLANE; i += THREADS) gc[0][i] = 0.f;  // its outer columns stay so
  const int first = t.y0 > 1 ? t.y0 - 2 : 0, last = t.y1 + 1 < t.height ? t.y1 + 1 : t.height - 1;
  carrier.fetch(p.a + t.row(first) * 2 * t.pairs, t.pairs, a);
  activate(first);
  __syncthreads();
  // Step y adds row y of u to c, completes row y - 1 of gc, and with it row y - 2 of ga.
  for (int y = first; y <= t.y1 + 1; ++y) {
    if (y < last) carrier.fetch(p.a + t.row(y + 1) * 2 * t.pairs, t.pairs, a);
    const bool complete = y > t.y0 - 1 && y > 0 && y <= t.height;
    float v[PX + 2] = {}, slope[PX];
    if (y <= last) {
      neighbours<PX>(u[y & 1] + t.own(), v);
      c.add(v, w);
    }
    each<PX>([&](int i) {
      seen[2][i] = t.owned(i, y) ? v[i + 1] : 0.f;
      slope[i] = slopes[(y - 2) & 3][t.own() + i * WARP];  // now: after the barrier it may be overwritten
      if (complete) {
        const float got = __shfl_xor_sync(~0u, c.above[i], CHANNELS), g = widen(gy[i]);
        const float c1 = t.half ? got : c.above[i], c2 = t.half ? c.above[i] : got;
        const Logistic l = logistic<T>(c2);
        const float found = t.half ? g * c1 * silu_slope(c2, l.s, l.rest) : g * c2 * l.s;
        gc[y & 1][t.own() + i * WARP] = t.inside(i) ? found : 0.f;
        if (t.owned(i, y - 1)) gb += found;
      }
      if (y < t.height && t.inside(i)) gy[i] = p.gy[(t.row(y) + t.pixel + i) * t.pairs + t.channel];
    });
    c.step(bias);
    if (y < last) activate(y + 1);
    __syncthreads();
    if (complete) {
      neighbours<PX>(gc[y & 1] + t.own(), v);
      gu.add_transposed(v, w);
      each<PX>([&](int i) {
        each<9>([&](int tap) { gw[tap] += seen[tap / 3][i] * v[i + 2 - tap % 3]; });
      });
    }
    each<PX>([&](int i) {
      if (t.owned(i, y - 2)) {
        const int64_t pixel = t.row(y - 2) + t.pixel + i;
        narrow(slope[i] * gu.above[i], p.ga + (2 * pixel + t.half) * t.pairs + t.channel);
      }
      seen[0][i] = seen[1][i], seen[1][i] = seen[2][i];
    });
    gu.step(0.f);
  }
  // The sums of the warps that share channels, in the order of their pixels.
  float* sums = slopes[0];
  __syncthreads();
  each<9>([&](int tap) { sums[tap * THREADS + threadIdx.x] = gw[tap]; });
  sums[9 * THREADS + threadIdx.x] = gb;
  __syncthreads();
  const int warps = t.columns / PX, lanes = THREADS / warps;
  const int64_t part = t.image * t.across * t.down + t.strip;
  for (int i = threadIdx.x; i < 10 * lanes; i += THREADS) {
    const int tap = i / lanes, group = i % lanes / WARP, lane = i % WARP;
    float total = 0.f;
    for (int k = 0; k < warps; ++k) total += sums[tap * THREADS + (group * warps + k) * WARP + lane];
    const int pair = t.first + group * CHANNELS + lane % CHANNELS;
    if (pair >= t.pairs) continue;
    const int channel = lane / CHANNELS * t.pairs + pair;
    if (tap < 9 && p.gweight) p.gweight[(part * 9 + tap) * 2 * t.pairs + channel] = total;
    if (tap == 9 && p.gbias) p.gbias[part * 2 * t.pairs + channel] = total;
  }
}

template <int PX, class P>
const char* launch_tiles(void (*kernel)(P), const P& p, int64_t margin, void* stream) {
  if (p.width * 2 * p.channels > INT32_MAX) return "a row of pixels has more than 2^31 elements";
  return start(kernel, Tiling<PX>(p, int(margin)).blocks(p), THREADS, p, stream);
}

}  // namespace

template <class T>
const char* launch(const Forward<T>& p, void* stream) {
  constexpr int V = 16 / sizeof(T);
  const bool vectors = p.channels % V == 0 && aligned(p.a) && aligned(p.ta);
  const auto value = vectors ? forward_kernel<T, V, false> : forward_kernel<T, 1, false>;
  const auto both = vectors ? forward_kernel<T, V, true> : forward_kernel<T, 1, true>;
  return launch_tiles<FORWARD_PX>(p.ty ? both : value, p, 0, stream);
}

template <class T>
const char* launch(const Backward<T>& p, void* stream) {
  constexpr int V = 16 / sizeof(T);
  const bool vectors = p.channels % V == 0 && aligned(p.a);
  return launch_tiles<BACKWARD_PX>(vectors ? backward_kernel<T, V> : backward_kernel<T, 1>, p, overlap(p.width), stream);
}

#define TBCM_INSTANCE(T)                                       \
  template const char* launch(const Forward<T>&, void*);      \
  template const char* launch(const Backward<T>&, void*);
TBCM_INSTANCE(float)
TBCM_INSTANCE(bfloat16)
TBCM_INSTANCE(float16)

}  // namespace tbcm::conv_glu
