// CPU kernels of rms_norm.
#include "lanes.h"
#include "rms_norm_bindings.h"

namespace tbcm::rms_norm {
namespace {

TBCM_INLINE float mean_product(const float* a, const float* b, int64_t n) {
  double sum = 0.0;
  for_blocks(n, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    float part = 0.f;
#pragma omp simd reduction(+ : part)
    for (int64_t i = begin; i < end; ++i) part += a[i] * b[i];
    sum += part;
  });
  return float(sum / double(n));
}

TBCM_INLINE float inverse_rms(const float* x, int64_t n, float eps) {
  return 1.f / __builtin_sqrtf(mean_product(x, x, n) + eps);
}

template <class T>
TBCM_INLINE void forward_row(const Forward<T>& p, int64_t n, float* scratch, const float* zero, const float* one) {
  const int64_t width = p.width;
  const float* weight = p.weight ? p.weight : one;
  const float* x = widened(p.x.at(0, n), scratch, width);
  const float r = inverse_rms(x, width, p.eps);
  if (T* ty = p.ty.at(0, n)) {
    const float* tx = p.tx ? widened(p.tx.at(0, n), scratch + width, width) : zero;
    const float m = p.tx ? mean_product(x, tx, width) : 0.f;  // of infinities it would be a NaN
    if (p.tweight) {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i)
        narrow(weight[i] * tangent(x[i], tx[i], m, r) + p.tweight[i] * x[i] * r, &ty[i]);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) narrow(weight[i] * tangent(x[i], tx[i], m, r), &ty[i]);
    }
  }
  T* y = p.y.at(0, n);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) narrow(weight[i] * x[i] * r, &y[i]);
}

// Scratch for two rows, a row of ones and one of zeros.
TBCM_INLINE float* prepare(int64_t width) {
  float* buffer = scratch(4 * width);
  for (int64_t i = 0; i < width; ++i) buffer[2 * width + i] = 1.f;
  std::memset(buffer + 3 * width, 0, width * sizeof(float));
  return buffer;
}

template <class T>
TBCM_INLINE void forward_rows(const Forward<T>& p, int64_t begin, int64_t end) {
  float* rows = prepare(p.width);
  for (int64_t n = begin; n < end; ++n) forward_row(p, n, rows, rows + 3 * p.width, rows + 2 * p.width);
}

TBCM_RUN(Forward, forward_rows)

template <class T>
TBCM_INLINE void backward_row(const Backward<T>& p, int64_t n, float* sum, float* scratch, float* g, const float* one) {
  const int64_t width = p.width;
  const float* weight = p.weight ? p.weight : one;
  const float* x = widened(p.x.at(0, n), scratch, width);
  const float* gy = widened(p.gy.at(0, n), g, width);
  const float r = inverse_rms(x, width, p.eps);
  if (sum) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) sum[i] += gy[i] * x[i] * r;
  }
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) g[i] = gy[i] * weight[i];
  const float m = mean_product(x, g, width);
  T* gx = p.gx.at(0, n);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) narrow(gradient(x[i], g[i], m, r), &gx[i]);
}

template <class T>
TBCM_INLINE void backward_chunks(const Backward<T>& p, int64_t begin, int64_t end) {
  float* x = prepare(p.width);
  for (int64_t c = begin; c < end; ++c) {
    float* sum = p.gweight.at(0, c);
    if (sum) std::memset(sum, 0, p.width * sizeof(float));
    const int64_t last = (c + 1) * p.chunk < p.count ? (c + 1) * p.chunk : p.count;
    for (int64_t n = c * p.chunk; n < last; ++n) backward_row(p, n, sum, x, x + p.width, x + 2 * p.width);
  }
}

TBCM_RUN(Backward, backward_chunks)

}  // namespace

void forward(Tensor x, Maybe weight, Maybe tx, Maybe tweight, Tensor y, Maybe ty, double eps) {
  of_type(x, [&]<class T>(T) {
    const auto p = operands<T>(x, weight, tx, tweight, y, ty, eps);
    parallel(p.count, p.width, [&](int64_t a, int64_t z) { run(p, a, z); });
  });
}

void backward(Tensor gy, Tensor x, Maybe weight, Tensor gx, Maybe gweight, int64_t chunk, double eps) {
  of_type(x, [&]<class T>(T) {
    const auto p = operands<T>(gy, x, weight, gx, gweight, chunk, eps);
    parallel((p.count + chunk - 1) / chunk, p.width * chunk, [&](int64_t a, int64_t z) { run(p, a, z); });
  });
}

}  // namespace tbcm::rms_norm
