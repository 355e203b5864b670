// The next CUDA kernels of conv_glu: a block walks down a strip of an image, a warp four columns of it, a thread
// both halves of V channels.
//
// Beside 3, 6 and 5 elements of memory for each pixel and channel pair stand 18, 36 and 54 multiply-adds
// and three sigmoids, so instructions count as much as bytes. Hence silu(a) is computed once and stays in
// registers; only the outer pixels of a thread pass through shared memory, to the threads beside it; and
// the row is added into three rows of sums. Loops over rows are unrolled by RING, so that a row of registers
// becomes the one above without moves. Rows are asked for three ahead, into shared memory of each warp's own: with
// one ahead, in registers, forward took twice as long as its instructions and backward three times.
#include "async.h"
#include "conv_glu.h"

namespace tbcm::conv_glu::next {
namespace {

constexpr int PX = 4;  // pixels of a thread, side by side
constexpr int WARPS = int(TILE) / PX, THREADS = WARPS * WARP;  // of a block, at most
constexpr int STATIC_BYTES = 40 << 10;  // of a block, at most: backward's borders and sums
constexpr int RING = 4;  // rows in turn: of input in shared memory, of u and its slope in backward's registers

// silu(x) = x s and its derivative s + silu(x) (1 - s), for s = sigmoid(x).
struct Silu {
  float value, slope;
};
template <class T>
TBCM_D Silu silu(float x) {
  if constexpr (sizeof(T) == 4) {
    const float e = expf(fminf(-x, 88.7f)), s = 1.f / (1.f + e);
    return {x * s, silu_slope(x, s, e * s)};
  } else {  // far fewer instructions; their error is far below what rounding to 16 bits adds
    const float s = quick_reciprocal(1.f + quick_exp2(x * -1.44269504f)), value = x * s;
    return {value, s + value * (1.f - s)};
  }
}

// How images are cut: strips of `columns` pixels and TILE rows, beside them margins that they share.
struct Tiling {
  int margin, across, down, deep, columns, warps;
  TBCM_HD Tiling(const Shape& p, int reach, int channels) {
    across = int(strips(p.width, reach));
    down = int(tiles(p.height, TILE));
    deep = int(tiles(p.channels, WARP * channels));
    columns = int(tiles(p.width, across));
    margin = across > 1 ? reach : 0;
    warps = int(tiles(columns + 2 * margin, PX));
  }
};

// Where this block and this thread stand.
struct Place : Tiling {
  int height, pairs, lane, warp, strip, image, channel, begin, x, width, own, y0, y1;
  TBCM_D Place(const Shape& p, int reach, int channels)
      : Tiling(p, reach, channels), height(p.height), pairs(p.channels) {
    const int tile = blockIdx.x / deep;
    lane = threadIdx.x % WARP;
    warp = threadIdx.x / WARP;
    strip = tile % (across * down);
    image = tile / (across * down);
    channel = (blockIdx.x % deep * WARP + lane) * channels;
    begin = strip % across * columns;
    width = channel < pairs ? int(p.width) : 0;
    own = width - begin < columns ? (width > begin ? width - begin : 0) : columns;
    x = begin - margin + warp * PX;
    y0 = strip / across * int(TILE);
    y1 = y0 + int(TILE) < height ? y0 + int(TILE) : height;
  }
  TBCM_D bool owned(int i) const { return unsigned(x - begin + i) < unsigned(own); }
  // The thread's first pixel in row y.
  TBCM_D int64_t pixel(const Shape& p, int y) const { return (image * p.height + y) * p.width + x; }
};

// One operand's rows of a warp's pixels, from where they lie to RING places in shared memory, CHUNK elements an
// access. Zeros where the image or its channels end.
template <class T, int V, int HALVES, int CHUNK>
struct Feed {
  static constexpr int SIZE = CHUNK * int(sizeof(T)), PER = WARP * V / CHUNK, SPAN = HALVES * PER;  // accesses a pixel
  static constexpr int ALL = PX * SPAN, COPIES = (ALL + WARP - 1) / WARP, BYTES = ALL * SIZE;
  static_assert(SPAN <= WARP || PER == WARP);
  using Chunk = Pack<T, CHUNK>;
  const T* from;
  int there = 0;  // a bit for each copy
  int pairs;
  unsigned char* own;
  Shared to;

  TBCM_D Feed(const T* data, const Shape& p, const Place& t, int y, unsigned char* shared)
      : pairs(t.pairs), own(shared), to(shared + t.lane * SIZE) {
    const int pixel = SPAN <= WARP ? t.lane / SPAN : 0, half = SPAN <= WARP ? t.lane / PER % HALVES : 0;
    const int channel = t.channel - t.lane * V + t.lane % PER * CHUNK;
    each<COPIES>([&](int i) {
      const bool inside = unsigned(t.x + pixel + pixel_of(i)) < unsigned(p.width) && channel < pairs;
      there |= (inside && i * WARP + t.lane < ALL) << i;
    });
    from = data + (t.pixel(p, y) + pixel) * (HALVES * p.channels) + half * p.channels + channel;
  }
  TBCM_D static int pixel_of(int i) { return SPAN <= WARP ? i * (WARP / SPAN) : i / HALVES; }
  TBCM_D static int half_of(int i) { return SPAN <= WARP ? 0 : i % HALVES; }
  // Asks for the row, of a stage of so many bytes; elements too small for such copies move at once.
  TBCM_D void ask(int stage, int bytes) {
    const int lane = threadIdx.x % WARP;
    if constexpr (SIZE < 4) {
#pragma unroll 1
      for (int i = 0; i < COPIES; ++i) {
        const auto* source = reinterpret_cast<const Chunk*>(from + int64_t(pixel_of(i) * HALVES + half_of(i)) * pairs);
        copy_async(to + (stage * bytes + i * WARP * SIZE), source, there >> i & 1);
      }
    } else {
      each<COPIES>([&](int i) {
        const auto* source = reinterpret_cast<const Chunk*>(ahead(from, pixel_of(i) * HALVES + half_of(i), pairs));
        if (ALL % WARP == 0 || i * WARP + lane < ALL)
          copy_async(to + (stage * bytes + i * WARP * SIZE), source, there >> i & 1);
      });
    }
  }
  TBCM_D Pack<T, V> get(int stage, int bytes, int pixel, int half) const {
    const auto* row = reinterpret_cast<const Pack<T, V>*>(own + stage * bytes);
    return row[(pixel * HALVES + half) * WARP + threadIdx.x % WARP];
  }
};

// A thread's row of pixels, and one more at both ends.
using Row = float[PX + 2];

// The outer pixels of each warp's rows; beyond the first and the last warp are zeros.
template <int V>
struct Borders {
  Pack<float, V> pixels[WARPS + 2][2][WARP];

  TBCM_D void clear(const Place& t) {
    pixels[0][1][t.lane] = pixels[t.warps + 1][0][t.lane] = {};
  }
  TBCM_D void put(const Place& t, const Row (&rows)[V]) {
    each<V>([&](int j) {
      pixels[t.warp + 1][0][t.lane].values[j] = rows[j][1];
      pixels[t.warp + 1][1][t.lane].values[j] = rows[j][PX];
    });
  }
  TBCM_D void get(const Place& t, Row (&rows)[V]) const {
    const Pack<float, V> left = pixels[t.warp][1][t.lane], right = pixels[t.warp + 2][0][t.lane];
    each<V>([&](int j) {
      rows[j][0] = left.values[j];
      rows[j][PX + 1] = right.values[j];
    });
  }
};

// Sums of rows of the stencil's output. Step k adds a row of input to three of them, and with it completes
// row k, the one above; the one below starts.
struct Sums {
  float rows[RING][PX];

  template <bool TRANSPOSED = false>
  TBCM_D void add(int k, const Row& v, const float (&w)[9], float start) {
    each<9>([&](int tap) {
      const int dy = tap / 3, dx = tap % 3;
      each<PX>([&](int i) {
        float& sum = rows[(k + 2 - dy) % RING][i];
        sum = (tap == 0 ? start : sum) + w[TRANSPOSED ? 8 - tap : tap] * v[i + dx];
      });
    });
  }
  TBCM_D void set(float start) {
    each<RING * PX>([&](int i) { rows[i / PX][i % PX] = start; });
  }
};

template <class T, int V, bool TANGENT, int CHUNK>
__global__ void __launch_bounds__(THREADS, sizeof(T) == 4 ? 1 : 2) forward_kernel(const Forward<T> p) {
  using Pixel = Pack<T, V>;
  using Input = Feed<T, V, 2, CHUNK>;
  constexpr int DUAL = 1 + TANGENT, STAGE = DUAL * Input::BYTES;
  __shared__ Borders<V> borders[2][DUAL][2];
  __shared__ Pack<float, V> taps[2][9][WARP];  // read again for each row: the registers are needed for sums
  TBCM_DYNAMIC_SHARED(shared);
  const Place t(p, 1, V);
  float bias[2][V];
  Row u[DUAL][2][V];
  Sums c[DUAL][2][V];
  Pixel a[DUAL][2][PX] = {};
  each<2 * V>([&](int part) {
    const int half = part / V, j = part % V, channel = half * t.pairs + t.channel + j;
    each<9>([&](int tap) {
      taps[half][tap][t.lane].values[j] = t.width ? p.weight[tap * 2 * p.channels + channel] : 0.f;
    });
    bias[half][j] = t.width && p.bias ? p.bias[channel] : 0.f;
    c[0][half][j].set(bias[half][j]);
    if (TANGENT) c[TANGENT][half][j].set(0.f);
  });
  each<4 * DUAL>([&](int i) { borders[i % 2][i / 4][i / 2 % 2].clear(t); });
  int y = t.y0 > 0 ? t.y0 - 1 : 0;
  const int pitch = t.pairs / V;
  const int64_t step = p.width * pitch, write = t.pixel(p, t.y0) * p.channels + t.channel;
  Pixel* out[] = {reinterpret_cast<Pixel*>(p.y + write), reinterpret_cast<Pixel*>(p.ty + write)};
  unsigned char* const own = shared + t.warp * (RING * STAGE);
  Input input(p.a, p, t, y, own), moving(TANGENT ? p.ta : p.a, p, t, y, own + Input::BYTES);
  const auto ask = [&](int stage, int row) {
    if (row <= t.y1 && row < t.height) {
      input.ask(stage, STAGE);
      if (TANGENT) moving.ask(stage, STAGE);
    }
    input.from += 2 * V * step;
    moving.from += 2 * V * step;
    commit_copies();
  };
  const auto fetch = [&](int stage, int row) {
    wait_for_copies<RING - 2>();
    __syncwarp();  // the warp's copies are there, and the place of the row above is free
    ask((stage + RING - 1) % RING, row + RING - 1);
    each<2 * PX>([&](int part) {
      a[0][part % 2][part / 2] = input.get(stage, STAGE, part / 2, part % 2);
      if (TANGENT) a[TANGENT][part % 2][part / 2] = moving.get(stage, STAGE, part / 2, part % 2);
    });
  };
  each<RING - 1>([&](int i) { ask(i, y + i); });
  fetch(0, y);
  while (y <= t.y1) each<RING>([&](int k) {
      if (y > t.y1) return;
      if (y < t.height) {
        each<2 * V * PX>([&](int part) {
          const int half = part % 2, j = part / 2 % V, i = part / 2 / V;
          const Silu s = silu<T>(widen(a[0][half][i], j));
          u[0][half][j][i + 1] = s.value;
          if (TANGENT) u[TANGENT][half][j][i + 1] = s.slope * widen(a[TANGENT][half][i], j);
        });
        each<2 * DUAL>([&](int i) { borders[k % 2][i / 2][i % 2].put(t, u[i / 2][i % 2]); });
        if (y + 1 < t.height) fetch((k + 1) % RING, y + 1);
      }
      __syncthreads();
      if (y < t.height) {
        each<2 * DUAL>([&](int i) { borders[k % 2][i / 2][i % 2].get(t, u[i / 2][i % 2]); });
        each<2>([&](int half) {
          float w[V][9];
          each<9>([&](int tap) {
            const Pack<float, V> ws = taps[half][tap][t.lane];
            each<V>([&](int j) { w[j][tap] = ws.values[j]; });
          });
          each<V>([&](int j) {
            c[0][half][j].add(k, u[0][half][j], w[j], bias[half][j]);
            if (TANGENT) c[TANGENT][half][j].add(k, u[TANGENT][half][j], w[j], 0.f);
          });
        });
      }
      if (y++ <= t.y0) return;
      each<PX>([&](int i) {
        Pixel y[2];
        each<V>([&](int j) {
          const float c1 = c[0][0][j].rows[k][i];
          const Silu gate = silu<T>(c[0][1][j].rows[k][i]);
          narrow(c1 * gate.value, &y[0].values[j]);
          if (TANGENT) {
            const float tc1 = c[TANGENT][0][j].rows[k][i], tc2 = c[TANGENT][1][j].rows[k][i];
            narrow(tc1 * gate.value + c1 * gate.slope * tc2, &y[1].values[j]);
          }
        });
        if (t.owned(i)) each<DUAL>([&](int d) { *ahead(out[d], i, pitch) = y[d]; });
      });
      each<DUAL>([&](int d) { out[d] += step; });
    });
}

template <class T, int CHUNK>
__global__ void __launch_bounds__(THREADS, 1) backward_kernel(const Backward<T> p) {
  using Input = Feed<T, 1, 2, CHUNK>;
  using Cotangent = Feed<T, 1, 1, CHUNK>;
  constexpr int STAGE = Input::BYTES + Cotangent::BYTES;
  __shared__ Borders<1> u_borders[2][2], gc_borders[2][2];
  __shared__ float sums[2][10][WARPS][WARP];
  TBCM_DYNAMIC_SHARED(shared);
  const Place t(p, 2, 1);
  float w[2][9], bias[2], gw[2][9] = {}, gb[2] = {};
  Row u[RING][2][1] = {}, gc[2][1];  // row y in place y % RING, counted from the block's first
  float slope[RING][2][PX];
  Sums c[2], gu[2];
  T a[2][PX] = {}, gy[PX] = {};
  each<2>([&](int half) {
    const int channel = half * t.pairs + t.channel;
    each<9>([&](int tap) { w[half][tap] = t.width ? p.weight[tap * 2 * p.channels + channel] : 0.f; });
    bias[half] = t.width && p.bias ? p.bias[channel] : 0.f;
    c[half].set(bias[half]);
    gu[half].set(0.f);
    each<2>([&](int k) {
      u_borders[k][half].clear(t);
      gc_borders[k][half].clear(t);
    });
  });
  int y = t.y0 > 1 ? t.y0 - 2 : 0;
  const int64_t step = p.width * p.channels;
  T* ga_row = p.ga + 2 * (t.pixel(p, y) * p.channels - 2 * step) + t.channel;
  unsigned char* const own = shared + t.warp * (RING * STAGE);
  Input input(p.a, p, t, y, own);
  Cotangent cotangent(p.gy, p, t, y - 2, own + Input::BYTES);
  // Asks for a row of a, and for the second row above of gy, which are used in the same step.
  const auto ask = [&](int stage, int row) {
    if (row <= t.y1 + 1 && row < t.height) input.ask(stage, STAGE);
    if (row > t.y0 && row >= 2 && row - 2 <= t.y1 && row - 2 < t.height) cotangent.ask(stage, STAGE);
    input.from += 2 * step;
    cotangent.from += step;
    commit_copies();
  };
  const auto fetch = [&](int stage, int row) {
    wait_for_copies<RING - 2>();
    __syncwarp();  // the warp's copies are there, and the place of the row above is free
    ask((stage + RING - 1) % RING, row + RING - 1);
    each<PX>([&](int i) {
      each<2>([&](int half) { a[half][i] = input.get(stage, STAGE, i, half).values[0]; });
      gy[i] = cotangent.get(stage, STAGE, i, 0).values[0];
    });
  };
  // Row k of u from what was fetched.
  const auto activate = [&](int k) {
    each<2>([&](int half) {
      each<PX>([&](int i) {
        const Silu s = silu<T>(widen(a[half][i]));
        u[k][half][0][i + 1] = s.value;
        slope[k][half][i] = s.slope;
      });
      u_borders[k % 2][half].put(t, u[k][half]);
    });
  };
  each<RING - 1>([&](int i) { ask(i, y + i); });
  fetch(0, y);
  activate(0);
  fetch(1, y + 1);
  __syncthreads();
  // Step y adds row y of u to c, completes row y - 1 of gc, and with it row y - 2 of ga.
  while (y <= t.y1 + 1) each<RING>([&](int k) {
      if (y > t.y1 + 1) return;
      const bool complete = y > 0 && y >= t.y0 && y <= t.height;
      each<2>([&](int half) {
        u_borders[k % 2][half].get(t, u[k][half]);
        if (y < t.height) c[half].add(k, u[k][half][0], w[half], bias[half]);
      });
      if (complete) {
        each<PX>([&](int i) {
          const float c1 = c[0].rows[k][i], g = widen(gy[i]);
          const Silu gate = silu<T>(c[1].rows[k][i]);
          gc[0][0][i + 1] = g * gate.value;
          gc[1][0][i + 1] = g * c1 * gate.slope;
        });
        each<2>([&](int half) { gc_borders[k % 2][half].put(t, gc[half]); });
        if (y > t.y0 && y <= t.y1) {
          each<2 * PX>([&](int i) {
            if (t.owned(i / 2)) gb[i % 2] += gc[i % 2][0][i / 2 + 1];
          });
          each<3>([&](int dy) {
            if (dy == 2 && y == t.height) return;  // there is no row below
            each<6>([&](int part) {
              const int half = part % 2, dx = part / 2;
              each<PX>([&](int i) {
                if (t.owned(i)) gw[half][dy * 3 + dx] += gc[half][0][i + 1] * u[(k + 2 + dy) % RING][half][0][i + dx];
              });
            });
          });
        }
      }
      if (y + 1 < t.height) activate((k + 1) % RING);
      fetch((k + 2) % RING, y + 2);
      __syncthreads();
      if (complete) each<2>([&](int half) {
          gc_borders[k % 2][half].get(t, gc[half]);
          gu[half].template add<true>(k, gc[half][0], w[half], 0.f);
        });
      if (y - 2 >= t.y0) each<2 * PX>([&](int i) {
          const int half = i % 2;
          const float ga = slope[(k + 2) % RING][half][i / 2] * gu[half].rows[k][i / 2];
          if (t.owned(i / 2)) narrow(ga, ahead(ga_row, i, t.pairs));
        });
      ++y;
      ga_row += 2 * step;
    });
  // The sums of the warps, in the order of their pixels.
  each<2>([&](int half) {
    each<9>([&](int tap) { sums[half][tap][t.warp][t.lane] = gw[half][tap]; });
    sums[half][9][t.warp][t.lane] = gb[half];
  });
  __syncthreads();
  const int64_t part = int64_t(t.image) * t.across * t.down + t.strip;
  if (t.width) for (int i = t.warp; i < 20; i += t.warps) {
    const int half = i / 10, tap = i % 10, channel = half * t.pairs + t.channel;
    float total = 0.f;
    for (int warp = 0; warp < t.warps; ++warp) total += sums[half][tap][warp][t.lane];
    if (tap < 9 && p.gweight) p.gweight[(part * 9 + tap) * 2 * t.pairs + channel] = total;
    if (tap == 9 && p.gbias) p.gbias[part * 2 * t.pairs + channel] = total;
  }
}

template <class P>
const char* launch_tiles(void (*kernel)(P), const P& p, int reach, int channels, int bytes, void* stream) {
  if (p.width * 2 * p.channels > INT32_MAX) return "a row of pixels has more than 2^31 elements";
  const Tiling t(p, reach, channels);
  return start(kernel, p.batch * t.across * t.down * t.deep, t.warps * WARP, t.warps * bytes, STATIC_BYTES, p, stream);
}

template <class T, int V, bool TANGENT, int CHUNK>
const char* launch_forward(const Forward<T>& p, void* stream) {
  constexpr int BYTES = RING * (1 + TANGENT) * Feed<T, V, 2, CHUNK>::BYTES;
  return launch_tiles(forward_kernel<T, V, TANGENT, CHUNK>, p, 1, V, BYTES, stream);
}

template <class T, int CHUNK>
const char* launch_backward(const Backward<T>& p, void* stream) {
  constexpr int BYTES = RING * (Feed<T, 1, 2, CHUNK>::BYTES + Feed<T, 1, 1, CHUNK>::BYTES);
  return launch_tiles(backward_kernel<T, CHUNK>, p, 2, 1, BYTES, stream);
}

}  // namespace

template <class T>
const char* launch(const Forward<T>& p, void* stream) {
  constexpr int CHUNK = 16 / sizeof(T), V = 4 / sizeof(T);
  const bool chunks = p.channels % CHUNK == 0 && aligned(p.a) && aligned(p.ta);
  if (p.ty) return chunks ? launch_forward<T, 1, true, CHUNK>(p, stream) : launch_forward<T, 1, true, 1>(p, stream);
  return chunks ? launch_forward<T, V, false, CHUNK>(p, stream) : launch_forward<T, 1, false, 1>(p, stream);
}

template <class T>
const char* launch(const Backward<T>& p, void* stream) {
  constexpr int CHUNK = 16 / sizeof(T);
  const bool chunks = p.channels % CHUNK == 0 && aligned(p.a) && aligned(p.gy);
  return chunks ? launch_backward<T, CHUNK>(p, stream) : launch_backward<T, 1>(p, stream);
}

TBCM_INSTANCES

}  // namespace tbcm::conv_glu::next
