// Operands and arithmetic of RMSNorm, for host and device. Tensors are [1, rows, C].
// y = w x r;  r = (mean x^2 + eps)^-1/2;  m = mean(x tx).
#pragma once

#include "vector.h"

namespace tbcm::rms_norm {

template <class T>
struct Forward {
  Rows<const T> x, tx;
  const float *weight, *tweight;
  Rows<T> y, ty;
  int64_t count, width;
  float eps;
};

template <class T>
struct Backward {
  Rows<const T> gy, x;
  const float* weight;
  Rows<T> gx;
  Rows<float> gweight;  // [1, chunks, C], each chunk the sum over its rows
  int64_t count, width, chunk;
  float eps;
  Sums sums = {};  // of what the chunks leave; on a GPU alone
};

// On a GPU, in rms_norm.cu: queues the kernel on a CUDA stream; null, or what is wrong.
template <class T>
const char* launch(const Forward<T>& p, void* stream);
template <class T>
const char* launch(const Backward<T>& p, void* stream);

// d/dt (x r) = r (tx - x r^2 m).
TBCM_HD float tangent(float x, float tx, float m, float r) { return r * (tx - x * r * r * m); }

// Gradient of x for g = w gy: r g - x r^3 mean(x g), the transpose of the map above.
TBCM_HD float gradient(float x, float g, float m, float r) { return tangent(x, g, m, r); }

}  // namespace tbcm::rms_norm
