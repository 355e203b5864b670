// CPU kernels of conv_glu. A task takes a group of channel blocks of one image, a vector of channel pairs each, and walks
// down the rows. Of activations it keeps three rows in cache, with a border of zeros, so that the 3x3 stencil reads
// memory once and needs no edge cases; of their gradients too.
#include "conv_glu_bindings.h"
#include "gemm.h"

namespace tbcm::conv_glu {
namespace {

constexpr int64_t GROUP = 128;  // channel pairs, so that a page of memory is met by few tasks
TBCM_INLINE int64_t groups(const Shape& p) { return (p.channels + GROUP - 1) / GROUP; }

// What a block keeps three rows of, as numbers of Lines: a half's activations and their tangents, or in backward
// their slopes, and the gradients of its convolution.
constexpr int64_t U = 0, TU = 2, SLOPE = 2, GC = 4, FORWARD_VALUES = 4, BACKWARD_VALUES = 6;
constexpr int64_t SUMS = 4;     // lines for the convolutions of a row: both halves, then their tangents
constexpr int64_t TOTALS = 10;  // of a half: the gradients of nine taps and of the bias

// A thread's scratch: lines of width + 2 vectors, whose ends stay zero, and the totals of backward.
template <class V>
struct Lines {
  static constexpr int64_t STEP = lanes<V>;
  int64_t width, values, blocks;
  float* data;
  Lines(const Shape& p, int64_t values) : width(p.width), values(values) {
    blocks = ((p.channels < GROUP ? p.channels : GROUP) + STEP - 1) / STEP;
    const int64_t floats = (SUMS + blocks * values * 3) * stride() + blocks * 2 * TOTALS * STEP;
    data = aligned_scratch(floats);
    std::memset(data, 0, floats * sizeof(float));
  }
  TBCM_INLINE int64_t stride() const { return (width + 2) * STEP; }
  TBCM_INLINE float* sum(int64_t i) const { return data + i * stride(); }
  TBCM_INLINE float* row(int64_t block, int64_t value, int64_t y) const {
    return data + (SUMS + (block * values + value) * 3 + (y + 3) % 3) * stride();
  }
  TBCM_INLINE float* totals(int64_t block, int64_t half) const {
    return row(blocks, 0, 0) + (block * 2 + half) * TOTALS * STEP;
  }
};

// A vector of channels of image b from `c` on, of which n are there; those of the other half are p.channels further.
template <class N>
struct Block {
  int64_t index, b, c;
  N n;
};

// Calls f(block) for the blocks of a task.
template <class V, class F>
TBCM_INLINE void for_blocks(const Shape& p, int64_t task, const F& f) {
  const int64_t first = task % groups(p) * GROUP, last = first + GROUP;
  for_lanes<V>(first, last < p.channels ? last : p.channels, [&](int64_t c, auto n) __attribute__((always_inline)) {
    f(Block<decltype(n)>{(c - first) / lanes<V>, task / groups(p), c, n});
  });
}

// A vector of channels is a cache line or less, and the next pixel's lie far away, where no hardware looks ahead: ask for
// those of the next row.
template <class V, class T>
TBCM_INLINE V get_ahead(const T* p, int64_t n, int64_t row) {
  __builtin_prefetch(p + row, 0, 2);
  return get<V>(p, n);
}

// And of what is written: a line is read before its first byte is.
template <class T, class V, class N>
TBCM_INLINE void put_ahead(T* p, V v, N n, int64_t row) {
  __builtin_prefetch(p + row, 1, 3);
  put(p, v, n);
}

// Row y of silu(a), and of silu'(a) ta or, without ta, of silu'(a) where `slopes`; of zeros beyond the image.
template <class V, class T, class N>
TBCM_INLINE void activate(const Shape& p, const T* a, const T* ta, bool slopes, const Lines<V>& l, const Block<N>& k,
                          int64_t y) {
  const int64_t pixel = 2 * p.channels, line = p.width * pixel;
  for (int64_t half = 0; half < 2; ++half) {
    float* u = l.row(k.index, U + half, y) + lanes<V>;
    float* slope = l.row(k.index, SLOPE + half, y) + lanes<V>;
    if (y < 0 || y == p.height) {
      std::memset(u, 0, p.width * lanes<V> * sizeof(float));
      if (slopes) std::memset(slope, 0, p.width * lanes<V> * sizeof(float));
      continue;
    }
    int64_t at = (k.b * p.height + y) * line + half * p.channels + k.c;
    for (int64_t x = 0; x < p.width; ++x, at += pixel) {
      const V v = get_ahead<V>(a + at, k.n, line);
      const auto s = logistic(v);
      put(u + x * lanes<V>, v * s.s);
      if (!slopes) continue;
      const V d = silu_slope(v, s.s, s.rest);
      put(slope + x * lanes<V>, ta ? d * get_ahead<V>(ta + at, k.n, line) : d);
    }
  }
}

// Taps of the channels that start at `c`, of which n are there.
template <class V, class N>
TBCM_INLINE void taps(const Shape& p, int64_t c, N n, V* w) {
  for (int64_t tap = 0; tap < 9; ++tap) w[tap] = get<V>(p.weight + tap * 2 * p.channels + c, n);
}

// The rows above, at and below y of a value.
template <class V>
struct Window {
  const float* at[3];
  TBCM_INLINE Window(const Lines<V>& l, int64_t block, int64_t value, int64_t y)
      : at{l.row(block, value, y - 1), l.row(block, value, y), l.row(block, value, y + 1)} {}
  TBCM_INLINE V get(int64_t tap, int64_t x) const { return tbcm::get<V>(at[tap / 3] + (x + tap % 3) * lanes<V>); }
};

// sum + sum over the taps of w[tap] * window[pixel + offset]; of two short chains of additions, which round less than one.
template <class V>
TBCM_INLINE V stencil(const Window<V>& window, const V* w, int64_t x, V sum) {
  V others = w[4] * window.get(4, x);
  for (int64_t tap = 0; tap < 4; ++tap) sum += w[tap] * window.get(tap, x);
  for (int64_t tap = 5; tap < 9; ++tap) others += w[tap] * window.get(tap, x);
  return sum + others;
}

// Row y of c into sums, and of its tangents. One half at a time, and all apart from what follows: nine taps, and later
// the coefficients of exp, stay in registers.
template <class V, class N>
TBCM_INLINE void convolve(const Shape& p, const Lines<V>& l, const Block<N>& k, int64_t y, bool tangents) {
  for (int64_t half = 0; half < 2; ++half) {
    V w[9];
    taps(p, k.c + half * p.channels, k.n, w);
    const V bias = p.bias ? get<V>(p.bias + k.c + half * p.channels, k.n) : V{};
    const Window<V> u(l, k.index, U + half, y), tu(l, k.index, TU + half, y);
    for (int64_t x = 0; x < p.width; ++x) {
      put(l.sum(half) + x * lanes<V>, stencil(u, w, x, bias));
      if (tangents) put(l.sum(2 + half) + x * lanes<V>, stencil(tu, w, x, V{}));
    }
  }
}

template <class V, class T, class N>
TBCM_INLINE void gate(const Forward<T>& p, const Lines<V>& l, const Block<N>& k, int64_t y) {
  const int64_t line = p.width * p.channels;
  int64_t at = (k.b * p.height + y) * line + k.c;
  for (int64_t x = 0; x < p.width; ++x, at += p.channels) {
    const auto sum = [&](int64_t i) __attribute__((always_inline)) { return get<V>(l.sum(i) + x * lanes<V>); };
    const V c1 = sum(0), c2 = sum(1);
    const auto s = logistic(c2);
    put_ahead(p.y + at, c1 * (c2 * s.s), k.n, line);
    if (p.ty) put_ahead(p.ty + at, sum(2) * (c2 * s.s) + c1 * silu_slope(c2, s.s, s.rest) * sum(3), k.n, line);
  }
}

template <class Isa, class T>
TBCM_INLINE void forward_tasks(const Forward<T>& p, int64_t begin, int64_t end) {
  using V = typename Isa::Vector;
  const Lines<V> l(p, FORWARD_VALUES);
  for (int64_t task = begin; task < end; ++task)
    for (int64_t y = -1; y <= p.height; ++y)
      for_blocks<V>(p, task, [&](const auto& k) __attribute__((always_inline)) {
        activate(p, p.a, p.ta, p.ta != nullptr, l, k, y);
        if (y < 1) return;
        convolve(p, l, k, y - 1, p.ta != nullptr);
        gate(p, l, k, y - 1);
      });
}

TBCM_RUN_BEST(Forward<float>, forward_tasks)
TBCM_RUN_BEST(Forward<bfloat16>, forward_tasks)

// From c and gy: row y of the gradients of both halves of c; of zeros beyond the image.
template <class V, class T, class N>
TBCM_INLINE void gradient_of_c(const Backward<T>& p, const Lines<V>& l, const Block<N>& k, int64_t y) {
  float *g1 = l.row(k.index, GC, y) + lanes<V>, *g2 = l.row(k.index, GC + 1, y) + lanes<V>;
  if (y < 0 || y == p.height) {
    std::memset(g1, 0, p.width * lanes<V> * sizeof(float));
    std::memset(g2, 0, p.width * lanes<V> * sizeof(float));
    return;
  }
  convolve(p, l, k, y, false);
  int64_t at = (k.b * p.height + y) * p.width * p.channels + k.c;
  for (int64_t x = 0; x < p.width * lanes<V>; x += lanes<V>, at += p.channels) {
    const V c1 = get<V>(l.sum(0) + x), c2 = get<V>(l.sum(1) + x);
    const V g = get_ahead<V>(p.gy + at, k.n, p.width * p.channels);
    const auto s = logistic(c2);
    put(g1 + x, g * (c2 * s.s));
    put(g2 + x, g * c1 * silu_slope(c2, s.s, s.rest));
  }
}

// Adds to the totals of a half: of a tap the sum over row y of gc[pixel] u[pixel + offset], of the bias that of gc. A
// row is summed apart: the rounding of a sum grows with the square root of its length.
template <class V, class N>
TBCM_INLINE void gradient_of_taps(const Lines<V>& l, const Block<N>& k, int64_t half, int64_t y) {
  V sums[TOTALS] = {};
  const Window<V> u(l, k.index, U + half, y);
  const float* gc = l.row(k.index, GC + half, y) + lanes<V>;
  for (int64_t x = 0; x < l.width; ++x) {
    const V g = get<V>(gc + x * lanes<V>);
    for (int64_t tap = 0; tap < 9; ++tap) sums[tap] += g * u.get(tap, x);
    sums[9] += g;
  }
  float* totals = l.totals(k.index, half);
  for (int64_t i = 0; i < TOTALS; ++i) put(totals + i * lanes<V>, get<V>(totals + i * lanes<V>) + sums[i]);
}

// Row y of ga = silu'(a) times the transposed stencil of gc, whose taps are those of the stencil in reverse.
template <class V, class T, class N>
TBCM_INLINE void gradient_of_a(const Backward<T>& p, const Lines<V>& l, const Block<N>& k, int64_t half, int64_t y) {
  V w[9], reverse[9];
  taps(p, k.c + half * p.channels, k.n, w);
  for (int64_t tap = 0; tap < 9; ++tap) reverse[tap] = w[8 - tap];
  const Window<V> gc(l, k.index, GC + half, y);
  const float* slope = l.row(k.index, SLOPE + half, y) + lanes<V>;
  const int64_t pixel = 2 * p.channels, line = p.width * pixel;
  int64_t at = (k.b * p.height + y) * line + half * p.channels + k.c;
  for (int64_t x = 0; x < p.width; ++x, at += pixel)
    put_ahead(p.ga + at, stencil(gc, reverse, x, V{}) * get<V>(slope + x * lanes<V>), k.n, line);
}

// Writes the totals of a half, and leaves zeros.
template <class V, class T, class N>
TBCM_INLINE void finish(const Backward<T>& p, const Lines<V>& l, const Block<N>& k, int64_t half) {
  float* totals = l.totals(k.index, half);
  const int64_t c = k.c + half * p.channels;
  for (int64_t tap = 0; p.gweight && tap < 9; ++tap)
    put(p.gweight + (k.b * 9 + tap) * 2 * p.channels + c, get<V>(totals + tap * lanes<V>), k.n);
  if (p.gbias) put(p.gbias + k.b * 2 * p.channels + c, get<V>(totals + 9 * lanes<V>), k.n);
  std::memset(totals, 0, TOTALS * lanes<V> * sizeof(float));
}

template <class Isa, class T>
TBCM_INLINE void backward_tasks(const Backward<T>& p, int64_t begin, int64_t end) {
  using V = typename Isa::Vector;
  const Lines<V> l(p, BACKWARD_VALUES);
  for (int64_t task = begin; task < end; ++task)
    for (int64_t y = -1; y <= p.height + 1; ++y)  // row y of u, y - 1 of gc, y - 2 of ga
      for_blocks<V>(p, task, [&](const auto& k) __attribute__((always_inline)) {
        if (y <= p.height) activate(p, p.a, static_cast<const T*>(nullptr), true, l, k, y);
        if (y >= 0) gradient_of_c(p, l, k, y - 1);
        for (int64_t half = 0; half < 2; ++half) {
          if ((p.gweight || p.gbias) && y >= 1 && y <= p.height) gradient_of_taps(l, k, half, y - 1);
          if (y >= 2) gradient_of_a(p, l, k, half, y - 2);
          if (y > p.height) finish(p, l, k, half);
        }
      });
}

TBCM_RUN_BEST(Backward<float>, backward_tasks)
TBCM_RUN_BEST(Backward<bfloat16>, backward_tasks)

template <class T>
void over_tasks(const T& p) {
  parallel(p.batch * groups(p), 2 * GROUP * p.height * p.width, [&](int64_t a, int64_t z) { run(p, a, z); });
}

}  // namespace

void forward(Tensor a, Tensor weight, Maybe bias, Maybe ta, Tensor y, Maybe ty, int64_t height, int64_t width) {
  of_type(a, [&]<class T>(T) { over_tasks(operands<T>(a, weight, bias, ta, y, ty, height, width)); });
}

void backward(Tensor gy, Tensor a, Tensor weight, Maybe bias, Tensor ga, Maybe gweight, Maybe gbias, int64_t height,
              int64_t width) {
  of_type(a, [&]<class T>(T) { over_tasks(operands<T>(gy, a, weight, bias, ga, gweight, gbias, height, width)); });
}

}  // namespace tbcm::conv_glu
