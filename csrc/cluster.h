// Clusters of blocks (sm_90 and later), which wait for one another and write into each other's shared memory.
#pragma once

#include <atomic>

#include "async.h"

namespace tbcm {

constexpr int MAX_CLUSTER = 8;  // that every GPU with clusters can place

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define TBCM_NO_CLUSTERS  // kernels that need them are not launched there
#endif

// The block's index in its cluster.
TBCM_D int cluster_rank() {
#if defined(__CUDA_ARCH__)
  uint32_t rank = 0;
#if !defined(TBCM_NO_CLUSTERS)
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return int(rank);
#elif !defined(__CUDACC__)
  return fibers::current / int(blockDim.x);
#endif
}

// All threads of the cluster have come this far, and see what any of them wrote before.
TBCM_D void cluster_sync() {
#if defined(__CUDA_ARCH__) && !defined(TBCM_NO_CLUSTERS)
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#elif !defined(__CUDACC__)
  fibers::wait(int(blockDim.x) * fibers::blocks);
#endif
}

// A place in shared memory that ends one phase after another: each when so many threads have arrived, and as many bytes
// have come, from the cluster or from memory, as they said to expect.
struct Mailbox {
  uint64_t state;

  // `start_of_mail()` and a barrier of the cluster before its use.
  TBCM_D void init(int arrivals) {
#if defined(__CUDA_ARCH__)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(arrivals) : "memory");
#elif !defined(__CUDACC__)
    fibers::mailboxes[this] = {arrivals};
#endif
  }
  // What the thread wrote and read before is done when the phase has ended.
  TBCM_D void arrive() {
#if defined(__CUDA_ARCH__)
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory");
#elif !defined(__CUDACC__)
    fibers::arrive(this, 0);
#endif
  }
  // Arrives, and says how many bytes will come.
  TBCM_D void expect(int bytes) {
#if defined(__CUDA_ARCH__) && !defined(TBCM_NO_CLUSTERS)
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
#elif !defined(__CUDACC__)
    fibers::arrive(this, bytes);
#endif
  }
  // Until the phase has ended, the first of which is 0.
  TBCM_D void wait(int phase) {
#if defined(__CUDA_ARCH__) && !defined(TBCM_NO_CLUSTERS)
    asm volatile(
        "{\n.reg .pred there;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 there, [%0], %1;\n"
        "@!there bra again;\n}" ::"r"(address()), "r"(phase % 2) : "memory");
#elif !defined(__CUDACC__)
    fibers::wait_for_mail(this, phase);
#endif
  }
  // Sends x to `to` of a block of two or more, whose mailbox at this place counts it; both are this block's addresses.
  TBCM_D void send(int rank, float* to, float x) {
#if defined(__CUDA_ARCH__) && !defined(TBCM_NO_CLUSTERS)
    uint32_t there, box;
    const uint32_t here = uint32_t(__cvta_generic_to_shared(to));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(box) : "r"(address()), "r"(rank));
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(there), "f"(x),
                 "r"(box)
                 : "memory");
#elif !defined(__CUDACC__)
    fibers::send(this, rank, to, x);
#endif
  }

#if defined(__CUDACC__)
  TBCM_D uint32_t address() { return uint32_t(__cvta_generic_to_shared(this)); }
#endif
};

// What comes from other blocks and from memory sees the mailboxes that this thread has begun.
TBCM_D void start_of_mail() {
#if defined(__CUDA_ARCH__) && !defined(TBCM_NO_CLUSTERS)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Four warps, the first one's index a multiple of four, go on with at most, or least, N registers a thread.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
template <int N>
TBCM_D void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
TBCM_D void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
#else
template <int N>
TBCM_D void give_registers() {}
template <int N>
TBCM_D void take_registers() {}
#endif

// A launch in clusters of `size` blocks.
struct ClusterLaunch {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  ClusterLaunch(int64_t blocks, int size, int threads, int shared, void* stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(size), 1, 1};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(shared);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
};

// How many clusters the GPU holds at once; null, or what is wrong. It is asked once for each size.
template <auto KERNEL>
const char* hold(int size, int warps, int shared, int* clusters) {
  constexpr int DEVICES = 16, MAX_WARPS = 32;
  static std::atomic<int> known[DEVICES][MAX_CLUSTER + 1][MAX_WARPS + 1];
  int device = 0;
  cudaGetDevice(&device);
  std::atomic<int>* place = device < DEVICES ? &known[device][size][warps] : nullptr;
  if (place && (*clusters = *place) > 0) return nullptr;
  if (const char* fault = allow(KERNEL, shared, 0)) return fault;
  const ClusterLaunch launch(size, size, warps * WARP, shared, nullptr);
  const auto error = cudaOccupancyMaxActiveClusters(clusters, reinterpret_cast<const void*>(KERNEL), &launch.config);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (*clusters <= 0) return "this GPU has no place for such a cluster of blocks";
  if (place) *place = *clusters;
  return nullptr;
}

// Queues a kernel that `hold` has been asked about; null, or what is wrong.
template <class P>
const char* start_clusters(void (*kernel)(P), int64_t clusters, int size, int threads, int shared, const P& p,
                           void* stream) {
  if (clusters * size > INT32_MAX) return "the tensors are too large for one grid";
  const ClusterLaunch launch(clusters * size, size, threads, shared, stream);
  const cudaError_t error = cudaLaunchKernelEx(&launch.config, kernel, p);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace tbcm
