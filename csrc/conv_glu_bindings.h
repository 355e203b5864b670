// The operands of conv_glu's kernels from PyTorch's tensors.
#pragma once

#include "bindings.h"
#include "conv_glu.h"

namespace tbcm::conv_glu {

inline Shape shape(const Tensor& a, const Tensor& weight, const Maybe& bias, int64_t height, int64_t width) {
  return {a.size(0), height, width, a.size(2) / 2, pointer<const float>(weight), pointer<const float>(bias)};
}

template <class T>
Forward<T> operands(const Tensor& a, const Tensor& weight, const Maybe& bias, const Maybe& ta, const Tensor& y,
                    const Maybe& ty, int64_t height, int64_t width) {
  return {shape(a, weight, bias, height, width), pointer<const T>(a), pointer<const T>(ta), pointer<T>(y),
          pointer<T>(ty)};
}

template <class T>
Backward<T> operands(const Tensor& gy, const Tensor& a, const Tensor& weight, const Maybe& bias, const Tensor& ga,
                     const Maybe& gweight, const Maybe& gbias, int64_t height, int64_t width) {
  return {shape(a, weight, bias, height, width), pointer<const T>(a), pointer<const T>(gy), pointer<T>(ga),
          pointer<float>(gweight), pointer<float>(gbias)};
}

}  // namespace tbcm::conv_glu
