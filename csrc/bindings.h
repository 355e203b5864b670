// What the kernels need of PyTorch, through its stable ABI only.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <exception>
#include <mutex>
#include <optional>
#include <type_traits>

#include "vector.h"

namespace tbcm {

using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

inline bool is_bf16(const Tensor& x) { return x.scalar_type() == torch::headeronly::ScalarType::BFloat16; }

// Calls f(T{}) for x's element type on a CPU.
template <class F>
void of_type(const Tensor& x, const F& f) {
  is_bf16(x) ? f(bfloat16{}) : f(float{});
}

// The first element of a contiguous tensor, or null.
template <class T>
T* pointer(const Tensor& x) {
  return static_cast<T*>(const_cast<void*>(static_cast<const void*>(x.data_ptr())));
}

template <class T>
T* pointer(const Maybe& x) {
  return x ? pointer<T>(*x) : nullptr;
}

// A [B, N, C] tensor as rows; the Python adapter has made the last stride 1.
template <class T>
Rows<T> rows(const Tensor& x) {
  return {pointer<T>(x), x.stride(0), x.stride(1)};
}

template <class T>
Rows<T> rows(const Maybe& x) {
  return x ? rows<T>(*x) : Rows<T>{};
}

// A row in fp32: where it lies, for a copy costs more than the arithmetic of a norm, or widened into scratch.
TBCM_INLINE const float* widened(const float* row, float*, int64_t) { return row; }
TBCM_INLINE const float* widened(const bfloat16* row, float* scratch, int64_t n) {
  load(scratch, row, n);
  return scratch;
}

// A modulation with up to three dimensions as rows that broadcast where its size is 1 or missing.
inline Rows<const float> broadcast_rows(const Maybe& m) {
  if (!m) return {};
  const auto stride = [&](int64_t d) { return d < 0 || m->size(d) == 1 ? 0 : m->stride(d); };
  return {pointer<const float>(*m), stride(m->dim() - 3), stride(m->dim() - 2)};
}

// Run f(begin, end) over `count` items of `cost` elements each on PyTorch's threads, and give their scratch back where it
// is too much to keep, or could not be had: its size would be that of what was asked for.
template <class F>
void parallel(int64_t count, int64_t cost, const F& f) {
  const int64_t grain = 16384 / (cost > 0 ? cost : 1) + 1;
  std::exception_ptr failure;  // which parallel_for would tell as one of its own
  std::mutex guard;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    try {
      f(begin, end);
    } catch (...) {
      own_scratch() = {};
      const std::lock_guard lock(guard);
      failure = std::current_exception();
    }
    trim_scratch();
  });
  if (failure) std::rethrow_exception(failure);
}

}  // namespace tbcm
