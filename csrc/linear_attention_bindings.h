// The operands of linear_attention's CUDA kernels from PyTorch's tensors.
#pragma once

#include "bindings.h"
#include "linear_attention.h"

namespace tbcm::linear_attention {

// A [B, H, N, 32] tensor; the Python adapter has put its rows at multiples of 16 bytes.
template <class T>
Heads<T> heads(const Tensor& x) {
  return {pointer<T>(x), x.stride(0), x.stride(1), x.stride(2)};
}
template <class T>
Heads<T> heads(const Maybe& x) {
  return x ? heads<T>(*x) : Heads<T>{};
}

// Of x; a weight of all heads' columns is one over all of them.
inline Norm norm(const Maybe& weight, const Tensor& x, double eps) {
  if (!weight) return {};
  return {pointer<const float>(*weight), weight->numel() > x.size(3) ? Scope::all : Scope::head, float(eps)};
}

template <class T>
Forward<T> operands(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& q_weight, const Maybe& k_weight,
                    const Maybe& tq, const Maybe& tk, const Maybe& tv, const Tensor& o, const Maybe& to,
                    const Tensor& state, const Maybe& tstate, double eps, double q_eps, double k_eps) {
  const Parts keys{pointer<float>(state), pointer<float>(tstate), k.size(0), k.size(1), k.size(2)};
  return {heads<const T>(q), heads<const T>(k), heads<const T>(v), heads<const T>(tq), heads<const T>(tk),
          heads<const T>(tv), norm(q_weight, q, q_eps), norm(k_weight, k, k_eps), heads<T>(o), heads<T>(to), keys,
          q.size(2), float(eps)};
}

template <class T>
Backward<T> operands(const Tensor& go, const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& q_weight,
                     const Maybe& k_weight, const Tensor& state, const Tensor& gstate, const Tensor& gq,
                     const Tensor& gk, const Tensor& gv, double eps, double q_eps, double k_eps) {
  const Parts queries{pointer<float>(gstate), nullptr, q.size(0), q.size(1), q.size(2)};
  return {heads<const T>(go), heads<const T>(q), heads<const T>(k), heads<const T>(v), norm(q_weight, q, q_eps),
          norm(k_weight, k, k_eps), pointer<const float>(state), heads<T>(gq), heads<T>(gk), heads<T>(gv), queries,
          k.size(2), float(eps)};
}

}  // namespace tbcm::linear_attention
