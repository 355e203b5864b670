// CPU kernels of trigflow. Tensors arrive as [B, D], numbers of the samples as fp32 [B].
#include "pieces.h"
#include "trigflow.h"

namespace tbcm::trigflow {
namespace {

template <class T>
struct Input {
  Rows<const T> x, tx;
  const float *t, *tt;
  Rows<T> x_fm, tx_fm;
  float *t_fm, *tt_fm;
  int64_t width;
};

template <class T>
TBCM_INLINE void input_piece(const Input<T>& p, Span k) {
  const Wrap w = wrap(p.t[k.sample], p.tt ? p.tt[k.sample] : 0.f);
  const T* x = p.x.at(k.sample, k.begin);
  T* x_fm = p.x_fm.at(k.sample, k.begin);
#pragma omp simd
  for (int64_t i = 0; i < k.count; ++i) narrow(w.lambda * widen(x[i]), &x_fm[i]);
  if (T* tx_fm = p.tx_fm.at(k.sample, k.begin)) {
    const T* tx = row_or_zeros(p.tx, k);
#pragma omp simd
    for (int64_t i = 0; i < k.count; ++i) narrow(input_tangent(w, widen(x[i]), widen(tx[i])), &tx_fm[i]);
  }
  if (k.begin > 0) return;
  p.t_fm[k.sample] = w.lambda * w.sin;
  if (p.tt_fm) p.tt_fm[k.sample] = w.speed;
}

template <class T>
TBCM_INLINE void input_pieces(const Input<T>& p, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) input_piece(p, piece(k, p.width));
}

TBCM_RUN(Input, input_pieces)

template <class T>
struct Output {
  Rows<const T> v, x, tv, tx;
  const float *t, *tt;
  Rows<T> out, tout;
  int64_t width;
};

template <class T>
TBCM_INLINE void output_piece(const Output<T>& p, Span k) {
  const Wrap w = wrap(p.t[k.sample], p.tt ? p.tt[k.sample] : 0.f);
  const T *v = p.v.at(k.sample, k.begin), *x = p.x.at(k.sample, k.begin);
  T* out = p.out.at(k.sample, k.begin);
#pragma omp simd
  for (int64_t i = 0; i < k.count; ++i) narrow(output_value(w, widen(v[i]), widen(x[i])), &out[i]);
  if (T* tout = p.tout.at(k.sample, k.begin)) {
    const T *tv = row_or_zeros(p.tv, k), *tx = row_or_zeros(p.tx, k);
#pragma omp simd
    for (int64_t i = 0; i < k.count; ++i)
      narrow(output_tangent(w, widen(v[i]), widen(x[i]), widen(tv[i]), widen(tx[i])), &tout[i]);
  }
}

template <class T>
TBCM_INLINE void output_pieces(const Output<T>& p, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) output_piece(p, piece(k, p.width));
}

TBCM_RUN(Output, output_pieces)

template <class T>
struct Step {
  Rows<const T> x, out;  // out [2B, D]: without the prompts, then with them
  const float *t, *s, *guidance;
  Rows<T> velocity, moved;
  int64_t batch, width;
  float sigma;
};

template <class T>
TBCM_INLINE void step_piece(const Step<T>& p, Span k) {
  const float d = p.t[k.sample] - p.s[k.sample], guidance = p.guidance[k.sample];
  const float sin = __builtin_sinf(d), cos = __builtin_cosf(d);
  const T *x = p.x.at(k.sample, k.begin), *unconditional = p.out.at(k.sample, k.begin);
  const T* conditional = p.out.at(p.batch + k.sample, k.begin);
  T *velocity = p.velocity.at(k.sample, k.begin), *moved = p.moved.at(k.sample, k.begin);
#pragma omp simd
  for (int64_t i = 0; i < k.count; ++i) {
    const float v = guided(widen(unconditional[i]), widen(conditional[i]), guidance, p.sigma);
    narrow(v, &velocity[i]);
    narrow(cos * widen(x[i]) - sin * v, &moved[i]);
  }
}

template <class T>
TBCM_INLINE void step_pieces(const Step<T>& p, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) step_piece(p, piece(k, p.width));
}

TBCM_RUN(Step, step_pieces)

}  // namespace

void input(Tensor x, Tensor t, Maybe tx, Maybe tt, Tensor x_fm, Tensor t_fm, Maybe tx_fm, Maybe tt_fm) {
  of_type(x, [&]<class T>(T) {
    const Input<T> p{rows<const T>(x), rows<const T>(tx), pointer<const float>(t), pointer<const float>(tt),
                     rows<T>(x_fm), rows<T>(tx_fm), pointer<float>(t_fm), pointer<float>(tt_fm), x.size(1)};
    over_pieces(p, x.size(0), p.width);
  });
}

void output(Tensor v, Tensor x, Tensor t, Maybe tv, Maybe tx, Maybe tt, Tensor out, Maybe tout) {
  of_type(x, [&]<class T>(T) {
    const Output<T> p{rows<const T>(v), rows<const T>(x), rows<const T>(tv), rows<const T>(tx),
                      pointer<const float>(t), pointer<const float>(tt), rows<T>(out), rows<T>(tout), x.size(1)};
    over_pieces(p, x.size(0), p.width);
  });
}

void step(Tensor x, Tensor out, Tensor t, Tensor s, Tensor guidance, Tensor velocity, Tensor moved, double sigma) {
  of_type(x, [&]<class T>(T) {
    const Step<T> p{rows<const T>(x), rows<const T>(out), pointer<const float>(t), pointer<const float>(s),
                    pointer<const float>(guidance), rows<T>(velocity), rows<T>(moved), x.size(0), x.size(1),
                    float(sigma)};
    over_pieces(p, x.size(0), p.width);
  });
}

}  // namespace tbcm::trigflow
