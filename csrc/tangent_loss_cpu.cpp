// CPU kernels of tangent_loss. Tensors arrive as [B, D], numbers of the samples as fp32 [B].
#include <cmath>
#include <vector>

#include "lanes.h"
#include "pieces.h"
#include "tangent_loss.h"

namespace tbcm::tangent_loss {
namespace {

template <class T>
struct Inputs {
  Rows<const T> out, jvp, velocity, x;
  const float* t;
  int64_t width;
  float r, sigma;
};

template <class T>
struct Squares {
  Inputs<T> in;
  double* sums;  // of each piece
};

template <class T>
TBCM_INLINE double square_of_piece(const Inputs<T>& in, Span k) {
  const Direction g = direction(in.t[k.sample], in.r, in.sigma);
  const T *out = in.out.at(k.sample, k.begin), *jvp = in.jvp.at(k.sample, k.begin);
  const T *velocity = in.velocity.at(k.sample, k.begin), *x = in.x.at(k.sample, k.begin);
  double sum = 0.0;
  for_blocks(k.count, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    float part = 0.f;
#pragma omp simd reduction(+ : part)
    for (int64_t i = begin; i < end; ++i) {
      const float v = g(widen(out[i]), widen(jvp[i]), widen(velocity[i]), widen(x[i]));
      part += v * v;
    }
    sum += part;
  });
  return sum;
}

template <class T>
TBCM_INLINE void squares(const Squares<T>& p, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) p.sums[k] = square_of_piece(p.in, piece(k, p.in.width));
}

TBCM_RUN(Squares, squares)

template <class T>
struct Gradient {
  Inputs<T> in;
  const float *gloss, *slope;
  Rows<T> gout;
};

template <class T>
TBCM_INLINE void gradient_of_piece(const Gradient<T>& p, Span k) {
  T* gout = p.gout.at(k.sample, k.begin);
  const float slope = p.slope[k.sample];
  if (slope == 0.f) {  // dropped or not finite: g itself may be a NaN
    std::memset(gout, 0, k.count * sizeof(T));
    return;
  }
  const Direction g = direction(p.in.t[k.sample], p.in.r, p.in.sigma);
  const T *out = p.in.out.at(k.sample, k.begin), *jvp = p.in.jvp.at(k.sample, k.begin);
  const T *velocity = p.in.velocity.at(k.sample, k.begin), *x = p.in.x.at(k.sample, k.begin);
  const float factor = *p.gloss * slope;
#pragma omp simd
  for (int64_t i = 0; i < k.count; ++i)
    narrow(factor * g(widen(out[i]), widen(jvp[i]), widen(velocity[i]), widen(x[i])), &gout[i]);
}

template <class T>
TBCM_INLINE void gradients(const Gradient<T>& p, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) gradient_of_piece(p, piece(k, p.in.width));
}

TBCM_RUN(Gradient, gradients)

template <class T>
Inputs<T> inputs(const Tensor& out, const Tensor& jvp, const Tensor& velocity, const Tensor& x, const Tensor& t,
                 double r, double sigma) {
  return {rows<const T>(out), rows<const T>(jvp), rows<const T>(velocity), rows<const T>(x),
          pointer<const float>(t), x.size(1), float(r), float(sigma)};
}

}  // namespace

void forward(Tensor out, Tensor jvp, Tensor velocity, Tensor x, Tensor t, Maybe keep, Maybe weight, Maybe log_variance,
             Tensor loss, Tensor norm, Tensor slope, Tensor glv, double r, double c, double sigma) {
  const int64_t batch = x.size(0), width = x.size(1), pieces = pieces_of(width);
  std::vector<double> sums(batch * pieces);
  of_type(x, [&]<class T>(T) {
    over_pieces(Squares<T>{inputs<T>(out, jvp, velocity, x, t, r, sigma), sums.data()}, batch, width);
  });
  const float *keeps = pointer<const float>(keep), *weights = pointer<const float>(weight);
  const float* lvs = pointer<const float>(log_variance);
  float *norms = pointer<float>(norm), *slopes = pointer<float>(slope), *glvs = pointer<float>(glv);
  double total = 0.0;
  int64_t finite = 0;
  for (int64_t b = 0; b < batch; ++b) {
    double square = 0.0;
    for (int64_t k = 0; k < pieces; ++k) square += sums[b * pieces + k];
    norms[b] = std::sqrt(float(square));
    Term own{};  // of a sample that adds nothing
    if (std::isfinite(norms[b])) {
      own = term(norms[b], keeps ? keeps[b] : 1.f, weights ? weights[b] : 1.f, lvs ? lvs[b] : 0.f, float(c), width, batch);
      finite += 1;
    }
    total += own.value;
    slopes[b] = own.slope;
    glvs[b] = own.glv;
  }
  *pointer<float>(loss) = finite ? float(total / double(batch)) : NAN;
}

void backward(Tensor gloss, Tensor slope, Tensor out, Tensor jvp, Tensor velocity, Tensor x, Tensor t, Tensor gout,
              double r, double sigma) {
  of_type(x, [&]<class T>(T) {
    const Gradient<T> p{inputs<T>(out, jvp, velocity, x, t, r, sigma), pointer<const float>(gloss),
                        pointer<const float>(slope), rows<T>(gout)};
    over_pieces(p, x.size(0), x.size(1));
  });
}

}  // namespace tbcm::tangent_loss
