// The operands of adaln's kernels from PyTorch's tensors.
#pragma once

#include "adaln.h"
#include "bindings.h"

namespace tbcm::adaln {

template <class T, class N = T>
Forward<T, N> operands(const Tensor& x, const Maybe& h, const Maybe& gate, const Maybe& scale, const Maybe& shift,
                    const Maybe& tx, const Maybe& th, const Maybe& tgate, const Maybe& tscale, const Maybe& tshift,
                    const Maybe& out, const Tensor& y, const Maybe& tout, const Maybe& ty, double eps) {
  return {rows<const T>(x), rows<const T>(tx), rows<const N>(h), rows<const N>(th),
          broadcast_rows(gate), broadcast_rows(scale), broadcast_rows(shift),
          broadcast_rows(tgate), broadcast_rows(tscale), broadcast_rows(tshift),
          rows<T>(out), rows<T>(tout), rows<N>(y), rows<N>(ty),
          x.size(0), x.size(1), x.size(2), float(eps)};
}

template <class T, class N = T>
Backward<T, N> operands(const Maybe& gout, const Maybe& gy, const Tensor& x, const Maybe& h, const Maybe& gate,
                     const Maybe& scale, const Tensor& gx, const Maybe& gh, const Maybe& ggate, const Maybe& gscale,
                     const Maybe& gshift, int64_t chunk, double eps) {
  return {rows<const T>(gout), rows<const T>(x), rows<const N>(gy), rows<const N>(h),
          broadcast_rows(gate), broadcast_rows(scale), rows<T>(gx), rows<N>(gh),
          rows<float>(ggate), rows<float>(gscale), rows<float>(gshift),
          x.size(0), x.size(1), x.size(2), chunk, float(eps)};
}

}  // namespace tbcm::adaln
