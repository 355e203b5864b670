// The CUDA kernels as ops, which fill tensors that the Python adapters allocate, on the stream that
// these pass: PyTorch's own accessor for it is no part of a library that a CPU build of PyTorch has.
#include <torch/csrc/stable/library.h>

#include "adaln_bindings.h"
#include "conv_glu_bindings.h"
#include "linear_attention_bindings.h"
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

// Of 16 bits alone. How many parts a state has depends on the GPU: the room for them is allocated here.
void linear_attention_forward(Tensor q, Tensor k, Tensor v, Maybe q_weight, Maybe k_weight, Maybe tq, Maybe tk,
                              Maybe tv, Tensor o, Maybe to, Tensor state, Maybe tstate, double eps, double q_eps,
                              double k_eps, int64_t stream) {
  launch_on(stream, q, [&]<class T>(T, void* queue) -> const char* {
    if constexpr (sizeof(T) == 2) {
      auto p = linear_attention::operands<T>(q, k, v, q_weight, k_weight, tq, tk, tv, o, to, state, tstate, eps, q_eps,
                                             k_eps);
      if (const char* fault = linear_attention::divide(&p)) return fault;
      const Tensor scratch = torch::stable::new_empty(state, {p.keys.room()});
      p.keys.scratch = pointer<float>(scratch);
      return linear_attention::launch(p, queue);
    }
    return "those of linear_attention take 16 bits";
  });
}

void linear_attention_backward(Tensor go, Tensor q, Tensor k, Tensor v, Maybe q_weight, Maybe k_weight, Tensor state,
                               Tensor gq, Tensor gk, Tensor gv, Maybe gq_weight, Maybe gk_weight, double eps,
                               double q_eps, double k_eps, int64_t stream) {
  launch_on(stream, q, [&]<class T>(T, void* queue) -> const char* {
    if constexpr (sizeof(T) == 2) {
      const Tensor gstate = torch::stable::empty_like(state);
      auto p = linear_attention::operands<T>(go, q, k, v, q_weight, k_weight, state, gstate, gq, gk, gv, eps, q_eps,
                                             k_eps);
      if (const char* fault = linear_attention::divide(&p)) return fault;
      const int64_t all = q.size(1) * linear_attention::WIDTH;  // columns of a token
      const int64_t rooms[] = {p.queries.room(), gq_weight ? p.q_weight.count * all : 0,
                               gk_weight ? p.k_weight.count * all : 0};
      const Tensor scratch = torch::stable::new_empty(state, {rooms[0] + rooms[1] + rooms[2]});
      p.queries.scratch = pointer<float>(scratch);
      if (gq_weight) p.q_weight.of[0] = {p.queries.scratch + rooms[0], pointer<float>(gq_weight)};
      if (gk_weight) p.k_weight.of[0] = {p.queries.scratch + rooms[0] + rooms[1], pointer<float>(gk_weight)};
      return linear_attention::launch(p, queue);
    }
    return "those of linear_attention take 16 bits";
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
      "linear_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, Tensor? tq, "
      "Tensor? tk, Tensor? tv, Tensor(a!) o, Tensor(b!)? to, Tensor(c!) state, Tensor(d!)? tstate, "
      "float eps, float q_eps, float k_eps, int stream) -> ()");
  m.def(
      "linear_attention_backward(Tensor go, Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, "
      "Tensor state, Tensor(a!) gq, Tensor(b!) gk, Tensor(c!) gv, Tensor(d!)? gq_weight, Tensor(e!)? gk_weight, "
      "float eps, float q_eps, float k_eps, int stream) -> ()");
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
  m.impl("linear_attention_forward", TORCH_BOX(&tbcm::linear_attention_forward));
  m.impl("linear_attention_backward", TORCH_BOX(&tbcm::linear_attention_backward));
  m.impl("rms_norm_forward", TORCH_BOX(&tbcm::rms_norm_forward));
  m.impl("rms_norm_backward", TORCH_BOX(&tbcm::rms_norm_backward));
}
