// CPU kernels of conv_glu. A task is some channel pairs of one image, in blocks of sixteen. Activations stay in cache
// with a border of zeros, so that the 3x3 stencil reads memory once and needs no edge cases: forward keeps three rows
// of them, backward a plane.
#include "conv_glu_bindings.h"
#include "lanes.h"

namespace tbcm::conv_glu {
namespace {

// A (height + 2) x (width + 2) plane of lanes with a border of zeros.
struct Plane {
  float* data;
  int64_t height, width;
  TBCM_INLINE float* at(int64_t y, int64_t x) const { return data + ((y + 1) * (width + 2) + x + 1) * LANES; }
  static int64_t floats(int64_t height, int64_t width) { return (height + 2) * (width + 2) * LANES; }
};

// sum over the taps of w[tap] * plane[pixel + offset]; `sign` -1 is the transposed stencil.
TBCM_INLINE Lanes stencil(const Plane& p, const Lanes* w, int64_t y, int64_t x, int64_t sign) {
  Lanes sum = {};
  for (int64_t tap = 0; tap < 9; ++tap) sum += w[tap] * get(p.at(y + sign * (tap / 3 - 1), x + sign * (tap % 3 - 1)));
  return sum;
}

TBCM_INLINE int64_t blocks(const Shape& p) { return (p.channels + LANES - 1) / LANES; }

// Taps and bias of the sixteen channels that start at `c`, of which n are there.
TBCM_INLINE void taps(const Shape& p, int64_t c, int64_t n, Lanes* w, Lanes* b) {
  for (int64_t tap = 0; tap < 9; ++tap) w[tap] = get(p.weight + tap * 2 * p.channels + c, n);
  *b = p.bias ? get(p.bias + c, n) : Lanes{};
}

// Sixteen channels are a cache line and the next pixel's lie far away, where no hardware looks ahead: ask
// for those of the next task, which are beside them.
template <class T>
TBCM_INLINE Lanes get_ahead(const T* p, int64_t n) {
  __builtin_prefetch(p + LANES, 0, 2);
  return get(p, n);
}

// Forward walks down the rows of several blocks of channels together, so that a page of memory is met by few tasks.
// Of each block it keeps three rows of activations and one of the stencil's sums, with a pixel's VALUES beside each
// other: those of both halves, then their tangents.
constexpr int64_t GROUP = 4, VALUES = 4;
TBCM_INLINE int64_t groups(const Shape& p) { return (blocks(p) + GROUP - 1) / GROUP; }
TBCM_INLINE int64_t row_floats(const Shape& p) { return (p.width + 2) * VALUES * LANES; }

// Fills a row with silu(a), and silu'(a) ta where there is a tangent; with zeros beyond the image.
template <class T, class N>
TBCM_INLINE void activate(const Forward<T>& p, int64_t b, int64_t y, int64_t c, N n, float* row) {
  if (y < 0 || y == p.height) return void(std::memset(row, 0, row_floats(p) * sizeof(float)));
  for (int64_t half = 0; half < 2; ++half) {
    int64_t at = ((b * p.height + y) * p.width * 2 + half) * p.channels + c;
    float* to = row + (VALUES + half) * LANES;
    for (int64_t x = 0; x < p.width; ++x, at += 2 * p.channels, to += VALUES * LANES) {
      const Lanes a = get_ahead(p.a + at, n);
      const Logistic l = logistic(a);
      put(to, a * l.s);
      if (p.ta) put(to + 2 * LANES, silu_slope(a, l.s, l.rest) * get_ahead(p.ta + at, n));
    }
  }
}

// sum over the taps of w[tap] * row[pixel + offset] of the value at `at` in each of three rows.
TBCM_INLINE Lanes stencil(const float* const* rows, const Lanes* w, int64_t at) {
  Lanes sum = {};
  for (int64_t tap = 0; tap < 9; ++tap) sum += w[tap] * get(rows[tap / 3] + at + tap % 3 * VALUES * LANES);
  return sum;
}

// One half at a time, and the rest apart: nine taps, and later the coefficients of exp, stay in registers.
template <class T, class N>
TBCM_INLINE void convolve(const Forward<T>& p, int64_t b, int64_t y, int64_t c, N n, const float* const* rows,
                          float* sums) {
  for (int64_t half = 0; half < 2; ++half) {
    Lanes w[9], bias;
    taps(p, c + half * p.channels, n, w, &bias);
    for (int64_t at = half * LANES; at < p.width * VALUES * LANES; at += VALUES * LANES) {
      put(sums + at, bias + stencil(rows, w, at));
      if (p.ty) put(sums + at + 2 * LANES, stencil(rows, w, at + 2 * LANES));
    }
  }
  int64_t at = (b * p.height + y) * p.width * p.channels + c;
  for (int64_t x = 0; x < p.width; ++x, at += p.channels, sums += VALUES * LANES) {
    const Lanes c1 = get(sums), c2 = get(sums + LANES);
    const Logistic l = logistic(c2);
    put(p.y + at, c1 * c2 * l.s, n);
    if (p.ty) {
      const Lanes tc1 = get(sums + 2 * LANES), tc2 = get(sums + 3 * LANES);
      put(p.ty + at, tc1 * c2 * l.s + c1 * silu_slope(c2, l.s, l.rest) * tc2, n);
    }
  }
}

template <class T>
TBCM_INLINE void forward_group(const Forward<T>& p, int64_t b, int64_t first, int64_t last, float* scratch) {
  const auto row = [&](int64_t c, int64_t i) { return scratch + ((c - first) / LANES * 4 + i) * row_floats(p); };
  for (int64_t y = -1; y <= p.height; ++y) {
    const int64_t i = (y + 1) % 3;
    for_lanes(first, last, [&](int64_t c, auto n) __attribute__((always_inline)) {
      activate(p, b, y, c, n, row(c, i));
    });
    if (y < 1) continue;
    for_lanes(first, last, [&](int64_t c, auto n) __attribute__((always_inline)) {
      const float* rows[3] = {row(c, (i + 1) % 3), row(c, (i + 2) % 3), row(c, i)};
      convolve(p, b, y - 1, c, n, rows, row(c, 3));
    });
  }
}

template <class T>
TBCM_INLINE void forward_tasks(const Forward<T>& p, int64_t begin, int64_t end) {
  const int64_t size = GROUP * 4 * row_floats(p);
  float* rows = aligned_scratch(size);
  std::memset(rows, 0, size * sizeof(float));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task % groups(p) * GROUP * LANES, last = first + GROUP * LANES;
    forward_group(p, task / groups(p), first, last < p.channels ? last : p.channels, rows);
  }
}

TBCM_RUN(Forward, forward_tasks)

// Zero-bordered planes in the thread's scratch.
template <int count>
TBCM_INLINE void prepare(int64_t height, int64_t width, Plane (&planes)[count]) {
  const int64_t size = Plane::floats(height, width);
  float* buffer = aligned_scratch(count * size);
  for (int64_t i = 0; i < count; ++i) {
    planes[i] = {buffer + i * size, height, width};
  }
  std::memset(buffer, 0, count * size * sizeof(float));
}

// From u and gy: the gradients of c1 and c2 into their planes.
template <class T, class N>
TBCM_INLINE void gradient_of_c(const Backward<T>& p, int64_t b, int64_t c, N n, const Plane* u, const Plane* gc) {
  Lanes w[2][9], bias[2];
  for (int64_t half = 0; half < 2; ++half) taps(p, c + half * p.channels, n, w[half], &bias[half]);
  for (int64_t y = 0; y < p.height; ++y)
    for (int64_t x = 0; x < p.width; ++x) {
      const Lanes c1 = bias[0] + stencil(u[0], w[0], y, x, 1), c2 = bias[1] + stencil(u[1], w[1], y, x, 1);
      const Lanes g = get_ahead(p.gy + ((b * p.height + y) * p.width + x) * p.channels + c, n);
      const Logistic l = logistic(c2);
      put(gc[0].at(y, x), g * c2 * l.s);
      put(gc[1].at(y, x), g * c1 * silu_slope(c2, l.s, l.rest));
    }
}

// gw[tap] = sum over pixels of gc[pixel] u[pixel + offset], gb = sum of gc, of one half. Rows are summed apart:
// the rounding of a sum grows with the square root of its length.
template <class T>
TBCM_INLINE void gradient_of_taps(const Backward<T>& p, int64_t b, int64_t c, int64_t n, const Plane& u, const Plane& gc) {
  Lanes taps[9] = {}, total = {};
  for (int64_t y = 0; y < p.height; ++y) {
    Lanes row[9] = {}, row_total = {};
    for (int64_t x = 0; x < p.width; ++x) {
      const Lanes g = get(gc.at(y, x));
      for (int64_t tap = 0; tap < 9; ++tap) row[tap] += g * get(u.at(y + tap / 3 - 1, x + tap % 3 - 1));
      row_total += g;
    }
    for (int64_t tap = 0; tap < 9; ++tap) taps[tap] += row[tap];
    total += row_total;
  }
  if (p.gweight)
    for (int64_t tap = 0; tap < 9; ++tap) put(p.gweight + (b * 9 + tap) * 2 * p.channels + c, taps[tap], n);
  if (p.gbias) put(p.gbias + b * 2 * p.channels + c, total, n);
}

template <class T, class N>
TBCM_INLINE void backward_block(const Backward<T>& p, int64_t b, int64_t c, N n, const Plane* u, const Plane* gc,
                                const Plane* slope) {
  for (int64_t half = 0; half < 2; ++half)
    for (int64_t y = 0; y < p.height; ++y)
      for (int64_t x = 0; x < p.width; ++x) {
        const int64_t at = ((b * p.height + y) * p.width + x) * 2 * p.channels + c + half * p.channels;
        const Lanes a = get_ahead(p.a + at, n);
        const Logistic l = logistic(a);
        put(u[half].at(y, x), a * l.s);
        put(slope[half].at(y, x), silu_slope(a, l.s, l.rest));
      }
  gradient_of_c(p, b, c, n, u, gc);
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t first = c + half * p.channels;
    if (p.gweight || p.gbias) gradient_of_taps(p, b, first, n, u[half], gc[half]);
    Lanes w[9], bias;
    taps(p, first, n, w, &bias);
    for (int64_t y = 0; y < p.height; ++y)
      for (int64_t x = 0; x < p.width; ++x) {
        const int64_t at = ((b * p.height + y) * p.width + x) * 2 * p.channels + first;
        put(p.ga + at, stencil(gc[half], w, y, x, -1) * get(slope[half].at(y, x)), n);
      }
  }
}

template <class T>
TBCM_INLINE void backward_tasks(const Backward<T>& p, int64_t begin, int64_t end) {
  Plane planes[6];
  prepare(p.height, p.width, planes);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / blocks(p), c = task % blocks(p) * LANES;
    for_lanes(c, c + LANES < p.channels ? c + LANES : p.channels, [&](int64_t, auto n) __attribute__((always_inline)) {
      backward_block(p, b, c, n, planes, planes + 2, planes + 4);
    });
  }
}

TBCM_RUN(Backward, backward_tasks)

template <class T>
void over_tasks(const Forward<T>& p) {
  parallel(p.batch * groups(p), 2 * GROUP * LANES * p.height * p.width, [&](int64_t a, int64_t z) { run(p, a, z); });
}

template <class T>
void over_tasks(const Backward<T>& p) {
  parallel(p.batch * blocks(p), 2 * LANES * p.height * p.width, [&](int64_t a, int64_t z) { run(p, a, z); });
}

}  // namespace

void forward(Tensor a, Tensor weight, Maybe bias, Maybe ta, Tensor y, Maybe ty, int64_t height, int64_t width) {
  const auto call = [&]<class T>(T) { over_tasks(operands<T>(a, weight, bias, ta, y, ty, height, width)); };
  is_bf16(a) ? call(bfloat16{}) : call(float{});
}

void backward(Tensor gy, Tensor a, Tensor weight, Maybe bias, Tensor ga, Maybe gweight, Maybe gbias, int64_t height,
              int64_t width) {
  const auto call = [&]<class T>(T) {
    over_tasks(operands<T>(gy, a, weight, bias, ga, gweight, gbias, height, width));
  };
  is_bf16(a) ? call(bfloat16{}) : call(float{});
}

}  // namespace tbcm::conv_glu
