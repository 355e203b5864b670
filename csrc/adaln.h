// Operands and arithmetic of gate + residual + LayerNorm + modulate, for host and device.
// x' = x + gate h;  xhat = r (x' - mean x');  y = xhat (1 + scale) + shift;  r = (var x' + eps)^-1/2.
#pragma once

#include "vector.h"

namespace tbcm::adaln {

// The residual stream is in T; what other layers make and take is in N, T itself or 16 bits beside fp32.
template <class T, class N = T>
struct Forward {
  Rows<const T> x, tx;
  Rows<const N> h, th;
  Rows<const float> gate, scale, shift, tgate, tscale, tshift;
  Rows<T> out, tout;
  Rows<N> y, ty;
  int64_t batch, tokens, width;
  float eps;
  int64_t chunk = 0;  // tokens of a block; on a GPU alone
};

template <class T, class N = T>
struct Backward {
  Rows<const T> gout, x;  // x is the residual sum x' that forward stored
  Rows<const N> gy, h;
  Rows<const float> gate, scale;
  Rows<T> gx;
  Rows<N> gh;
  Rows<float> ggate, gscale, gshift;  // [B, chunks, C], each chunk the sum over its tokens
  int64_t batch, tokens, width, chunk;
  float eps;
  Sums sums = {};  // of what the chunks leave; on a GPU alone
};

// On a GPU, in adaln.cu: queues the kernel on a CUDA stream; null, or what is wrong.
template <class T, class N>
const char* launch(const Forward<T, N>& p, void* stream);
template <class T, class N>
const char* launch(const Backward<T, N>& p, void* stream);

TBCM_HD float normalise(float x, float mean, float r) { return r * (x - mean); }

// d/dt xhat = r ((tx - mean tx) - xhat m),  m = mean(xhat tx).
TBCM_HD float normalise_tangent(float xhat, float tx, float tmean, float m, float r) {
  return r * ((tx - tmean) - xhat * m);
}

TBCM_HD float modulate(float xhat, float scale, float shift) { return xhat * (1.f + scale) + shift; }

TBCM_HD float modulate_tangent(float xhat, float txhat, float scale, float tscale, float tshift) {
  return txhat * (1.f + scale) + xhat * tscale + tshift;
}

// Gradient of x' through xhat, for g = gy (1 + scale): r (g - mean g - xhat mean(g xhat)).
TBCM_HD float normalise_gradient(float g, float xhat, float gmean, float gxmean, float r) {
  return r * (g - gmean - xhat * gxmean);
}

}  // namespace tbcm::adaln
