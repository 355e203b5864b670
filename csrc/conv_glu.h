// Arithmetic of the gated convolution, lane by lane, for host and device.
// u = silu(a);  c = conv3x3(u) + b = [c1; c2];  y = c1 silu(c2).
#pragma once

#include "vector.h"

namespace tbcm::conv_glu {

// silu'(x) = s (1 + x (1 - s)) for s = sigmoid(x) and rest = 1 - s.
template <class V>
TBCM_HD V silu_slope(V x, V s, V rest) {
  return s * (1.f + x * rest);
}

}  // namespace tbcm::conv_glu
