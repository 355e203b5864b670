// The CUDA kernels as ops, which fill tensors that the Python adapters allocate, on the stream that
// these pass: PyTorch's own accessor for it is no part of a library that a CPU build of PyTorch has.
#include <torch/csrc/stable/library.h>

#include "adaln_bindings.h"
#include "conv_glu_bindings.h"

#ifndef TBCM_DEVICE
#define TBCM_DEVICE CUDA  // tests run the kernels' sources on the host
#endif

namespace tbcm {
namespace {

// Launches with f's operands in x's element type.
template <class F>
void launch_on(int64_t stream, const Tensor& x, const F& f) {
  const auto call = [&]<class T>(T element) {
    const char* fault = launch(f(element), reinterpret_cast<void*>(stream));
    STD_TORCH_CHECK(!fault, "tbcm_kernels: a CUDA kernel did not start: ", fault);
  };
  if (is_bf16(x)) call(bfloat16{});
  else if (x.scalar_type() == torch::headeronly::ScalarType::Half) call(float16{});
  else call(float{});
}

void adaln_forward(Tensor x, Maybe h, Maybe gate, Maybe scale, Maybe shift, Maybe tx, Maybe th, Maybe tgate,
                   Maybe tscale, Maybe tshift, Maybe out, Tensor y, Maybe tout, Maybe ty, double eps, int64_t stream) {
  launch_on(stream, x, [&]<class T>(T) {
    return adaln::operands<T>(x, h, gate, scale, shift, tx, th, tgate, tscale, tshift, out, y, tout, ty, eps);
  });
}

void adaln_backward(Maybe gout, Maybe gy, Tensor x, Maybe h, Maybe gate, Maybe scale, Tensor gx, Maybe gh, Maybe ggate,
                    Maybe gscale, Maybe gshift, int64_t chunk, double eps, int64_t stream) {
  launch_on(stream, x, [&]<class T>(T) {
    return adaln::operands<T>(gout, gy, x, h, gate, scale, gx, gh, ggate, gscale, gshift, chunk, eps);
  });
}

void conv_glu_forward(Tensor a, Tensor weight, Maybe bias, Maybe ta, Tensor y, Maybe ty, int64_t height, int64_t width,
                      int64_t stream) {
  launch_on(stream, a, [&]<class T>(T) { return conv_glu::operands<T>(a, weight, bias, ta, y, ty, height, width); });
}

void conv_glu_backward(Tensor gy, Tensor a, Tensor weight, Maybe bias, Tensor ga, Maybe gweight, Maybe gbias,
                       int64_t height, int64_t width, int64_t stream) {
  for (const Maybe& sums : {gweight, gbias})
    STD_TORCH_CHECK(!sums || sums->size(1) == conv_glu::parts(height, width), "conv_glu: another number of parts");
  launch_on(stream, a, [&]<class T>(T) {
    return conv_glu::operands<T>(gy, a, weight, bias, ga, gweight, gbias, height, width);
  });
}

}  // namespace
}  // namespace tbcm

STABLE_TORCH_LIBRARY(tbcm_cuda, m) {
  m.def(
      "adaln_forward(Tensor x, Tensor? h, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? tx, Tensor? th, "
      "Tensor? tgate, Tensor? tscale, Tensor? tshift, Tensor(a!)? out, Tensor(b!) y, Tensor(c!)? tout, "
      "Tensor(d!)? ty, float eps, int stream) -> ()");
  m.def(
      "adaln_backward(Tensor? gout, Tensor? gy, Tensor x, Tensor? h, Tensor? gate, Tensor? scale, Tensor(a!) gx, "
      "Tensor(b!)? gh, Tensor(c!)? ggate, Tensor(d!)? gscale, Tensor(e!)? gshift, int chunk, float eps, "
      "int stream) -> ()");
  m.def(
      "conv_glu_forward(Tensor a, Tensor weight, Tensor? bias, Tensor? ta, Tensor(a!) y, Tensor(b!)? ty, int height, "
      "int width, int stream) -> ()");
  m.def(
      "conv_glu_backward(Tensor gy, Tensor a, Tensor weight, Tensor? bias, Tensor(a!) ga, Tensor(b!)? gweight, "
      "Tensor(c!)? gbias, int height, int width, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tbcm_cuda, TBCM_DEVICE, m) {
  m.impl("adaln_forward", TORCH_BOX(&tbcm::adaln_forward));
  m.impl("adaln_backward", TORCH_BOX(&tbcm::adaln_backward));
  m.impl("conv_glu_forward", TORCH_BOX(&tbcm::conv_glu_forward));
  m.impl("conv_glu_backward", TORCH_BOX(&tbcm::conv_glu_backward));
}
