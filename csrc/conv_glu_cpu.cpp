// CPU kernels of conv_glu. A task is one image and sixteen channel pairs: its activations fit a
// zero-bordered plane in cache, so that the 3x3 stencil reads memory once and needs no edge cases.
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

TBCM_INLINE void clear(const Plane& p) {
  std::memset(p.data, 0, Plane::floats(p.height, p.width) * sizeof(float));
}

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

// Fills u = silu(a), and silu'(a) ta where there is a tangent, of one half of the channels.
template <class T>
TBCM_INLINE void activate(const Forward<T>& p, int64_t b, int64_t c, int64_t n, Plane u, Plane tu) {
  for (int64_t y = 0; y < p.height; ++y)
    for (int64_t x = 0; x < p.width; ++x) {
      const int64_t at = ((b * p.height + y) * p.width + x) * 2 * p.channels + c;
      const Lanes a = get_ahead(p.a + at, n);
      const Logistic l = logistic(a);
      put(u.at(y, x), a * l.s);
      if (p.ta) put(tu.at(y, x), silu_slope(a, l.s, l.rest) * get_ahead(p.ta + at, n));
    }
}

template <class T>
TBCM_INLINE void forward_task(const Forward<T>& p, int64_t task, const Plane* u, const Plane* tu) {
  const int64_t b = task / blocks(p), c = task % blocks(p) * LANES;
  const int64_t n = p.channels - c < LANES ? p.channels - c : LANES;
  Lanes w[2][9], bias[2];
  for (int64_t half = 0; half < 2; ++half) {
    taps(p, c + half * p.channels, n, w[half], &bias[half]);
    activate(p, b, c + half * p.channels, n, u[half], tu[half]);
  }
  for (int64_t y = 0; y < p.height; ++y)
    for (int64_t x = 0; x < p.width; ++x) {
      const int64_t at = ((b * p.height + y) * p.width + x) * p.channels + c;
      const Lanes c1 = bias[0] + stencil(u[0], w[0], y, x, 1), c2 = bias[1] + stencil(u[1], w[1], y, x, 1);
      const Logistic l = logistic(c2);
      put(p.y + at, c1 * c2 * l.s, n);
      if (p.ty) {
        const Lanes tc1 = stencil(tu[0], w[0], y, x, 1), tc2 = stencil(tu[1], w[1], y, x, 1);
        put(p.ty + at, tc1 * c2 * l.s + c1 * silu_slope(c2, l.s, l.rest) * tc2, n);
      }
    }
}

// Zero-bordered planes in the thread's scratch.
template <int count>
TBCM_INLINE void prepare(int64_t height, int64_t width, Plane (&planes)[count]) {
  const int64_t size = Plane::floats(height, width);
  float* buffer = scratch(count * size);
  for (int64_t i = 0; i < count; ++i) {
    planes[i] = {buffer + i * size, height, width};
    clear(planes[i]);
  }
}

template <class T>
TBCM_INLINE void forward_tasks(const Forward<T>& p, int64_t begin, int64_t end) {
  Plane planes[4];
  prepare(p.height, p.width, planes);
  for (int64_t task = begin; task < end; ++task) forward_task(p, task, planes, planes + 2);
}

TBCM_RUN(Forward, forward_tasks)

// From u and gy: the gradients of c1 and c2 into their planes.
template <class T>
TBCM_INLINE void gradient_of_c(const Backward<T>& p, int64_t b, int64_t c, int64_t n, const Plane* u, const Plane* gc) {
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

template <class T>
TBCM_INLINE void backward_task(const Backward<T>& p, int64_t task, const Plane* u, const Plane* gc, const Plane* slope) {
  const int64_t b = task / blocks(p), c = task % blocks(p) * LANES;
  const int64_t n = p.channels - c < LANES ? p.channels - c : LANES;
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
  for (int64_t task = begin; task < end; ++task) backward_task(p, task, planes, planes + 2, planes + 4);
}

TBCM_RUN(Backward, backward_tasks)

template <class P>
void over_tasks(const P& p) {
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
