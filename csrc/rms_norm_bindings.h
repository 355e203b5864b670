// The operands of rms_norm's kernels from PyTorch's tensors.
#pragma once

#include "bindings.h"
#include "rms_norm.h"

namespace tbcm::rms_norm {

template <class T>
Forward<T> operands(const Tensor& x, const Maybe& weight, const Maybe& tx, const Maybe& tweight, const Tensor& y,
                    const Maybe& ty, double eps) {
  return {rows<const T>(x), rows<const T>(tx), pointer<const float>(weight), pointer<const float>(tweight),
          rows<T>(y), rows<T>(ty), x.size(1), x.size(2), float(eps)};
}

template <class T>
Backward<T> operands(const Tensor& gy, const Tensor& x, const Maybe& weight, const Tensor& gx, const Maybe& gweight,
                     int64_t chunk, double eps) {
  return {rows<const T>(gy), rows<const T>(x), pointer<const float>(weight), rows<T>(gx), rows<float>(gweight),
          x.size(1), x.size(2), chunk, float(eps)};
}

}  // namespace tbcm::rms_norm
