// Arithmetic of the TrigFlow wrap and of a step along the trajectory, element by element, for host
// and device. lambda = 1 / (sin t + cos t), delta = cos t - sin t.
#pragma once

#include "vector.h"

namespace tbcm::trigflow {

// What a sample's time makes of it; `speed` is lambda^2 tt.
struct Wrap {
  float sin, lambda, delta, speed;
};

TBCM_HD Wrap wrap(float t, float tt) {
  const float sin = __builtin_sinf(t), cos = __builtin_cosf(t), lambda = 1.f / (sin + cos);
  return {sin, lambda, cos - sin, lambda * lambda * tt};
}

TBCM_HD float input_tangent(Wrap w, float x, float tx) { return w.lambda * tx - w.speed * w.delta * x; }

TBCM_HD float output_value(Wrap w, float v, float x) { return w.lambda * (w.delta * x + v); }

TBCM_HD float output_tangent(Wrap w, float v, float x, float tv, float tx) {
  return w.lambda * (w.delta * tx + tv) - w.speed * (2.f * x + w.delta * v);
}

TBCM_HD float guided(float unconditional, float conditional, float guidance, float sigma) {
  return sigma * (unconditional + guidance * (conditional - unconditional));
}

}  // namespace tbcm::trigflow
