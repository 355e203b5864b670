// The CUDA kernels as ops, which fill tensors that the Python adapters allocate, on the stream that
// these pass: PyTorch's own accessor for it is no part of a library that a CPU build of PyTorch has.
#include <torch/csrc/stable/library.h>

#include "adaln_bindings.h"
#include "conv_glu_bindings.h"
#include "next.h"
#include "rms_norm_bindings.h"

#ifndef TBCM_DEVICE
#define TBCM_DEVICE CUDA  // tests run the kernels' sources on the host
#endif

namespace tbcm {
namespace {

// Launches what f queues for x's element type.
template <class F>
void launch_on(int64_t stream, const Tensor& x, const F& f) {
  const auto call = [&]<class T>(T element) {
    const char* fault = f(element, reinterpret_cast<void*>(stream));
    STD_TORCH_CHECK(!fault, "tbcm_kernels: a CUDA kernel did not start: ", fault);
  };
  if (is_bf16(x)) call(bfloat16{});
  else if (x.scalar_type() == torch::headeronly::ScalarType::Half) call(float16{});
  else call(float{});
}

// The same for x's element type T and another one N: T, or 16 bits beside fp32.
template <class F>
void launch_on_both(int64_t stream, const Tensor& x, const Tensor& other, const F& f) {
  launch_on(stream, x, [&]<class T>(T element, void* queue) {
    if constexpr (sizeof(T) == 4) {
      if (is_bf16(other)) return f(element, bfloat16{}, queue);
      if (other.scalar_type() == torch::headeronly::ScalarType::Half) return f(element, float16{}, queue);
    }
    return f(element, element, queue);
  });
}

template <bool NEXT>
void adaln_forward(Tensor x, Maybe h, Maybe gate, Maybe scale, Maybe shift, Maybe tx, Maybe th, Maybe tgate,
                   Maybe tscale, Maybe tshift, Maybe out, Tensor y, Maybe tout, Maybe ty, double eps, int64_t stream) {
  launch_on_both(stream, x, y, [&]<class T, class N>(T, N, void* queue) {
    const auto p = adaln::operands<T>(x, h, gate, scale, shift, tx, th, tgate, tscale, tshift, out, y, tout, ty, eps);
    if constexpr (NEXT)
      return adaln::next::launch(
          adaln::next::Forward<T, N>{p, rows<const N>(h), rows<const N>(th), rows<N>(y), rows<N>(ty)}, queue);
    else
      return adaln::launch(p, queue);
  });
}

template <bool NEXT>
void adaln_backward(Maybe gout, Maybe gy, Tensor x, Maybe h, Maybe gate, Maybe scale, Tensor gx, Maybe gh, Maybe ggate,
                    Maybe gscale, Maybe gshift, int64_t chunk, double eps, int64_t stream) {
  launch_on_both(stream, x, gy ? *gy : h ? *h : gh ? *gh : x, [&]<class T, class N>(T, N, void* queue) {
    const auto p = adaln::operands<T>(gout, gy, x, h, gate, scale, gx, gh, ggate, gscale, gshift, chunk, eps);
    if constexpr (NEXT)
      return adaln::next::launch(adaln::next::Backward<T, N>{p, rows<const N>(gy), rows<const N>(h), rows<N>(gh)},
                                 queue);
    else
      return adaln::launch(p, queue);
  });
}

template <bool NEXT>
void conv_glu_forward(Tensor a, Tensor weight, Maybe bias, Maybe ta, Tensor y, Maybe ty, int64_t height, int64_t width,
                      int64_t stream) {
  launch_on(stream, a, [&]<class T>(T, void* queue) {
    const auto p = conv_glu::operands<T>(a, weight, bias, ta, y, ty, height, width);
    return NEXT ? conv_glu::next::launch(p, queue) : conv_glu::launch(p, queue);
  });
}

template <bool NEXT>
void conv_glu_backward(Tensor gy, Tensor a, Tensor weight, Maybe bias, Tensor ga, Maybe gweight, Maybe gbias,
                       int64_t height, int64_t width, int64_t stream) {
  for (const Maybe& sums : {gweight, gbias})
    STD_TORCH_CHECK(!sums || sums->size(1) == conv_glu::parts(height, width), "conv_glu: another number of parts");
  launch_on(stream, a, [&]<class T>(T, void* queue) {
    const auto p = conv_glu::operands<T>(gy, a, weight, bias, ga, gweight, gbias, height, width);
    return NEXT ? conv_glu::next::launch(p, queue) : conv_glu::launch(p, queue);
  });
}

void rms_norm_forward(Tensor x, Maybe weight, Maybe tx, Maybe tweight, Tensor y, Maybe ty, double eps, int64_t stream) {
  launch_on(stream, x, [&]<class T>(T, void* queue) {
    return rms_norm::launch(rms_norm::operands<T>(x, weight, tx, tweight, y, ty, eps), queue);
  });
}

void rms_norm_backward(Tensor gy, Tensor x, Maybe weight, Tensor gx, Maybe gweight, int64_t chunk, double eps,
                       int64_t stream) {
  launch_on(stream, x, [&]<class T>(T, void* queue) {
    return rms_norm::launch(rms_norm::operands<T>(gy, x, weight, gx, gweight, chunk, eps), queue);
  });
}

constexpr const char* ADALN_FORWARD =
    "adaln_forward(Tensor x, Tensor? h, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? tx, Tensor? th, "
    "Tensor? tgate, Tensor? tscale, Tensor? tshift, Tensor(a!)? out, Tensor(b!) y, Tensor(c!)? tout, "
    "Tensor(d!)? ty, float eps, int stream) -> ()";
constexpr const char* ADALN_BACKWARD =
    "adaln_backward(Tensor? gout, Tensor? gy, Tensor x, Tensor? h, Tensor? gate, Tensor? scale, Tensor(a!) gx, "
    "Tensor(b!)? gh, Tensor(c!)? ggate, Tensor(d!)? gscale, Tensor(e!)? gshift, int chunk, float eps, "
    "int stream) -> ()";
constexpr const char* CONV_GLU_FORWARD =
    "conv_glu_forward(Tensor a, Tensor weight, Tensor? bias, Tensor? ta, Tensor(a!) y, Tensor(b!)? ty, int height, "
    "int width, int stream) -> ()";
constexpr const char* CONV_GLU_BACKWARD =
    "conv_glu_backward(Tensor gy, Tensor a, Tensor weight, Tensor? bias, Tensor(a!) ga, Tensor(b!)? gweight, "
    "Tensor(c!)? gbias, int height, int width, int stream) -> ()";

}  // namespace
}  // namespace tbcm

STABLE_TORCH_LIBRARY(tbcm_cuda, m) {
  m.def(tbcm::ADALN_FORWARD);
  m.def(tbcm::ADALN_BACKWARD);
  m.def(tbcm::CONV_GLU_FORWARD);
  m.def(tbcm::CONV_GLU_BACKWARD);
  m.def(
      "rms_norm_forward(Tensor x, Tensor? weight, Tensor? tx, Tensor? tweight, Tensor(a!) y, Tensor(b!)? ty, "
      "float eps, int stream) -> ()");
  m.def(
      "rms_norm_backward(Tensor gy, Tensor x, Tensor? weight, Tensor(a!) gx, Tensor(b!)? gweight, int chunk, "
      "float eps, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tbcm_cuda, TBCM_DEVICE, m) {
  m.impl("adaln_forward", TORCH_BOX(&tbcm::adaln_forward<false>));
  m.impl("adaln_backward", TORCH_BOX(&tbcm::adaln_backward<false>));
  m.impl("conv_glu_forward", TORCH_BOX(&tbcm::conv_glu_forward<false>));
  m.impl("conv_glu_backward", TORCH_BOX(&tbcm::conv_glu_backward<false>));
  m.impl("rms_norm_forward", TORCH_BOX(&tbcm::rms_norm_forward));
  m.impl("rms_norm_backward", TORCH_BOX(&tbcm::rms_norm_backward));
}

STABLE_TORCH_LIBRARY(tbcm_cuda_next, m) {
  m.def(tbcm::ADALN_FORWARD);
  m.def(tbcm::ADALN_BACKWARD);
  m.def(tbcm::CONV_GLU_FORWARD);
  m.def(tbcm::CONV_GLU_BACKWARD);
}

STABLE_TORCH_LIBRARY_IMPL(tbcm_cuda_next, TBCM_DEVICE, m) {
  m.impl("adaln_forward", TORCH_BOX(&tbcm::adaln_forward<true>));
  m.impl("adaln_backward", TORCH_BOX(&tbcm::adaln_backward<true>));
  m.impl("conv_glu_forward", TORCH_BOX(&tbcm::conv_glu_forward<true>));
  m.impl("conv_glu_backward", TORCH_BOX(&tbcm::conv_glu_backward<true>));
}
