// The CUDA kernels as ops, which fill tensors that the Python adapters allocate, on the stream that
// these pass: PyTorch's own accessor for it is no part of a library that a CPU build of PyTorch has.
#include <torch/csrc/stable/library.h>

#include "adaln_bindings.h"
#include "conv_glu_bindings.h"
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

// Results that are there, each [batch, width], as sums of `count` parts that lie in the scratch one after another.
Sums sums_of(const Maybe& scratch, int64_t batch, int64_t count, std::initializer_list<const Maybe*> results) {
  Sums sums{.batch = batch, .count = count};
  float* next = pointer<float>(scratch);
  Sum* sum = sums.of;
  for (const Maybe* result : results) {
    if (*result) {
      *sum = {next, pointer<float>(*result), batch ? (*result)->numel() / batch : 0};
      next += batch * count * sum->width;
    }
    ++sum;
  }
  STD_TORCH_CHECK(next - pointer<float>(scratch) == (scratch ? scratch->numel() : 0), "another number of parts");
  return sums;
}

void adaln_forward(Tensor x, Maybe h, Maybe gate, Maybe scale, Maybe shift, Maybe tx, Maybe th, Maybe tgate,
                   Maybe tscale, Maybe tshift, Maybe out, Tensor y, Maybe tout, Maybe ty, double eps, int64_t stream) {
  launch_on_both(stream, x, y, [&]<class T, class N>(T, N, void* queue) {
    const auto p = adaln::operands<T, N>(x, h, gate, scale, shift, tx, th, tgate, tscale, tshift, out, y, tout, ty, eps);
    return adaln::launch(p, queue);
  });
}

void adaln_backward(Maybe gout, Maybe gy, Tensor x, Maybe h, Maybe gate, Maybe scale, Tensor gx, Maybe gh, Maybe ggate,
                    Maybe gscale, Maybe gshift, Maybe scratch, int64_t chunk, double eps, int64_t stream) {
  launch_on_both(stream, x, gy ? *gy : h ? *h : gh ? *gh : x, [&]<class T, class N>(T, N, void* queue) {
    auto p = adaln::operands<T, N>(gout, gy, x, h, gate, scale, gx, gh, ggate, gscale, gshift, chunk, eps);
    if (scratch) {
      const int64_t count = (p.tokens + chunk - 1) / chunk;
      p.sums = sums_of(scratch, p.batch, count, {&ggate, &gscale, &gshift});
      Rows<float>* parts[] = {&p.ggate, &p.gscale, &p.gshift};
      for (int i = 0; i < 3; ++i) *parts[i] = {p.sums.of[i].parts, count * p.width, p.width};
    }
    return adaln::launch(p, queue);
  });
}

void conv_glu_forward(Tensor a, Tensor weight, Maybe bias, Maybe ta, Tensor y, Maybe ty, int64_t height, int64_t width,
                      int64_t stream) {
  launch_on(stream, a, [&]<class T>(T, void* queue) {
    return conv_glu::launch(conv_glu::operands<T>(a, weight, bias, ta, y, ty, height, width), queue);
  });
}

void conv_glu_backward(Tensor gy, Tensor a, Tensor weight, Maybe bias, Tensor ga, Maybe gweight, Maybe gbias,
                       Maybe scratch, int64_t height, int64_t width, int64_t stream) {
  launch_on(stream, a, [&]<class T>(T, void* queue) {
    auto p = conv_glu::operands<T>(gy, a, weight, bias, ga, gweight, gbias, height, width);
    p.sums = sums_of(scratch, 1, p.batch * conv_glu::parts(height, width), {&gweight, &gbias});
    p.gweight = p.sums.of[0].parts;
    p.gbias = p.sums.of[1].parts;
    return conv_glu::launch(p, queue);
  });
}

void rms_norm_forward(Tensor x, Maybe weight, Maybe tx, Maybe tweight, Tensor y, Maybe ty, double eps, int64_t stream) {
  launch_on(stream, x, [&]<class T>(T, void* queue) {
    return rms_norm::launch(rms_norm::operands<T>(x, weight, tx, tweight, y, ty, eps), queue);
  });
}

void rms_norm_backward(Tensor gy, Tensor x, Maybe weight, Tensor gx, Maybe gweight, Maybe scratch, int64_t chunk,
                       double eps, int64_t stream) {
  launch_on(stream, x, [&]<class T>(T, void* queue) {
    auto p = rms_norm::operands<T>(gy, x, weight, gx, gweight, chunk, eps);
    p.sums = sums_of(scratch, 1, (p.count + chunk - 1) / chunk, {&gweight});
    p.gweight = {p.sums.of[0].parts, 0, p.width};
    return rms_norm::launch(p, queue);
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
      "Tensor(b!)? gh, Tensor(c!)? ggate, Tensor(d!)? gscale, Tensor(e!)? gshift, Tensor(f!)? scratch, int chunk, "
      "float eps, int stream) -> ()");
  m.def(
      "conv_glu_forward(Tensor a, Tensor weight, Tensor? bias, Tensor? ta, Tensor(a!) y, Tensor(b!)? ty, "
      "int height, int width, int stream) -> ()");
  m.def(
      "conv_glu_backward(Tensor gy, Tensor a, Tensor weight, Tensor? bias, Tensor(a!) ga, Tensor(b!)? gweight, "
      "Tensor(c!)? gbias, Tensor(d!)? scratch, int height, int width, int stream) -> ()");
  m.def(
      "rms_norm_forward(Tensor x, Tensor? weight, Tensor? tx, Tensor? tweight, Tensor(a!) y, Tensor(b!)? ty, "
      "float eps, int stream) -> ()");
  m.def(
      "rms_norm_backward(Tensor gy, Tensor x, Tensor? weight, Tensor(a!) gx, Tensor(b!)? gweight, "
      "Tensor(c!)? scratch, int chunk, float eps, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tbcm_cuda, TBCM_DEVICE, m) {
  m.impl("adaln_forward", TORCH_BOX(&tbcm::adaln_forward));
  m.impl("adaln_backward", TORCH_BOX(&tbcm::adaln_backward));
  m.impl("conv_glu_forward", TORCH_BOX(&tbcm::conv_glu_forward));
  m.impl("conv_glu_backward", TORCH_BOX(&tbcm::conv_glu_backward));
  m.impl("rms_norm_forward", TORCH_BOX(&tbcm::rms_norm_forward));
  m.impl("rms_norm_backward", TORCH_BOX(&tbcm::rms_norm_backward));
}
