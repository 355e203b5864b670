// CPU kernels of adaln: one row at a time in fp32 scratch that stays in L1.
#include "adaln_bindings.h"
#include "lanes.h"

namespace tbcm::adaln {
namespace {

struct Statistics {
  float mean, r;
};

// Of the mean square around a mean that is off by `rest`.
TBCM_INLINE float inverse_deviation(double square, double rest, float eps) {
  const double variance = square - rest * rest;
  return 1.f / __builtin_sqrtf(float(variance > 0.0 ? variance : 0.0) + eps);
}

TBCM_INLINE float mean_of(const float* v, int64_t n) {
  double sum = 0.0;
  for_blocks(n, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    float part = 0.f;
#pragma omp simd reduction(+ : part)
    for (int64_t i = begin; i < end; ++i) part += v[i];
    sum += part;
  });
  return float(sum / double(n));
}

TBCM_INLINE Statistics statistics(const float* v, int64_t n, float eps) {
  const float mean = mean_of(v, n);
  double square = 0.0, rest = 0.0;
  for_blocks(n, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    float part = 0.f, left = 0.f;
#pragma omp simd reduction(+ : part, left)
    for (int64_t i = begin; i < end; ++i) {
      part += (v[i] - mean) * (v[i] - mean);
      left += v[i] - mean;
    }
    square += part, rest += left;
  });
  rest /= double(n);  // what rounding has left in the mean
  return {float(mean + rest), inverse_deviation(square / double(n), rest, eps)};
}

// Means of a and of a * xhat: what both the tangent and the gradient of a LayerNorm subtract.
TBCM_INLINE void means(const float* a, const float* v, Statistics s, int64_t n, float* mean, float* mixed) {
  *mean = mean_of(a, n);
  double dot = 0.0;
  for_blocks(n, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    float part = 0.f;
#pragma omp simd reduction(+ : part)
    for (int64_t i = begin; i < end; ++i) part += normalise(v[i], s.mean, s.r) * (a[i] - *mean);
    dot += part;
  });
  *mixed = float(dot / double(n));
}

template <class T>
TBCM_INLINE T* or_else(T* row, float* other) {
  return row ? row : reinterpret_cast<T*>(other);
}

// Rows of a thread: the two that it works on, and what stands for operands that are absent.
struct Spare {
  float *v, *tv, *zeros, *ones, *unused;
};

// Three passes over a row in L1: more of them take longer than the memory they work on.
template <bool residual, bool tangent, class T>
TBCM_INLINE void forward_row(const Forward<T>& p, int64_t b, int64_t n, const Spare& spare) {
  const int64_t width = p.width;
  float *v = spare.v, *tv = spare.tv;
  const T *x = p.x.at(b, n), *h = p.h.at(b, n);
  const T *tx = or_else(p.tx.at(b, n), spare.zeros), *th = or_else(p.th.at(b, n), spare.zeros);
  const float *gate = or_else(p.gate.at(b, n), spare.ones), *tgate = or_else(p.tgate.at(b, n), spare.zeros);
  T *out = p.out.at(b, n), *tout = or_else(p.tout.at(b, n), spare.unused);
  double sum = 0.0, tsum = 0.0;
  for_blocks(width, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    float part = 0.f, tpart = 0.f;
#pragma omp simd reduction(+ : part, tpart)
    for (int64_t i = begin; i < end; ++i) {
      v[i] = widen(x[i]);
      if constexpr (residual) {
        narrow(v[i] + widen(h[i]) * gate[i], &out[i]);
        v[i] = widen(out[i]);  // later arithmetic sees what was stored
      }
      part += v[i];
      if constexpr (tangent) {
        tv[i] = widen(tx[i]);
        if constexpr (residual) {
          narrow(tv[i] + widen(h[i]) * tgate[i] + widen(th[i]) * gate[i], &tout[i]);
          tv[i] = widen(tout[i]);
        }
        tpart += tv[i];
      }
    }
    sum += part, tsum += tpart;
  });
  float mean = float(sum / double(width)), tmean = float(tsum / double(width));
  double square = 0.0, dot = 0.0, rest = 0.0, trest = 0.0;
  for_blocks(width, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    float part = 0.f, mixed = 0.f, left = 0.f, tleft = 0.f;
#pragma omp simd reduction(+ : part, mixed, left, tleft)
    for (int64_t i = begin; i < end; ++i) {
      part += (v[i] - mean) * (v[i] - mean);
      left += v[i] - mean;
      if constexpr (tangent) {
        mixed += (v[i] - mean) * (tv[i] - tmean);
        tleft += tv[i] - tmean;
      }
    }
    square += part, dot += mixed, rest += left, trest += tleft;
  });
  rest /= double(width), trest /= double(width);  // what rounding has left in the means
  const float r = inverse_deviation(square / double(width), rest, p.eps);
  const float m = r * float(dot / double(width) - rest * trest);
  mean = float(mean + rest), tmean = float(tmean + trest);
  const float *scale = or_else(p.scale.at(b, n), spare.zeros), *shift = or_else(p.shift.at(b, n), spare.zeros);
  const float *tscale = or_else(p.tscale.at(b, n), spare.zeros), *tshift = or_else(p.tshift.at(b, n), spare.zeros);
  T *y = p.y.at(b, n), *ty = p.ty.at(b, n);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const float xhat = normalise(v[i], mean, r);
    narrow(modulate(xhat, scale[i], shift[i]), &y[i]);
    if constexpr (tangent) {
      const float txhat = normalise_tangent(xhat, tv[i], tmean, m, r);
      narrow(modulate_tangent(xhat, txhat, scale[i], tscale[i], tshift[i]), &ty[i]);
    }
  }
}

template <class T>
TBCM_INLINE void forward_rows(const Forward<T>& p, int64_t begin, int64_t end) {
  float* v = scratch(5 * p.width);
  const Spare spare = {v, v + p.width, v + 2 * p.width, v + 3 * p.width, v + 4 * p.width};
  std::memset(spare.zeros, 0, p.width * sizeof(float));
  for (int64_t i = 0; i < p.width; ++i) spare.ones[i] = 1.f;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / p.tokens, n = row % p.tokens;
    if (p.h && p.ty) forward_row<true, true>(p, b, n, spare);
    else if (p.h) forward_row<true, false>(p, b, n, spare);
    else if (p.ty) forward_row<false, true>(p, b, n, spare);
    else forward_row<false, false>(p, b, n, spare);
  }
}

TBCM_RUN(Forward, forward_rows)

template <class T>
TBCM_INLINE void backward_row(const Backward<T>& p, int64_t b, int64_t n, int64_t c, float* scratch, float* g, const float* zero) {
  const int64_t width = p.width;
  if (p.gy) {
    const float* v = widened(p.x.at(b, n), scratch, width);
    const Statistics s = statistics(v, width, p.eps);
    const float* scale = p.scale ? p.scale.at(b, n) : zero;
    const T* gy = p.gy.at(b, n);
    if (float* sum = p.gscale.at(b, c)) {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) sum[i] += widen(gy[i]) * normalise(v[i], s.mean, s.r);
    }
    if (float* sum = p.gshift.at(b, c)) multiply_add(sum, gy, nullptr, width);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) g[i] = widen(gy[i]) * (1.f + scale[i]);
    float gmean, gxmean;
    means(g, v, s, width, &gmean, &gxmean);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i)
      g[i] = normalise_gradient(g[i], normalise(v[i], s.mean, s.r), gmean, gxmean, s.r);
  } else {
    std::memset(g, 0, width * sizeof(float));
  }
  if (p.gout) multiply_add(g, p.gout.at(b, n), nullptr, width);
  T* gx = p.gx.at(b, n);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) narrow(g[i], &gx[i]);
  if (float* sum = p.ggate.at(b, c)) multiply_add(sum, p.h.at(b, n), g, width);
  if (T* gh = p.gh.at(b, n)) {
    const float* gate = p.gate.at(b, n);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) narrow(gate[i] * g[i], &gh[i]);
  }
}

template <class T>
TBCM_INLINE void backward_chunks(const Backward<T>& p, int64_t begin, int64_t end) {
  float* v = scratch(3 * p.width);
  float* zero = v + 2 * p.width;
  std::memset(zero, 0, p.width * sizeof(float));
  const int64_t chunks = (p.tokens + p.chunk - 1) / p.chunk;
  for (int64_t k = begin; k < end; ++k) {
    const int64_t b = k / chunks, c = k % chunks;
    for (const Rows<float>& sums : {p.ggate, p.gscale, p.gshift})
      if (float* sum = sums.at(b, c)) std::memset(sum, 0, p.width * sizeof(float));
    const int64_t last = (c + 1) * p.chunk < p.tokens ? (c + 1) * p.chunk : p.tokens;
    for (int64_t n = c * p.chunk; n < last; ++n) backward_row(p, b, n, c, v, v + p.width, zero);
  }
}

TBCM_RUN(Backward, backward_chunks)

}  // namespace

void forward(Tensor x, Maybe h, Maybe gate, Maybe scale, Maybe shift, Maybe tx, Maybe th, Maybe tgate, Maybe tscale,
             Maybe tshift, Maybe out, Tensor y, Maybe tout, Maybe ty, double eps) {
  of_type(x, [&]<class T>(T) {
    const auto p = operands<T>(x, h, gate, scale, shift, tx, th, tgate, tscale, tshift, out, y, tout, ty, eps);
    parallel(p.batch * p.tokens, p.width, [&](int64_t a, int64_t z) { run(p, a, z); });
  });
}

void backward(Maybe gout, Maybe gy, Tensor x, Maybe h, Maybe gate, Maybe scale, Tensor gx, Maybe gh, Maybe ggate,
              Maybe gscale, Maybe gshift, int64_t chunk, double eps) {
  of_type(x, [&]<class T>(T) {
    const auto p = operands<T>(gout, gy, x, h, gate, scale, gx, gh, ggate, gscale, gshift, chunk, eps);
    const int64_t chunks = (p.tokens + chunk - 1) / chunk;
    parallel(p.batch * chunks, p.width * chunk, [&](int64_t a, int64_t z) { run(p, a, z); });
  });
}

}  // namespace tbcm::adaln
