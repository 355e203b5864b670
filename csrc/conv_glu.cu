// CUDA kernels of conv_glu: a block walks down a strip of rows, and each row of u passes through shared
// memory once, where threads read their neighbours.
//
// Floor per token and channel pair, in elements: forward moves 3, with the tangent 6, backward 5. Beside
// them stand 18, 36 and 54 multiply-adds and two to five sigmoids, so instructions count as much as bytes:
// u = silu(a) is computed once for each element, a warp holds both halves of 16 channels (c1 and c2 meet by
// a shuffle), and a thread adds its row of u into three rows of sums, PX pixels at a time, which takes
// (PX + 2) / PX reads a value.
#include "conv_glu.h"
#include "cuda.h"

namespace tbcm::conv_glu {
namespace {

constexpr int THREADS = 512;
constexpr int CHANNELS = 16;  // channel pairs of a warp: first halves, then second halves
constexpr int PX = 4;         // pixels of a thread, side by side
constexpr int PLANE = 2560;   // floats of a row of u, at 8 columns with one more at both ends

// sigmoid(x) and 1 - sigmoid(x). Where a bound acts s is 0, and so are all factors of `rest`.
struct Logistic {
  float s, rest;
};
template <class T>
TBCM_D Logistic logistic(float x) {
  if constexpr (sizeof(T) == 4) {
    const float e = expf(fminf(-x, 88.7f)), s = 1.f / (1.f + e);
    return {s, e * s};
  } else {  // half the instructions; their error is far below what rounding to 16 bits adds
    const float e = quick_exp2(fminf(x * -1.44269504f, 127.f)), s = quick_reciprocal(1.f + e);
    return {s, e * s};
  }
}

// How images are cut. A block has `columns` pixels of TILE rows and `channels` channel pairs.
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
struct Place : Tiling {
  int width, height, pairs, image, strip, x0, y0, y1, first, channel, half, pixel;
  bool there;  // whether the thread's channel exists
  TBCM_D Place(const Shape& p, int margin)
      : Tiling(p, margin), width(p.width), height(p.height), pairs(p.channels) {
    const int tile = blockIdx.x / deep, warp = threadIdx.x / WARP, warps = columns / PX;
    strip = tile % (across * down);
    image = tile / (across * down);
    x0 = strip % across * (columns - 2 * margin) - margin;
    y0 = strip / across * int(TILE);
    y1 = y0 + int(TILE) < height ? y0 + int(TILE) : height;
    half = threadIdx.x % WARP / CHANNELS;
    pixel = warp % warps * PX;
    first = int(blockIdx.x % deep) * channels;
    channel = first + warp / warps * CHANNELS + threadIdx.x % CHANNELS;
    there = channel < pairs;
  }
  // The plane of shared memory: for each sixteen channels the columns with one more at both ends, and of
  // each pixel the lanes of a warp.
  TBCM_D int spot(int group, int column, int lane) const {
    return (group * (columns + 2) + column + 1) * WARP + lane;
  }
  TBCM_D int own() const { return spot(threadIdx.x / WARP / (columns / PX), pixel, threadIdx.x % WARP); }
  TBCM_D bool inside(int i) const { return there && unsigned(x0 + pixel + i) < unsigned(width); }
  // The first pixel of the tile in row y.
  TBCM_D int64_t row(int y) const { return (int64_t(image) * height + y) * width + x0; }
};

// Carries rows of a from memory to planes, V channels an access, whatever thread needs them there.
template <class T, int V>
struct Carrier {
  static constexpr int SLOTS = (PLANE / V + THREADS - 1) / THREADS;
  using Row = Pack<T, V>[SLOTS];
  int from[SLOTS], to[SLOTS];  // negative where there is nothing to read, or no place to put it

  TBCM_D explicit Carrier(const Place& t) {
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

TBCM_D void neighbours(const float* plane, float (&v)[PX + 2]) {
  each<PX + 2>([&](int i) { v[i] = plane[(i - 1) * WARP]; });
}

TBCM_D float taps(const Shape& p, const Place& t, float (&w)[9]) {
  const int c = t.half * t.pairs + t.channel;
  each<9>([&](int tap) { w[tap] = t.there ? p.weight[tap * 2 * int64_t(t.pairs) + c] : 0.f; });
  return p.bias && t.there ? p.bias[c] : 0.f;
}

template <class T, int V, bool TANGENT>
__global__ void __launch_bounds__(THREADS, V == 8 ? 2 : 1) forward_kernel(const Forward<T> p) {
  alignas(16) __shared__ float planes[2][1 + TANGENT][PLANE];
  const Place t(p, 0);
  const Carrier<T, V> carrier(t);
  float w[9];
  const float bias = taps(p, t, w);
  Sums c(bias), tc(0.f);
  typename Carrier<T, V>::Row a = {}, ta = {};
  const int first = t.y0 > 0 ? t.y0 - 1 : 0, last = t.y1 < t.height ? t.y1 : t.height - 1;
  const int64_t step = int64_t(t.width) * t.pairs;
  int64_t read = t.row(first) * 2 * t.pairs;  // the next row of a
  int64_t write = (t.row(t.y0) + t.pixel + t.half * PX / 2) * t.pairs + t.channel;
  const auto fetch = [&]() {
    carrier.fetch(p.a + read, t.pairs, a);
    if (TANGENT) carrier.fetch(p.ta + read, t.pairs, ta);
    read += 2 * step;
  };
  const auto activate = [&](int y) {
    carrier.put(planes[y & 1][0], TANGENT ? planes[y & 1][TANGENT] : nullptr, [&](int k, int j) {
      const float x = widen(a[k].values[j]);
      const Logistic l = logistic<T>(x);
      return float2{x * l.s, TANGENT ? silu_slope(x, l.s, l.rest) * widen(ta[k].values[j]) : 0.f};
    });
  };
  const auto store = [&]() {  // the first half of the warp takes the first pixels, the second the others
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
      if (!t.inside(i + t.half * PX / 2)) return;
      const int64_t at = write + i * t.pairs;
      const Logistic l = logistic<T>(c2);
      narrow(c1 * c2 * l.s, p.y + at);
      if (TANGENT) narrow(tc1 * c2 * l.s + c1 * silu_slope(c2, l.s, l.rest) * tc2, p.ty + at);
    });
    write += step;
  };
  fetch();
  activate(first);
  __syncthreads();
  for (int y = first; y <= t.y1; ++y) {
    if (y < last) fetch();
    if (y <= last) {
      float v[PX + 2];
      neighbours(planes[y & 1][0] + t.own(), v);
      c.add(v, w);
      if (TANGENT) {
        neighbours(planes[y & 1][TANGENT] + t.own(), v);
        tc.add(v, w);
      }
    }
    if (y > t.y0) store();
    c.step(bias);
    tc.step(0.f);
    if (y < last) activate(y + 1);
    __syncthreads();
  }
}

template <class T, int V>
__global__ void __launch_bounds__(THREADS, 1) backward_kernel(const Backward<T> p) {
  alignas(16) __shared__ float u[2][PLANE], gc[2][PLANE];
  const Place t(p, int(overlap(p.width)));
  const Carrier<T, V> carrier(t);
  float w[9], gw[9] = {}, gb = 0.f;
  const float bias = taps(p, t, w);
  Sums c(bias), gu(0.f);
  float seen[3][PX] = {};  // u at the thread's pixels in rows y - 2, y - 1, y; 0 where another block sums
  T gy[PX] = {}, x[PX] = {};
  bool inside[PX], owned[PX];  // whether a pixel is there, and whether its gradient is this block's
  each<PX>([&](int i) {
    inside[i] = t.inside(i);
    owned[i] = inside[i] && t.pixel + i >= t.margin && t.pixel + i < t.columns - t.margin;
  });
  typename Carrier<T, V>::Row a = {};
  const int first = t.y0 > 1 ? t.y0 - 2 : 0, last = t.y1 + 1 < t.height ? t.y1 + 1 : t.height - 1;
  const int64_t step = int64_t(t.width) * t.pairs, own = t.pixel * t.pairs + t.channel;
  int64_t pixels = t.row(first) * t.pairs;  // row y of gy; twice that is row y of a
  const auto fetch = [&](int64_t row) { carrier.fetch(p.a + 2 * row, t.pairs, a); };
  const auto activate = [&](int y) {
    carrier.put(u[y & 1], nullptr, [&](int k, int j) {
      const float x = widen(a[k].values[j]);
      return float2{x * logistic<T>(x).s, 0.f};
    });
  };
  for (int i = threadIdx.x; i < 2 * PLANE; i += THREADS) gc[0][i] = 0.f;  // its outer columns stay so
  fetch(pixels);
  activate(first);
  __syncthreads();
  // Step y adds row y of u to c, completes row y - 1 of gc, and with it row y - 2 of ga.
  for (int y = first; y <= t.y1 + 1; ++y, pixels += step) {
    const bool complete = y > t.y0 - 1 && y > 0 && y <= t.height, leaves = y - 2 >= t.y0;
    const int64_t left = 2 * (pixels - 2 * step) + own + (t.pixel + t.half) * t.pairs;  // in rows of ga
    if (y < last) fetch(pixels + step);
    if (leaves) each<PX>([&](int i) {
        if (owned[i]) x[i] = p.a[left + 2 * i * t.pairs];  // again, out of a cache
      });
    float v[PX + 2] = {};
    if (y <= last) {
      neighbours(u[y & 1] + t.own(), v);
      c.add(v, w);
    }
    const bool sums = y >= t.y0 && y < t.y1, summed = y - 1 >= t.y0 && y - 1 < t.y1;
    each<PX>([&](int i) { seen[2][i] = sums && owned[i] ? v[i + 1] : 0.f; });
    if (complete) each<PX>([&](int i) {
        const float got = __shfl_xor_sync(~0u, c.above[i], CHANNELS), g = widen(gy[i]);
        const float c1 = t.half ? got : c.above[i], c2 = t.half ? c.above[i] : got;
        const Logistic l = logistic<T>(c2);
        const float found = g * (t.half ? c1 * silu_slope(c2, l.s, l.rest) : c2 * l.s);
        gc[y & 1][t.own() + i * WARP] = inside[i] ? found : 0.f;
        gb += summed && owned[i] ? found : 0.f;
      });
    if (y < t.height) each<PX>([&](int i) {
        if (inside[i]) gy[i] = p.gy[pixels + own + i * t.pairs];
      });
    c.step(bias);
    if (y < last) activate(y + 1);
    __syncthreads();
    if (complete) {
      neighbours(gc[y & 1] + t.own(), v);
      gu.add_transposed(v, w);
      each<PX>([&](int i) {
        each<9>([&](int tap) { gw[tap] += seen[tap / 3][i] * v[i + 2 - tap % 3]; });
      });
    }
    each<PX>([&](int i) {
      if (leaves && owned[i]) {
        const Logistic l = logistic<T>(widen(x[i]));
        narrow(silu_slope(widen(x[i]), l.s, l.rest) * gu.above[i], p.ga + left + 2 * i * t.pairs);
      }
      seen[0][i] = seen[1][i], seen[1][i] = seen[2][i];
    });
    gu.step(0.f);
  }
  // The sums of the warps that share channels, in the order of their pixels.
  float* sums = u[0];
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

template <class P>
const char* launch_tiles(void (*kernel)(P), const P& p, int64_t margin, void* stream) {
  if (p.width * 2 * p.channels > INT32_MAX) return "a row of pixels has more than 2^31 elements";
  return start(kernel, Tiling(p, int(margin)).blocks(p), THREADS, p, stream);
}

}  // namespace

template <class T>
const char* launch(const Forward<T>& p, void* stream) {
  constexpr int V = 16 / sizeof(T);
  const bool vectors = p.channels % V == 0 && aligned(p.a) && aligned(p.ta);
  const auto value = vectors ? forward_kernel<T, V, false> : forward_kernel<T, 1, false>;
  const auto both = vectors ? forward_kernel<T, V, true> : forward_kernel<T, 1, true>;
  return launch_tiles(p.ty ? both : value, p, 0, stream);
}

template <class T>
const char* launch(const Backward<T>& p, void* stream) {
  constexpr int V = 16 / sizeof(T);
  const bool vectors = p.channels % V == 0 && aligned(p.a);
  const auto kernel = vectors ? backward_kernel<T, V> : backward_kernel<T, 1>;
  return launch_tiles(kernel, p, overlap(p.width), stream);
}

#define TBCM_INSTANCE(T)                                       \
  template const char* launch(const Forward<T>&, void*);      \
  template const char* launch(const Backward<T>&, void*);
TBCM_INSTANCE(float)
TBCM_INSTANCE(bfloat16)
TBCM_INSTANCE(float16)

}  // namespace tbcm::conv_glu
