// The next versions of CUDA kernels, which take the place of the others once a GPU has passed them.
#pragma once

#include "adaln.h"
#include "conv_glu.h"

namespace tbcm::adaln::next {
template <class T>
const char* launch(const Forward<T>& p, void* stream);
template <class T>
const char* launch(const Backward<T>& p, void* stream);
}  // namespace tbcm::adaln::next

namespace tbcm::conv_glu::next {
template <class T>
const char* launch(const Forward<T>& p, void* stream);
template <class T>
const char* launch(const Backward<T>& p, void* stream);
}  // namespace tbcm::conv_glu::next
