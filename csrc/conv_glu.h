// Operands and arithmetic of the gated convolution, for host and device.
// u = silu(a);  c = conv3x3(u) + b = [c1; c2];  y = c1 silu(c2).
#pragma once

#include "vector.h"

namespace tbcm::conv_glu {

struct Shape {
  int64_t batch, height, width, channels;  // channels of the output; the input has twice as many
  const float *weight, *bias;              // [9, 2 channels] and [2 channels] or null
};

template <class T>
struct Forward : Shape {
  const T *a, *ta;
  T *y, *ty;
};

template <class T>
struct Backward : Shape {
  const T *a, *gy;
  T* ga;
  float *gweight, *gbias;  // [B, parts, 9, 2 channels] and [B, parts, 2 channels] of each part's sums, or null
  Sums sums = {};          // of what the parts leave; on a GPU alone
};

// On a GPU an image is cut into strips of at most TILE rows and columns, and the weight's gradient comes in
// parts, one for each. Strips side by side overlap by how far a pixel of the result reaches.
constexpr int64_t TILE = 32;
TBCM_HD int64_t tiles(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }
TBCM_HD int64_t strips(int64_t width, int64_t reach) {
  return width > TILE ? tiles(width, TILE - 2 * reach) : 1;
}
TBCM_HD int64_t parts(int64_t height, int64_t width) { return tiles(height, TILE) * strips(width, 2); }

// On a GPU, in conv_glu.cu: queues the kernel on a CUDA stream; null, or what is wrong.
template <class T>
const char* launch(const Forward<T>& p, void* stream);
template <class T>
const char* launch(const Backward<T>& p, void* stream);

// silu'(x) = s (1 + x (1 - s)) for s = sigmoid(x) and rest = 1 - s.
template <class V>
TBCM_HD V silu_slope(V x, V s, V rest) {
  return s * (1.f + x * rest);
}

}  // namespace tbcm::conv_glu
