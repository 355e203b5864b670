// Arithmetic of the consistency loss, for host and device.
#pragma once

#include "vector.h"

namespace tbcm::tangent_loss {

// g = -cos^2 t (sigma F - V) - r (cos t sin t x + sigma J), with the times of a sample worked out.
struct Direction {
  float cos2, cossin, r, sigma;
  TBCM_HD float operator()(float out, float jvp, float velocity, float x) const {
    return -cos2 * (sigma * out - velocity) - r * (cossin * x + sigma * jvp);
  }
};

TBCM_HD Direction direction(float t, float r, float sigma) {
  const float sin = __builtin_sinf(t), cos = __builtin_cosf(t);
  return {cos * cos, cos * sin, r, sigma};
}

// One sample of the mean: its term, dL/dF = slope g and dL/dlv, from n = |g| over `width` elements.
struct Term {
  float value, slope, glv;
};

TBCM_HD Term term(float norm, float keep, float weight, float lv, float c, int64_t width, int64_t batch) {
  const float scale = keep * weight * __builtin_expf(-lv), length = norm / (norm + c);
  const float square = scale * length * length / float(width);
  return {square + keep * lv, -2.f * scale / ((norm + c) * float(width) * float(batch)), (keep - square) / float(batch)};
}

}  // namespace tbcm::tangent_loss
