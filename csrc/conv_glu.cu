// CUDA kernels of conv_glu: a block walks down a strip of an image, a warp PX columns of it, a thread
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
#include "sums.h"

namespace tbcm::conv_glu {
namespace {

// Of a block, at most, where a thread has PX pixels side by side.
constexpr int warps_of(int px) { return (int(TILE) + px - 1) / px; }
template <bool TANGENT>
constexpr int PX_FORWARD = TANGENT ? 4 : 8;
constexpr int PX_BACKWARD = 2;
constexpr int STATIC_BYTES = 37 << 10;  // of a block, at most: backward's borders
constexpr int RING = 4;  // rows in turn: of input and slopes in shared memory, of u in backward's registers

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
template <int PX>
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
template <int PX>
struct Place : Tiling<PX> {
  using Tiling<PX>::across, Tiling<PX>::down, Tiling<PX>::deep, Tiling<PX>::columns, Tiling<PX>::margin;
  int height, pairs, lane, warp, strip, image, channel, begin, x, width, own, y0, y1;
  TBCM_D Place(const Shape& p, int reach, int channels)
      : Tiling<PX>(p, reach, channels), height(p.height), pairs(p.channels) {
    const int tile = blockIdx.x / deep;
    lane = threadIdx.x % WARP;
    warp = threadIdx.x / WARP;
    strip = tile % (across * down);
    image = tile / (across * down);
    channel = (blockIdx.x % deep * WARP + lane) * channels;
    begin = strip % across * columns;
    width = channel < pairs ? int(p.width) : 0;
    own = int(p.width) - begin < columns ? int(p.width) - begin : columns;
    x = begin - margin + warp * PX;
    y0 = strip / across * int(TILE);
    y1 = y0 + int(TILE) < height ? y0 + int(TILE) : height;
  }
  TBCM_D bool owned(int i) const { return unsigned(x - begin + i) < unsigned(own); }
  // The thread's first pixel in row y.
  TBCM_D int64_t pixel(const Shape& p, int y) const { return (image * p.height + y) * p.width + x; }
};

// Puts a pack of 2, 4, 8 or 16 bytes there.
template <class Pack>
TBCM_D void store(Shared to, const Pack& pack) {
  constexpr int SIZE = int(sizeof(Pack));
  static_assert(SIZE == 2 || SIZE == 4 || SIZE == 8 || SIZE == 16);
#if defined(__CUDA_ARCH__)
  if constexpr (SIZE == 2) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(to.address), "h"(reinterpret_cast<const uint16_t&>(pack)) : "memory");
  } else {
    uint4 x;
    std::memcpy(&x, &pack, SIZE);
    if constexpr (SIZE == 4) asm volatile("st.shared.u32 [%0], %1;" ::"r"(to.address), "r"(x.x) : "memory");
    else if constexpr (SIZE == 8)
      asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to.address), "r"(x.x), "r"(x.y) : "memory");
    else
      asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to.address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                   : "memory");
  }
#else
  *reinterpret_cast<Pack*>(to.address) = pack;
#endif
}

// A row of an operand, of a warp's pixels: how it moves between global memory, CHUNK elements an access, and the
// warp's shared memory, where a thread finds V of each pixel. Zeros where the image or its channels end.
template <class T, int PX, int V, int HALVES, int CHUNK>
struct Line {
  static constexpr int SIZE = CHUNK * int(sizeof(T)), PER = WARP * V / CHUNK, SPAN = HALVES * PER;  // accesses a pixel
  static constexpr int ALL = PX * SPAN, COPIES = (ALL + WARP - 1) / WARP, BYTES = ALL * SIZE;
  static_assert(SPAN <= WARP || PER == WARP);
  using Chunk = Pack<T, CHUNK>;
  T* at;
  int there = 0;  // a bit for each copy
  int pairs;

  // Of row y, and of `count` columns from the first.
  TBCM_D Line(const T* data, const Shape& p, const Place<PX>& t, int y, int first, int count) : pairs(t.pairs) {
    const int pixel = SPAN <= WARP ? t.lane / SPAN : 0, half = SPAN <= WARP ? t.lane / PER % HALVES : 0;
    const int channel = t.channel - t.lane * V + t.lane % PER * CHUNK;
    each<COPIES>([&](int i) {
      const bool inside = unsigned(t.x - first + pixel + pixel_of(i)) < unsigned(count) && channel < pairs;
      there |= (inside && i * WARP + t.lane < ALL) << i;
    });
    at = const_cast<T*>(data) + (t.pixel(p, y) + pixel) * (HALVES * p.channels) + half * p.channels + channel;
  }
  TBCM_D static int pixel_of(int i) { return SPAN <= WARP ? i * (WARP / SPAN) : i / HALVES; }
  TBCM_D static int half_of(int i) { return SPAN <= WARP ? 0 : i % HALVES; }
  // Asks for the row, or for zeros, at this lane's first chunk; elements too small for such copies move at once.
  TBCM_D void ask(Shared to, bool row, int64_t beside = 0) const {
    const int lane = threadIdx.x % WARP, here = row ? there : 0;
    const T* const from = at + beside;
    if constexpr (SIZE < 4) {
#pragma unroll 1
      for (int i = 0; i < COPIES; ++i) {
        const auto* source = reinterpret_cast<const Chunk*>(from + int64_t(pixel_of(i) * HALVES + half_of(i)) * pairs);
        copy_async(to + i * WARP * SIZE, source, here >> i & 1);
      }
    } else {
      each<COPIES>([&](int i) {
        const auto* source = reinterpret_cast<const Chunk*>(ahead(from, pixel_of(i) * HALVES + half_of(i), pairs));
        if (ALL % WARP == 0 || i * WARP + lane < ALL) copy_async(to + i * WARP * SIZE, source, here >> i & 1);
      });
    }
  }
  // Goes on by so many steps, in one instruction where registers for it are left.
  TBCM_D void advance(int count, int64_t step) {
    if constexpr (V * sizeof(T) == 2) at = ahead(at, count, int(step));
    else at += count * step;
  }
  // Writes the row to global memory.
  TBCM_D void give(Shared from, bool row = true, int64_t beside = 0) const {
    each<COPIES>([&](int i) {
      auto* target = reinterpret_cast<Chunk*>(ahead(at + beside, pixel_of(i) * HALVES + half_of(i), pairs));
      if (row && there >> i & 1) *target = load<Chunk>(from + i * WARP * SIZE);
    });
  }
  // From this lane's first pack to that of a pixel's half.
  TBCM_D static int place(int pixel, int half) { return (pixel * HALVES + half) * WARP * V * int(sizeof(T)); }
};

// A thread's row of pixels, and one more at both ends.
template <int PX>
using Row = float[PX + 2];

// The outer pixels of each warp's rows, N rows an access, in turns; beyond the first and the last warp are zeros.
template <int PX, int N>
struct Borders {
  using Pixels = Pack<float, N>;
  using Memory = Pixels[2][warps_of(PX) + 2][2][WARP];
  static constexpr int SIDE = int(sizeof(Pixels)) * WARP, TURN = int(sizeof(Memory)) / 2;
  Shared at;  // the right pixels of the warp before

  TBCM_D Borders(Memory& memory, const Place<PX>& t) : at(&memory[0][t.warp][1][t.lane]) {
    each<2>([&](int i) { memory[i][0][1][t.lane] = memory[i][t.warps + 1][0][t.lane] = {}; });
  }
  TBCM_D void put(int turn, const Row<PX> (&rows)[N]) const {
    Pixels left, right;
    each<N>([&](int j) {
      left.values[j] = rows[j][1];
      right.values[j] = rows[j][PX];
    });
    store(at + (turn * TURN + SIDE), left);
    store(at + (turn * TURN + 2 * SIDE), right);
  }
  TBCM_D void get(int turn, Row<PX> (&rows)[N]) const {
    const auto left = load<Pixels>(at + turn * TURN), right = load<Pixels>(at + (turn * TURN + 3 * SIDE));
    each<N>([&](int j) {
      rows[j][0] = left.values[j];
      rows[j][PX + 1] = right.values[j];
    });
  }
};

// Sums of rows of the stencil's output. Step k adds a row of input to three of them, and with it completes
// row k, the one above; the one below starts.
template <int PX>
struct Sums {
  float rows[RING][PX];

  template <bool TRANSPOSED = false>
  TBCM_D void add(int k, const Row<PX>& v, const float (&w)[9], float start) {
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

// Of a warp's shared memory: the rows on their way, and those of y that leave.
template <class T, int PX, int V, bool TANGENT, int CHUNK>
struct ForwardBytes {
  static constexpr int INPUT = Line<T, PX, V, 2, CHUNK>::BYTES, OUTPUT = INPUT / 2;
  static constexpr int STAGE = (1 + TANGENT) * INPUT, OF_WARP = RING * STAGE + (1 + TANGENT) * OUTPUT;
};

template <class T, int V, bool TANGENT, int CHUNK>
__global__ void __launch_bounds__(warps_of(PX_FORWARD<TANGENT>) * WARP, TANGENT ? 2 : 4)
    forward_kernel(const Forward<T> p) {
  constexpr int PX = PX_FORWARD<TANGENT>, DUAL = 1 + TANGENT;
  using Bytes = ForwardBytes<T, PX, V, TANGENT, CHUNK>;
  using Pixel = Pack<T, V>;
  using Input = Line<T, PX, V, 2, CHUNK>;
  using Output = Line<T, PX, V, 1, CHUNK>;
  using Edges = Borders<PX, DUAL * 2 * V>;
  using Weights = Pack<float, 2>;
  __shared__ typename Edges::Memory memory;
  __shared__ Weights weights[2][5 * V][WARP];
  TBCM_DYNAMIC_SHARED(shared);
  const Place<PX> t(p, 1, V);
  const Edges borders(memory, t);
  Row<PX> u[DUAL * 2 * V];  // of values and tangents, both halves, V channels
  Sums<PX> c[DUAL * 2 * V];
  each<2 * V>([&](int part) {
    const int channel = part / V * t.pairs + t.channel + part % V;
    const auto put = [&](int i, float w) {
      const int n = i * V + part % V;
      weights[part / V][n / 2][t.lane].values[n % 2] = w;
    };
    const float bias = t.width && p.bias ? p.bias[channel] : 0.f;
    each<9>([&](int tap) { put(tap, t.width ? p.weight[tap * 2 * p.channels + channel] : 0.f); });
    put(9, bias);
    c[part].set(bias);
    if (TANGENT) c[DUAL * 2 * V - 2 * V + part].set(0.f);
  });
  float w[2 * V][9], bias[2 * V];
  const auto take = [&](int half) {
    Weights row[5 * V];
    each<5 * V>([&](int i) { row[i] = weights[half][i][t.lane]; });
    each<10 * V>([&](int n) {
      const float x = row[n / 2].values[n % 2];
      const int part = half * V + n % V;
      if (n / V < 9) w[part][n / V] = x;
      else bias[part] = x;
    });
  };
  if (!TANGENT) each<2>(take);
  int y = t.y0 > 0 ? t.y0 - 1 : 0;
  const int last = t.y1 < t.height ? t.y1 : t.height - 1;
  const int64_t step = p.width * p.channels, to_ta = p.ta - p.a, to_ty = p.ty - p.y;
  unsigned char* const own = shared + t.warp * Bytes::OF_WARP;
  const Shared mine(own + t.lane * sizeof(Pixel)), chunk(own + t.lane * Input::SIZE);
  Input input(p.a, p, t, y, 0, int(p.width));
  Output output(p.y, p, t, y - 1, t.begin, t.own);
  // Asks for a row, or for zeros below the last.
  const auto ask = [&](int stage, bool row) {
    input.ask(chunk + stage * Bytes::STAGE, row);
    if (TANGENT) input.ask(chunk + (stage * Bytes::STAGE + Bytes::INPUT), row, to_ta);
    input.advance(2, step);
    commit_copies();
  };
  // Row k of u, which has come.
  const auto activate = [&](int k) {
    each<2 * PX>([&](int part) {
      const int half = part % 2, i = part / 2;
      const Shared a = mine + (k * Bytes::STAGE + Input::place(i, half));
      const auto x = load<Pixel>(a), tx = TANGENT ? load<Pixel>(a + Bytes::INPUT) : Pixel{};
      each<V>([&](int j) {
        const Silu s = silu<T>(widen(x, j));
        u[half * V + j][i + 1] = s.value;
        if (TANGENT) u[(DUAL * 2 - 2 + half) * V + j][i + 1] = s.slope * widen(tx, j);
      });
    });
    borders.put(k % 2, u);
  };
  // Row y - 1 of the result.
  const auto finish = [&](int k) {
    constexpr int AT = RING * Bytes::STAGE;
    each<PX>([&](int i) {
      Pixel y[DUAL];
      each<V>([&](int j) {
        const float c1 = c[j].rows[k][i];
        const Silu gate = silu<T>(c[V + j].rows[k][i]);
        narrow(c1 * gate.value, &y[0].values[j]);
        if (TANGENT) {
          const float tc1 = c[DUAL * 2 * V - 2 * V + j].rows[k][i], tc2 = c[DUAL * 2 * V - V + j].rows[k][i];
          narrow(tc1 * gate.value + c1 * gate.slope * tc2, &y[TANGENT].values[j]);
        }
      });
      each<DUAL>([&](int d) { store(mine + (AT + d * Bytes::OUTPUT + Output::place(i, 0)), y[d]); });
    });
    __syncwarp();
    each<DUAL>([&](int d) { output.give(chunk + (AT + d * Bytes::OUTPUT), y > t.y0, d * to_ty); });
    output.advance(1, step);
  };
  each<RING - 1>([&](int i) { ask(i, y + i <= last); });
  wait_for_copies<RING - 2>();
  __syncwarp();
  activate(0);
  __syncthreads();
  while (y <= t.y1) each<RING>([&](int k) {
      if (y > t.y1) return;
      wait_for_copies<RING - 3>();
      __syncwarp();  // the warp's copies of the row below are there, and the place of the row above is free
      ask((k + RING - 1) % RING, y <= last - (RING - 1));
      borders.get(k % 2, u);
      each<2>([&](int half) {
        if (TANGENT) take(half);  // again for each row: sums need the registers
        each<V>([&](int j) {
          const int value = half * V + j, tangent = (DUAL * 2 - 2) * V + value;
          c[value].add(k, u[value], w[value], bias[value]);
          if (TANGENT) c[tangent].add(k, u[tangent], w[value], 0.f);
        });
      });
      finish(k);
      activate((k + 1) % RING);
      __syncthreads();
      ++y;
    });
}

// Of a warp's shared memory: the rows on their way, and the row of ga that leaves; at the end its sums.
template <class T, int PX, int CHUNK>
struct BackwardBytes {
  static constexpr int INPUT = Line<T, PX, 1, 2, CHUNK>::BYTES, STAGE = INPUT + Line<T, PX, 1, 1, CHUNK>::BYTES;
  static constexpr int SLOPES = 2 * PX * WARP * int(sizeof(float)), SUMS = 20 * WARP * int(sizeof(float));
  static constexpr int ROWS = RING * (STAGE + SLOPES) + INPUT;
  static constexpr int OF_WARP = ROWS > SUMS ? ROWS : SUMS;
};

template <class T, int CHUNK>
__global__ void __launch_bounds__(warps_of(PX_BACKWARD) * WARP, 1) backward_kernel(const Backward<T> p) {
  constexpr int PX = PX_BACKWARD;
  using Bytes = BackwardBytes<T, PX, CHUNK>;
  using Pair = Line<T, PX, 1, 2, CHUNK>;
  using Single = Line<T, PX, 1, 1, CHUNK>;
  using Edges = Borders<PX, 2>;
  using Element = Pack<T, 1>;
  using Slopes = Pack<float, 2 * PX>;
  __shared__ typename Edges::Memory u_memory, gc_memory;
  TBCM_DYNAMIC_SHARED(shared);
  const Place<PX> t(p, 2, 1);
  const Edges u_borders(u_memory, t), gc_borders(gc_memory, t);
  float w[2][9], bias[2], gw[2][9] = {}, gb[2] = {};
  Row<PX> u[RING][2] = {}, gc[2];  // row y in place y % RING, counted from the block's first
  Sums<PX> gu[2];
  each<2>([&](int half) {
    const int channel = half * t.pairs + t.channel;
    each<9>([&](int tap) { w[half][tap] = t.width ? p.weight[tap * 2 * p.channels + channel] : 0.f; });
    bias[half] = t.width && p.bias ? p.bias[channel] : 0.f;
    gu[half].set(0.f);
  });
  int y = t.y0 > 1 ? t.y0 - 2 : 0;
  const int64_t step = p.width * p.channels;
  unsigned char* const own = shared + t.warp * Bytes::OF_WARP;
  const Shared mine(own + t.lane * sizeof(T)), chunk(own + t.lane * Pair::SIZE);
  const Shared slopes(own + RING * Bytes::STAGE + Bytes::INPUT + t.lane * sizeof(Slopes));
  Pair input(p.a, p, t, y, 0, int(p.width)), output(p.ga, p, t, y - 2, t.begin, t.own);
  Single cotangent(p.gy, p, t, y - 2, 0, int(p.width));
  // Asks for a row of a, and for the second row above of gy, which are used in the same step; or for zeros.
  const auto ask = [&](int stage, bool a, bool gy) {
    input.ask(chunk + stage * Bytes::STAGE, a);
    cotangent.ask(chunk + (stage * Bytes::STAGE + Bytes::INPUT), gy);
    input.advance(2, step);
    cotangent.advance(1, step);
    commit_copies();
  };
  // Row k of u, which has come.
  const auto activate = [&](int k) {
    Slopes slope;
    each<2>([&](int half) {
      each<PX>([&](int i) {
        const Silu s = silu<T>(widen(load<Element>(mine + (k * Bytes::STAGE + Pair::place(i, half))).values[0]));
        u[k][half][i + 1] = s.value;
        slope.values[half * PX + i] = s.slope;
      });
    });
    store(slopes + k * Bytes::SLOPES, slope);
    u_borders.put(k % 2, u[k]);
  };
  const int below = t.height - 1, last_a = t.y1 < below ? t.y1 + 1 : below, last_gy = t.y1 < below ? t.y1 : below;
  each<RING - 1>([&](int i) { ask(i, y + i <= last_a, i == 2); });
  wait_for_copies<RING - 2>();
  __syncwarp();
  activate(0);
  __syncthreads();
  // Step y completes row y - 1 of gc, and with it row y - 2 of ga.
  while (y <= t.y1 + 1) each<RING>([&](int k) {
      if (y > t.y1 + 1) return;
      wait_for_copies<RING - 3>();
      __syncwarp();  // the warp's copies of the row below are there, and the place of the row above is free
      ask((k + RING - 1) % RING, y <= last_a - (RING - 1), y < last_gy);
      const bool complete = y > 0 && y >= t.y0 && y <= t.height;
      u_borders.get(k % 2, u[k]);
      if (complete) {
        float c[2][PX];
        each<2 * 9 * PX>([&](int part) {
          const int half = part / PX % 2, tap = part / PX / 2, dy = tap / 3, dx = tap % 3, i = part % PX;
          c[half][i] = (tap == 0 ? bias[half] : c[half][i]) + w[half][tap] * u[(k + 2 + dy) % RING][half][i + dx];
        });
        each<PX>([&](int i) {
          constexpr int AT = Bytes::INPUT;
          const auto gy = load<Element>(mine + ((k + 1) % RING * Bytes::STAGE + AT + Single::place(i, 0)));
          const float g = widen(gy.values[0]);
          const Silu gate = silu<T>(c[1][i]);
          gc[0][i + 1] = g * gate.value;
          gc[1][i + 1] = g * c[0][i] * gate.slope;
        });
        gc_borders.put(k % 2, gc);
        if (y > t.y0 && y <= t.y1) each<20>([&](int part) {
            const int half = part % 2, tap = part / 2;
            each<PX>([&](int i) {
              const float g = gc[half][i + 1];
              if (t.owned(i)) {
                if (tap == 9) gb[half] += g;
                else gw[half][tap] += g * u[(k + 2 + tap / 3) % RING][half][i + tap % 3];
              }
            });
          });
      }
      activate((k + 1) % RING);
      __syncthreads();
      if (complete) {
        gc_borders.get(k % 2, gc);
        each<2>([&](int half) { gu[half].template add<true>(k, gc[half], w[half], 0.f); });
      }
      if (y - 2 >= t.y0) {
        constexpr int AT = RING * Bytes::STAGE;
        const auto slope = load<Slopes>(slopes + (k + 2) % RING * Bytes::SLOPES);
        each<2 * PX>([&](int part) {
          const int half = part % 2, i = part / 2;
          T ga;
          narrow(slope.values[half * PX + i] * gu[half].rows[k][i], &ga);
          store(mine + (AT + Pair::place(i, half)), ga);
        });
        __syncwarp();
        output.give(chunk + AT);
      }
      ++y;
      output.advance(2, step);
    });
  // The sums of the warps, in the order of their pixels.
  wait_for_copies<0>();
  __syncwarp();
  each<20>([&](int i) {
    reinterpret_cast<float*>(own)[i * WARP + t.lane] = i % 10 < 9 ? gw[i / 10][i % 10] : gb[i / 10];
  });
  __syncthreads();
  const int64_t part = int64_t(t.image) * t.across * t.down + t.strip;
  if (t.width) for (int i = t.warp; i < 20; i += t.warps) {
    const int half = i / 10, tap = i % 10, channel = half * t.pairs + t.channel;
    float total = 0.f;
    for (int warp = 0; warp < t.warps; ++warp)
      total += reinterpret_cast<const float*>(shared + warp * Bytes::OF_WARP)[i * WARP + t.lane];
    if (tap < 9 && p.gweight) p.gweight[(part * 9 + tap) * 2 * t.pairs + channel] = total;
    if (tap == 9 && p.gbias) p.gbias[part * 2 * t.pairs + channel] = total;
  }
}

template <int PX, class P>
const char* launch_tiles(void (*kernel)(P), const P& p, int reach, int channels, int bytes, void* stream) {
  if (p.width * 2 * p.channels > INT32_MAX) return "a row of pixels has more than 2^31 elements";
  const Tiling<PX> t(p, reach, channels);
  return start(kernel, p.batch * t.across * t.down * t.deep, t.warps * WARP, t.warps * bytes, STATIC_BYTES, p, stream);
}

template <class T, int V, bool TANGENT, int CHUNK>
const char* launch_forward(const Forward<T>& p, void* stream) {
  constexpr int BYTES = ForwardBytes<T, PX_FORWARD<TANGENT>, V, TANGENT, CHUNK>::OF_WARP;
  return launch_tiles<PX_FORWARD<TANGENT>>(forward_kernel<T, V, TANGENT, CHUNK>, p, 1, V, BYTES, stream);
}

template <class T, int CHUNK>
const char* launch_backward(const Backward<T>& p, void* stream) {
  constexpr int BYTES = BackwardBytes<T, PX_BACKWARD, CHUNK>::OF_WARP;
  return launch_tiles<PX_BACKWARD>(backward_kernel<T, CHUNK>, p, 2, 1, BYTES, stream);
}

}  // namespace

template <class T>
const char* launch(const Forward<T>& p, void* stream) {
  constexpr int CHUNK = 16 / sizeof(T), V = 4 / sizeof(T);
  const bool chunks = p.channels % CHUNK == 0 && aligned(p.a) && aligned(p.ta) && aligned(p.y) && aligned(p.ty);
  if (p.ty) return chunks ? launch_forward<T, 1, true, CHUNK>(p, stream) : launch_forward<T, 1, true, 1>(p, stream);
  return chunks ? launch_forward<T, 1, false, CHUNK>(p, stream) : launch_forward<T, 1, false, 1>(p, stream);
}

template <class T>
const char* launch(const Backward<T>& p, void* stream) {
  constexpr int CHUNK = 16 / sizeof(T);
  const bool chunks = p.channels % CHUNK == 0 && aligned(p.a) && aligned(p.gy) && aligned(p.ga);
  const char* fault = chunks ? launch_backward<T, CHUNK>(p, stream) : launch_backward<T, 1>(p, stream);
  return fault ? fault : start(p.sums, stream);
}

TBCM_INSTANCES

}  // namespace tbcm::conv_glu
