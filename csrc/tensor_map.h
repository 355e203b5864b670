// Boxes of a [B, H, N, 32] tensor of 16-bit numbers that one thread copies to shared memory (sm_90 and later).
#pragma once

#if defined(__CUDACC__)
#include <cuda.h>
#endif

#include "cluster.h"
#include "linear_attention.h"

namespace tbcm::linear_attention {

// Of rows of `tokens` tokens of `heads` heads; null, or what is wrong.
template <class T>
const char* describe(CUtensorMap* map, const Heads<T>& x, int64_t batch, int64_t heads, int64_t tokens, int box_heads) {
  static_assert(sizeof(T) == 2);
  const uint64_t sizes[] = {WIDTH, uint64_t(tokens), uint64_t(heads), uint64_t(batch)};
  const uint64_t strides[] = {2 * uint64_t(x.token), 2 * uint64_t(x.head), 2 * uint64_t(x.batch)};
  const uint32_t box[] = {WIDTH, TOKENS, uint32_t(box_heads), 1}, steps[] = {1, 1, 1, 1};
#if defined(__CUDACC__)
  static const auto encode = [] {  // a function of the driver, which the library does not link
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  if (!encode) return "this driver knows no tensor maps";
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<std::remove_const_t<T>*>(x.data), sizes, strides, box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "the driver refuses a tensor map of these strides";
#else
  std::memset(map, 0, sizeof *map);
  map->data = reinterpret_cast<const unsigned char*>(x.data);
  std::memcpy(map->dims, sizes, sizeof sizes);
  std::memcpy(map->strides, strides, sizeof strides);
  std::memcpy(map->box, box, sizeof box);
  return steps[0] ? nullptr : "";
#endif
}

// Starts to copy the box of `box_heads` heads from `head` on, zeros where the tensor ends; the mailbox counts its bytes.
TBCM_D void copy_box(Shared to, const CUtensorMap& map, Mailbox& mailbox, int token, int head, int batch) {
#if defined(__CUDA_ARCH__)
#if !defined(TBCM_NO_CLUSTERS)
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(to.address), "l"(&map), "r"(0), "r"(token), "r"(head), "r"(batch), "r"(mailbox.address())
      : "memory");
#endif
#elif !defined(__CUDACC__)
  fibers::copy_box(&mailbox, to.address, map, {0, token, head, batch});
#endif
}

}  // namespace tbcm::linear_attention
