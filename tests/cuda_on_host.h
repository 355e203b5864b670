// Runs CUDA kernels on the host: the threads of a block are fibers that take turns, and wait for one
// another where they exchange values. Included before a kernel's source, in place of nvcc.
//
// Asynchronous copies arrive no sooner than they are waited for, and a block's shared memory begins as NaNs.
//
// Blocks of a cluster take turns as their threads do; what other launches share between blocks they have each alone.
//
// Launches differ in the order of threads, so that a missing barrier shows: as they are or in reverse, each in turn
// or one warp as far as it comes. A case launches three kernels, so its second run meets other orders and gives
// other bits.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __maxnreg__(...)

struct float2 {
  float x, y;
};
struct int2 {
  int x, y;
};
struct dim3 {
  unsigned x;
};
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
struct cudaLaunchAttribute {
  int id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct CUtensorMap {  // of 16-bit numbers, [dims[3], dims[2], dims[1], dims[0]]
  const unsigned char* data;
  uint64_t dims[4], strides[3];  // in bytes, of all but the first
  uint32_t box[4];
};
constexpr int cudaLaunchAttributeClusterDimension = 0;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 0, cudaDevAttrMaxSharedMemoryPerBlockOptin = 0,
              cudaDevAttrMultiProcessorCount = 1;
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

inline dim3 blockIdx, blockDim, threadIdx;

namespace fibers {

constexpr int WARP = 32, STACK = 1 << 16;

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  std::vector<char> stack = std::vector<char>(STACK);
  bool started, done;
  int waits;  // for its warp, its block or its cluster: 0, 1, 2; or -1
  int times[3];  // it has waited for its warp, its block and its cluster
  std::function<bool()> until;  // what else it waits for
};

inline std::vector<Fiber> all;
// What lanes give one another in turns: who is late reads one of them while the others write the next.
inline std::vector<float> exchanged[2];
struct Factors {  // of a warp's product: rows of the one, columns of the other
  float a[16][16], b[8][16];
};
inline std::vector<Factors> factors[2];
inline std::function<void()> body;
inline jmp_buf scheduler;
inline int current;
inline unsigned first;  // block of the cluster
inline int blocks;  // of a cluster

struct Copy {
  void* to;
  const void* from;  // null for zeros
  size_t bytes;
};
inline std::vector<std::vector<std::vector<Copy>>> copies;  // of each thread, in groups; the last is open
// Of the blocks of a cluster, the running one's.
constexpr int CLUSTER = 8, SHARED = 228 << 10;
alignas(16) inline unsigned char memory[CLUSTER][SHARED];
inline struct {
  operator unsigned char*() const { return memory[current / int(blockDim.x)]; }
  unsigned char* other(void* place, int rank) const {
    return memory[rank] + (static_cast<unsigned char*>(place) - memory[current / int(blockDim.x)]);
  }
} shared;

inline void copy(void* to, const void* from, size_t bytes) { copies[current].back().push_back({to, from, bytes}); }
inline void commit() { copies[current].emplace_back(); }
// The planted faults that the proofs must find.
inline bool without_waits() {
  static const bool without = std::getenv("WITHOUT_WAITS") != nullptr;
  return without;
}
inline bool without_barriers() {
  static const bool without = std::getenv("WITHOUT_BARRIERS") != nullptr;
  return without;
}
inline void wait_for_copies(int left) {
  auto& groups = copies[current];
  while (!without_waits() && int(groups.size()) - 1 > left) {
    for (const Copy& c : groups.front())
      if (c.from) std::memcpy(c.to, c.from, c.bytes);
      else std::memset(c.to, 0, c.bytes);
    groups.erase(groups.begin());
  }
}

// Threads that wait for one another: a warp, a block or the cluster. Those that have ended count no more.
struct Group {
  int first, last;
  int times;  // its threads have waited at least
  int behind;  // threads that have waited no more often
  void count(int kind) {
    times = INT_MAX;
    for (int i = first; i < last; ++i) {
      if (all[i].done || all[i].times[kind] > times) continue;
      if (all[i].times[kind] < times) behind = 0;
      times = all[i].times[kind];
      ++behind;
    }
  }
};
inline std::vector<Group> groups[3];
inline int size(int kind) { return kind == 0 ? WARP : kind == 1 ? int(blockDim.x) : int(blockDim.x) * blocks; }
inline Group& group(int thread, int kind) { return groups[kind][thread / size(kind)]; }
inline void gather() {
  for (int kind = 0; kind < 3; ++kind) {
    groups[kind].clear();
    for (int i = 0; i < size(2); i += size(kind)) {
      groups[kind].push_back({i, std::min(i + size(kind), size(2))});
      groups[kind].back().count(kind);
    }
  }
}
// A thread goes on or ends, as its fiber says now: its groups may all have come as far.
inline void moved(int thread, int kind, int before) {
  Group& g = group(thread, kind);
  if (before == g.times && --g.behind == 0) g.count(kind);
}

inline void wait(int threads) {
  const int kind = threads <= WARP ? 0 : threads <= int(blockDim.x) ? 1 : 2;
  all[current].waits = kind;
  moved(current, kind, all[current].times[kind]++);
  if (!_setjmp(all[current].at)) _longjmp(scheduler, 1);
}

// Until something holds that another thread brings about.
inline void wait_until(const std::function<bool()>& holds) {
  all[current].until = holds;
  if (!_setjmp(all[current].at)) _longjmp(scheduler, 1);
}

// Of a block's shared memory: what comes is there when its phase ends, and until then there are NaNs.
struct Mail {
  unsigned char* to;
  std::vector<unsigned char> bytes;
};
struct Box {
  int arrivals = 0, arrived = 0, missing = 0, phase = 0;  // bytes that have been announced and have not come
  std::vector<Mail> mail;
};
inline std::map<void*, Box> mailboxes;
inline void deliver(Box& box) {
  if (box.arrived > box.arrivals) __builtin_trap();
  if (box.arrived < box.arrivals || box.missing) return;
  if (!without_waits())
    for (const Mail& m : box.mail) std::memcpy(m.to, m.bytes.data(), m.bytes.size());
  box.mail.clear();
  box.arrived = 0;
  ++box.phase;
}
inline void arrive(void* place, int bytes) {
  Box& box = mailboxes.at(place);
  ++box.arrived;
  box.missing += bytes;
  deliver(box);
}
inline void post(Box& box, unsigned char* to, std::vector<unsigned char> bytes) {
  std::memset(to, 0xff, bytes.size());
  box.missing -= int(bytes.size());
  box.mail.push_back({to, std::move(bytes)});
  deliver(box);
}
inline void send(void* place, int rank, float* to, float x) {
  if (blocks == 1) __builtin_trap();  // undefined in PTX
  const auto* bytes = reinterpret_cast<unsigned char*>(&x);
  post(mailboxes.at(shared.other(place, rank)), shared.other(to, rank), {bytes, bytes + sizeof x});
}
inline void wait_for_mail(void* place, int phase) {
  Box& box = mailboxes.at(place);
  if (box.phase > phase + 1) __builtin_trap();  // the next one has ended too: on a GPU this one would not be told apart
  wait_until([&box, phase] { return box.phase > phase; });
}
// A box of a tensor map, zeros where the tensor ends.
inline void copy_box(void* place, unsigned char* to, const CUtensorMap& map, const int (&first)[4]) {
  const int row = int(map.box[0]) * 2;
  std::vector<unsigned char> bytes(size_t(row) * map.box[1] * map.box[2]);
  for (unsigned h = 0; h < map.box[2]; ++h)
    for (unsigned n = 0; n < map.box[1]; ++n) {
      const uint64_t at[3] = {uint64_t(first[1]) + n, uint64_t(first[2]) + h, uint64_t(first[3])};
      if (at[0] >= map.dims[1] || at[1] >= map.dims[2] || at[2] >= map.dims[3]) continue;
      std::memcpy(&bytes[(h * map.box[1] + n) * row],
                  map.data + at[0] * map.strides[0] + at[1] * map.strides[1] + at[2] * map.strides[2], row);
    }
  post(mailboxes.at(place), to, std::move(bytes));
}

inline void enter() {
  body();
  all[current].done = true;
  for (int kind = 0; kind < 3; ++kind) moved(current, kind, all[current].times[kind]);
  _longjmp(scheduler, 1);
}

inline void resume(int thread) {
  Fiber& f = all[thread];
  current = thread;
  threadIdx.x = unsigned(thread) % blockDim.x;
  blockIdx.x = first + unsigned(thread) / blockDim.x;
  f.waits = -1;
  f.until = nullptr;
  if (_setjmp(scheduler)) return;
  if (f.started) _longjmp(f.at, 1);
  f.started = true;
  getcontext(&f.start);
  f.start.uc_stack.ss_sp = f.stack.data();
  f.start.uc_stack.ss_size = STACK;
  makecontext(&f.start, enter, 0);
  setcontext(&f.start);
}

// Whether what a thread waits for has come: all threads of a group as far as it, or something else.
inline bool ready(int thread) {
  const Fiber& f = all[thread];
  if (f.done) return false;
  if (f.until) return f.until();
  return f.waits < 0 || group(thread, f.waits).times >= f.times[f.waits];
}

// Threads that can move on, in their order or in reverse; of the first one's warp alone in every other two launches.
inline std::vector<int> able(int launch) {
  std::vector<int> found;
  for (int k = 0; k < size(2); ++k) {
    const int i = launch % 2 ? size(2) - 1 - k : k;
    if (launch / 2 % 2 && !found.empty() && i / WARP != found[0] / WARP) break;
    if (ready(i)) found.push_back(i);
  }
  return found;
}

// The blocks of a cluster; one alone is one.
inline void run_cluster(int launch) {
  std::memset(memory, 0xff, size_t(blocks) * SHARED);
  copies.assign(size(2), {{}});
  mailboxes.clear();
  for (int i = 0; i < size(2); ++i) {
    all[i].started = all[i].done = false;
    all[i].waits = -1;
    all[i].times[0] = all[i].times[1] = all[i].times[2] = 0;
    all[i].until = nullptr;
  }
  gather();
  for (int left = size(2); left > 0;) {
    const std::vector<int> threads = able(launch);  // decided before anyone moves on
    if (threads.empty()) __builtin_trap();  // they wait for one another for ever
    for (const int i : threads) {
      resume(i);
      left -= all[i].done;
    }
  }
}

// c += a b, as csrc/tensor_cores.h has them in lanes, of numbers that `widen` gives of 16 bits.
template <class F>
void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const F& widen) {
  Factors& given = factors[all[current].times[0] % 2][current / WARP];
  const int g = current % WARP / 4, t = current % 4;
  for (int half = 0; half < 2; ++half) {
    const auto number = [&](uint32_t word) { return widen(uint16_t(half ? word >> 16 : word)); };
    for (int i = 0; i < 4; ++i) given.a[g + i % 2 * 8][2 * t + half + i / 2 * 8] = number(a[i]);
    for (int i = 0; i < 2; ++i) given.b[g][2 * t + half + i * 8] = number(b[i]);
  }
  wait(WARP);
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k) c[i] += given.a[g + i / 2 * 8][k] * given.b[2 * t + i % 2][k];
}

}  // namespace fibers

inline void __syncthreads() {
  if (!fibers::without_barriers()) fibers::wait(int(blockDim.x));
}

inline void __syncwarp() {
  if (!fibers::without_barriers()) fibers::wait(fibers::WARP);
}

inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }

inline float __shfl_sync(unsigned, float v, int lane) {
  const int me = fibers::current;
  auto& given = fibers::exchanged[fibers::all[me].times[0] % 2];
  given[me] = v;
  fibers::wait(fibers::WARP);
  return given[me / fibers::WARP * fibers::WARP + lane];
}
inline float __shfl_xor_sync(unsigned mask, float v, int lanes) {
  return __shfl_sync(mask, v, fibers::current % fibers::WARP ^ lanes);
}

inline cudaError_t cudaGetDevice(int*) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : fibers::SHARED;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, int, int) { return cudaSuccess; }

inline cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  *clusters = 2;
  return cudaSuccess;
}

inline int launches = 0;

template <class P>
void launch(void (*kernel)(P), unsigned blocks, unsigned cluster, dim3 threads, void* argument) {
  ++launches;
  blockDim = threads;
  fibers::blocks = int(cluster);
  const size_t all = size_t(threads.x) * cluster;
  if (fibers::all.size() < all) fibers::all.resize(all);
  for (auto& given : fibers::exchanged) given.resize(all);
  for (auto& given : fibers::factors) given.resize((all + fibers::WARP - 1) / fibers::WARP);
  fibers::body = [=] { kernel(*static_cast<P*>(argument)); };
  for (fibers::first = 0; fibers::first < blocks; fibers::first += cluster) fibers::run_cluster(launches);
}

template <class P>
cudaError_t cudaLaunchKernel(void (*kernel)(P), dim3 blocks, dim3 threads, void** arguments, size_t, cudaStream_t) {
  launch(kernel, blocks.x, 1, threads, arguments[0]);
  return cudaSuccess;
}

template <class P>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P), const P& p) {
  P copy = p;
  launch(kernel, config->gridDim.x, config->attrs[0].val.clusterDim.x, config->blockDim, &copy);
  return cudaSuccess;
}
