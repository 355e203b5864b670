// Rows of CUDA kernels that normalise: a row lies in the registers of one warp, or of a block's warps.
#pragma once

#include "async.h"

#include <algorithm>
#include <type_traits>

namespace tbcm {

constexpr int MAX_WIDTH = 4096, MAX_WARPS = 16;
constexpr int ROWS = 4;  // of a block, where a warp has one alone
constexpr int PARTIALS = MAX_WARPS + 4;  // places for sums over a block
constexpr int PARTIAL_BYTES = 2 * PARTIALS * int(sizeof(float2));  // in backward

// V neighbours of a row that move in accesses of up to 16 bytes, as the registers that they are in: compilers take
// arrays of 16-bit numbers apart, and put them together again wherever they are used.
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Few {
  static constexpr bool PAIRS = sizeof(T) == 2 && V % 2 == 0;
  using Word = std::conditional_t<sizeof(T) == 4 || PAIRS, uint32_t, uint16_t>;
  Word words[PAIRS ? V / 2 : V];

  TBCM_D float operator[](int j) const {
    const auto word = words[PAIRS ? j / 2 : j];
    if constexpr (PAIRS && std::is_same_v<T, bfloat16>) return as<float>(j % 2 ? word & 0xffff0000u : word << 16);
    else if constexpr (PAIRS) return widen(T{uint16_t(j % 2 ? word >> 16 : word)});
    else return widen(as<T>(word));
  }
  // Of what f gives for 0, ..., V - 1.
  template <class F>
  TBCM_D static Few of(const F& f) {
    Few few;
    each<PAIRS ? V / 2 : V>([&](int k) {
      if constexpr (PAIRS) {
        few.words[k] = both(f(2 * k), f(2 * k + 1));
      } else {
        T x;
        narrow(f(k), &x);
        few.words[k] = as<Word>(x);
      }
    });
    return few;
  }

 private:
  // The same bits as another type.
  template <class To, class From>
  TBCM_D static To as(const From& from) {
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
  }
  TBCM_D static uint32_t both(float low, float high) {
#if defined(__CUDA_ARCH__)
    uint32_t bits;
    if (std::is_same_v<T, bfloat16>) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
#else
    T parts[2];
    narrow(low, parts);
    narrow(high, parts + 1);
    return as<uint32_t>(parts);
#endif
  }
};

// How a row is spread: over one warp where it is ALONE, else over the block, each warp with a piece of its own. A
// thread has E columns of it in packs of V neighbours, those of neighbouring threads side by side.
template <int V_, int E_, bool ALONE_>
struct Spread {
  static constexpr int V = V_, E = E_, PACKS = E / V, PITCH = WARP * V;
  static constexpr bool ALONE = ALONE_;

  TBCM_D static int first() {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    return ALONE ? lane * V : warp * (WARP * E) + lane * V;
  }
  TBCM_D static bool inside(int k, int width) { return first() < width - k * PITCH; }
};

// The thread's packs of a row in memory.
template <class T, class S>
struct Place {
  T* first;
  int width;  // 0 where there is no row

  TBCM_D Place(T* row, int width) : first(row + S::first()), width(row ? width : 0) {}
  TBCM_D T* at(int k) const { return first + k * S::PITCH; }
  // Zeros, or another number, beyond the row and where there is none.
  using Own = Few<std::remove_const_t<T>, S::V>;
  TBCM_D Own get(int k, const Own& otherwise = {}) const {
    return S::inside(k, width) ? *reinterpret_cast<const Own*>(at(k)) : otherwise;
  }
  TBCM_D void put(int k, const Few<T, S::V>& few) const {
    if (S::inside(k, width)) *reinterpret_cast<Few<T, S::V>*>(at(k)) = few;
  }
};

template <class S, class T>
TBCM_D Place<T, S> place_of(T* row, int width) {
  return {row, width};
}

// A thread's part of a row, in registers.
template <class T, class S>
struct Part {
  Few<T, S::V> packs[S::PACKS];

  Part() = default;
  TBCM_D Part(const T* row, int width) {
    const Place<const T, S> place(row, width);
    each<S::PACKS>([&](int k) { packs[k] = place.get(k); });
  }
  TBCM_D float operator[](int i) const { return packs[i / S::V][i % S::V]; }
};

// Means over the row of a function of the element that gives two numbers, ZERO for zeros as they are beyond the row;
// `partial` has a place for each warp, and three for zeros.
template <class S, bool ZERO, class F>
TBCM_D float2 means(int width, float2* partial, const F& f) {
  const float scale = 1.f / float(width);
  float2 sum = {0.f, 0.f};
  each<S::PACKS>([&](int k) {
    float2 own = f(k * S::V);  // of a pack: short chains of sums, and no branch
    each<S::V - 1>([&](int j) {
      const float2 v = f(k * S::V + j + 1);
      own.x += v.x;
      own.y += v.y;
    });
    const bool counts = ZERO || S::inside(k, width);
    sum.x += counts ? own.x : 0.f;
    sum.y += counts ? own.y : 0.f;
  });
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) {
    sum.x += __shfl_xor_sync(~0u, sum.x, distance);
    sum.y += __shfl_xor_sync(~0u, sum.y, distance);
  }
  if constexpr (!S::ALONE) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    if (lane == 0 || (warp == warps - 1 && lane < 4)) partial[warp + lane] = lane == 0 ? sum : float2{0.f, 0.f};
    __syncthreads();
    sum = {0.f, 0.f};
#pragma unroll 1
    for (int first = 0; first < warps; first += 4) each<4>([&](int i) {  // read together
        sum.x += partial[first + i].x;
        sum.y += partial[first + i].y;
      });
  }
  return {sum.x * scale, sum.y * scale};
}

// An operand's rows from one on: to step costs less than to find each.
template <class T>
struct Walk {
  T* row;
  int64_t stride;

  TBCM_D Walk(const Rows<T>& rows, bool there, int64_t b, int64_t n)
      : row(there ? rows.at(b, n) : nullptr), stride(there ? rows.stride_n : 0) {}
  TBCM_D T* next() {
    T* const own = row;
    row += stride;
    return own;
  }
};

// The rows of COUNT operands of up to so many bytes an element in shared memory, a row ahead: each thread copies
// and reads what is its own, so it waits for nobody.
template <class S, int COUNT, int ELEMENT>
struct Queue {
  static constexpr int SLOT = ELEMENT * S::V, STAGE = COUNT * S::PACKS * WARP * SLOT;
  Shared own;
  int filled = STAGE, free = 0;  // the thread's places for the row in use and for the next

  TBCM_D explicit Queue(unsigned char* shared)
      : own(shared + threadIdx.x / WARP * (2 * STAGE) + threadIdx.x % WARP * SLOT) {}
  static int bytes(int threads) { return 2 * STAGE * (threads / WARP); }
  // Asks for an operand's next row, if it is there, with zeros beyond its end.
  template <class T>
  TBCM_D void ask(int operand, const T* row, int width) {
    if (!row) return;
    const Place<const T, S> from(row, width);
    using Own = Few<T, S::V>;
    each<S::PACKS>([&](int k) {
      const Own* source = reinterpret_cast<const Own*>(from.at(k));
      copy_async(own + (free + (operand * S::PACKS + k) * (WARP * SLOT)), source, S::inside(k, width));
    });
  }
  // Asks for the first row; `ask` asks for all operands of the next.
  template <class F>
  TBCM_D void begin(const F& ask) {
    ask();
    commit_copies();
  }
  // Asks for the row behind this one, and waits for this one, which `get` gives from here on.
  template <class F>
  TBCM_D void step(int row, int rows, const F& ask) {
    filled = free;
    free = STAGE - free;
    if (row + 1 < rows) {
      ask();
      commit_copies();
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
  }
  // An operand's part of the row; only of an operand that is there.
  template <class T>
  TBCM_D Few<T, S::V> get(int operand, int k) const {
    return load<Few<T, S::V>>(own + (filled + (operand * S::PACKS + k) * (WARP * SLOT)));
  }
  template <class T>
  TBCM_D Part<T, S> get(int operand) const {
    Part<T, S> part;
    each<S::PACKS>([&](int k) { part.packs[k] = get<T>(operand, k); });
    return part;
  }
};

template <class... Operands>
bool all_aligned(const Operands&... operands) {
  return (aligned(operands) && ...);
}

// Threads of a block for rows of a width in parts of E.
inline int threads_of(int64_t width, int E) { return int((width + WARP * E - 1) / (WARP * E)) * WARP; }

// Tokens of a block, so that the blocks of all samples are at once on the GPU if they can be.
template <class P>
int64_t chunk_of_wave(void (*kernel)(P), int64_t batch, int64_t tokens, int threads, int shared, int fixed) {
  int device = 0, multiprocessors = 1, blocks = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (allow(kernel, shared, fixed)) return tokens;  // the launch will say it
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared);
  const int64_t chunks = std::max<int64_t>(int64_t(multiprocessors) * blocks / std::max<int64_t>(batch, 1), 1);
  return std::max<int64_t>((tokens + chunks - 1) / chunks, 1);
}

// Queues a kernel that takes each row alone.
template <class S, class P>
const char* start_rows(void (*kernel)(P), int64_t rows, const P& p, void* stream) {
  if (S::ALONE) return start(kernel, (rows + ROWS - 1) / ROWS, ROWS * WARP, p, stream);
  return start(kernel, rows, threads_of(p.width, S::E), p, stream);
}

}  // namespace tbcm
