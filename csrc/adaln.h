// Arithmetic of gate + residual + LayerNorm + modulate, element by element, for host and device.
// x' = x + gate h;  xhat = r (x' - mean x');  y = xhat (1 + scale) + shift;  r = (var x' + eps)^-1/2.
#pragma once

#include "vector.h"

namespace tbcm::adaln {

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
