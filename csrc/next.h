// The next versions of CUDA kernels, which take the place of the others once a GPU has passed them.
#pragma once

#include "adaln.h"
#include "conv_glu.h"

namespace tbcm::adaln::next {

// The residual stream in T, and what other layers make and take in N: T itself, or 16 bits beside fp32.
template <class T, class N>
struct Forward : adaln::Forward<T> {
  Rows<const N> h, th;
  Rows<N> y, ty;
};

template <class T, class N>
struct Backward : adaln::Backward<T> {
  Rows<const N> gy, h;
  Rows<N> gh;
};

template <class T, class N>
const char* launch(const Forward<T, N>& p, void* stream);
template <class T, class N>
const char* launch(const Backward<T, N>& p, void* stream);

}  // namespace tbcm::adaln::next

namespace tbcm::conv_glu::next {
template <class T>
const char* launch(const Forward<T>& p, void* stream);
template <class T>
const char* launch(const Backward<T>& p, void* stream);
}  // namespace tbcm::conv_glu::next
