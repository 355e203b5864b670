// Arithmetic of RMSNorm, element by element, for host and device.
// y = w x r;  r = (mean x^2 + eps)^-1/2;  m = mean(x tx).
#pragma once

#include "vector.h"

namespace tbcm::rms_norm {

// d/dt (x r) = r (tx - x r^2 m).
TBCM_HD float tangent(float x, float tx, float m, float r) { return r * (tx - x * r * r * m); }

// Gradient of x for g = w gy: r g - x r^3 mean(x g), the transpose of the map above.
TBCM_HD float gradient(float x, float g, float m, float r) { return tangent(x, g, m, r); }

}  // namespace tbcm::rms_norm
