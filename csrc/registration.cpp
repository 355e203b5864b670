// The compiled extension: raw kernels that fill tensors which the Python adapters allocate.
// It is loaded as an ordinary Python module (`tbcm_kernels._C`) so that packaging treats it as one.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "bindings.h"

namespace tbcm {
namespace adaln {
void forward(Tensor x, Maybe h, Maybe gate, Maybe scale, Maybe shift, Maybe tx, Maybe th, Maybe tgate, Maybe tscale,
             Maybe tshift, Maybe out, Tensor y, Maybe tout, Maybe ty, double eps);
void backward(Maybe gout, Maybe gy, Tensor x, Maybe h, Maybe gate, Maybe scale, Tensor gx, Maybe gh, Maybe ggate,
              Maybe gscale, Maybe gshift, int64_t chunk, double eps);
}  // namespace adaln
namespace attention {
void forward(Tensor q, Tensor k, Tensor v, Maybe q_weight, Maybe k_weight, Maybe tq, Maybe tk, Maybe tv, Maybe mask,
             Maybe key_mask, Tensor o, Tensor lse, Maybe to, Maybe mu, double scale, int64_t causal, double q_eps,
             double k_eps);
void backward(Maybe go, Maybe glse, Maybe gto, Maybe gmu, Tensor q, Tensor k, Tensor v, Maybe q_weight, Maybe k_weight,
              Maybe tq, Maybe tk, Maybe tv, Tensor o, Tensor lse, Maybe to, Maybe mu, Maybe mask, Maybe key_mask,
              Tensor gq, Tensor gk, Tensor gv, Maybe gtq, Maybe gtk, Maybe gtv, double scale, int64_t causal,
              double q_eps, double k_eps);
}  // namespace attention
namespace conv_glu {
void forward(Tensor a, Tensor weight, Maybe bias, Maybe ta, Tensor y, Maybe ty, int64_t height, int64_t width);
void backward(Tensor gy, Tensor a, Tensor weight, Maybe bias, Tensor ga, Maybe gweight, Maybe gbias, int64_t height,
              int64_t width);
}  // namespace conv_glu
namespace linear_attention {
void forward(Tensor q, Tensor k, Tensor v, Maybe q_weight, Maybe k_weight, Maybe tq, Maybe tk, Maybe tv, Tensor o,
             Maybe to, Tensor state, int64_t feature, double eps, double q_eps, double k_eps);
void backward(Tensor go, Tensor q, Tensor k, Tensor v, Maybe q_weight, Maybe k_weight, Tensor state, Tensor gq,
              Tensor gk, Tensor gv, int64_t feature, double eps, double q_eps, double k_eps);
}  // namespace linear_attention
namespace rms_norm {
void forward(Tensor x, Maybe weight, Maybe tx, Maybe tweight, Tensor y, Maybe ty, double eps);
void backward(Tensor gy, Tensor x, Maybe weight, Tensor gx, Maybe gweight, int64_t chunk, double eps);
}  // namespace rms_norm
namespace tangent_loss {
void forward(Tensor out, Tensor jvp, Tensor velocity, Tensor x, Tensor t, Maybe keep, Maybe weight, Maybe log_variance,
             Tensor loss, Tensor norm, Tensor slope, Tensor glv, double r, double c, double sigma);
void backward(Tensor gloss, Tensor slope, Tensor out, Tensor jvp, Tensor velocity, Tensor x, Tensor t, Tensor gout,
              double r, double sigma);
}  // namespace tangent_loss
namespace trigflow {
void input(Tensor x, Tensor t, Maybe tx, Maybe tt, Tensor x_fm, Tensor t_fm, Maybe tx_fm, Maybe tt_fm);
void output(Tensor v, Tensor x, Tensor t, Maybe tv, Maybe tx, Maybe tt, Tensor out, Maybe tout);
void step(Tensor x, Tensor out, Tensor t, Tensor s, Tensor guidance, Tensor velocity, Tensor moved, double sigma);
}  // namespace trigflow
}  // namespace tbcm

STABLE_TORCH_LIBRARY(tbcm_cpu, m) {
  m.def(
      "adaln_forward(Tensor x, Tensor? h, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? tx, Tensor? th, "
      "Tensor? tgate, Tensor? tscale, Tensor? tshift, Tensor(a!)? out, Tensor(b!) y, Tensor(c!)? tout, "
      "Tensor(d!)? ty, float eps) -> ()");
  m.def(
      "adaln_backward(Tensor? gout, Tensor? gy, Tensor x, Tensor? h, Tensor? gate, Tensor? scale, Tensor(a!) gx, "
      "Tensor(b!)? gh, Tensor(c!)? ggate, Tensor(d!)? gscale, Tensor(e!)? gshift, int chunk, float eps) -> ()");
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, Tensor? tq, Tensor? tk, "
      "Tensor? tv, Tensor? mask, Tensor? key_mask, Tensor(a!) o, Tensor(b!) lse, Tensor(c!)? to, Tensor(d!)? mu, "
      "float scale, int causal, float q_eps, float k_eps) -> ()");
  m.def(
      "attention_backward(Tensor? go, Tensor? glse, Tensor? gto, Tensor? gmu, Tensor q, Tensor k, Tensor v, "
      "Tensor? q_weight, Tensor? k_weight, Tensor? tq, Tensor? tk, Tensor? tv, Tensor o, Tensor lse, Tensor? to, "
      "Tensor? mu, Tensor? mask, Tensor? key_mask, Tensor(a!) gq, Tensor(b!) gk, Tensor(c!) gv, Tensor(d!)? gtq, "
      "Tensor(e!)? gtk, Tensor(f!)? gtv, float scale, int causal, float q_eps, float k_eps) -> ()");
  m.def(
      "conv_glu_forward(Tensor a, Tensor weight, Tensor? bias, Tensor? ta, Tensor(a!) y, Tensor(b!)? ty, int height, "
      "int width) -> ()");
  m.def(
      "conv_glu_backward(Tensor gy, Tensor a, Tensor weight, Tensor? bias, Tensor(a!) ga, Tensor(b!)? gweight, "
      "Tensor(c!)? gbias, int height, int width) -> ()");
  m.def(
      "linear_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, Tensor? tq, "
      "Tensor? tk, Tensor? tv, Tensor(a!) o, Tensor(b!)? to, Tensor(c!) state, int feature, float eps, float q_eps, "
      "float k_eps) -> ()");
  m.def(
      "linear_attention_backward(Tensor go, Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, "
      "Tensor state, Tensor(a!) gq, Tensor(b!) gk, Tensor(c!) gv, int feature, float eps, float q_eps, float k_eps) "
      "-> ()");
  m.def(
      "rms_norm_forward(Tensor x, Tensor? weight, Tensor? tx, Tensor? tweight, Tensor(a!) y, Tensor(b!)? ty, "
      "float eps) -> ()");
  m.def(
      "rms_norm_backward(Tensor gy, Tensor x, Tensor? weight, Tensor(a!) gx, Tensor(b!)? gweight, int chunk, "
      "float eps) -> ()");
  m.def(
      "tangent_loss_forward(Tensor out, Tensor jvp, Tensor velocity, Tensor x, Tensor t, Tensor? keep, "
      "Tensor? weight, Tensor? log_variance, Tensor(a!) loss, Tensor(b!) norm, Tensor(c!) slope, Tensor(d!) glv, "
      "float r, float c, float sigma) -> ()");
  m.def(
      "tangent_loss_backward(Tensor gloss, Tensor slope, Tensor out, Tensor jvp, Tensor velocity, Tensor x, Tensor t, "
      "Tensor(a!) gout, float r, float sigma) -> ()");
  m.def(
      "trigflow_input(Tensor x, Tensor t, Tensor? tx, Tensor? tt, Tensor(a!) x_fm, Tensor(b!) t_fm, "
      "Tensor(c!)? tx_fm, Tensor(d!)? tt_fm) -> ()");
  m.def(
      "trigflow_output(Tensor v, Tensor x, Tensor t, Tensor? tv, Tensor? tx, Tensor? tt, Tensor(a!) out, "
      "Tensor(b!)? tout) -> ()");
  m.def(
      "trigflow_step(Tensor x, Tensor out, Tensor t, Tensor s, Tensor guidance, Tensor(a!) velocity, "
      "Tensor(b!) moved, float sigma) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tbcm_cpu, CPU, m) {
  m.impl("adaln_forward", TORCH_BOX(&tbcm::adaln::forward));
  m.impl("adaln_backward", TORCH_BOX(&tbcm::adaln::backward));
  m.impl("attention_forward", TORCH_BOX(&tbcm::attention::forward));
  m.impl("attention_backward", TORCH_BOX(&tbcm::attention::backward));
  m.impl("conv_glu_forward", TORCH_BOX(&tbcm::conv_glu::forward));
  m.impl("conv_glu_backward", TORCH_BOX(&tbcm::conv_glu::backward));
  m.impl("linear_attention_forward", TORCH_BOX(&tbcm::linear_attention::forward));
  m.impl("linear_attention_backward", TORCH_BOX(&tbcm::linear_attention::backward));
  m.impl("rms_norm_forward", TORCH_BOX(&tbcm::rms_norm::forward));
  m.impl("rms_norm_backward", TORCH_BOX(&tbcm::rms_norm::backward));
  m.impl("tangent_loss_forward", TORCH_BOX(&tbcm::tangent_loss::forward));
  m.impl("tangent_loss_backward", TORCH_BOX(&tbcm::tangent_loss::backward));
  m.impl("trigflow_input", TORCH_BOX(&tbcm::trigflow::input));
  m.impl("trigflow_output", TORCH_BOX(&tbcm::trigflow::output));
  m.impl("trigflow_step", TORCH_BOX(&tbcm::trigflow::step));
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module) PyModule_AddStringConstant(module, "sources", TBCM_SOURCES);
#ifdef TBCM_CUDA_SOURCES  // "op:hash op:hash", where the CUDA kernels were built
  if (module) PyModule_AddStringConstant(module, "cuda", TBCM_CUDA_SOURCES);
#endif
  return module;
}
