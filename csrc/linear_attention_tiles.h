// Tiles of 16 tokens that a cluster of blocks walks with all heads, one a warp: so the scalars of a row's norm, r and
// m = mean(x tx) over all heads, are summed on the way and every tensor is read once. Two tiles before one is used,
// each warp leaves its sums to its block; one tile before, a warp sends those of the block to the cluster; no warp
// waits for another but for what it needs.
#pragma once

#include "cluster.h"
#include "linear_attention.h"
#include "tensor_cores.h"

namespace tbcm::linear_attention {

constexpr int WARPS = 12, THREADS = WARPS * WARP;  // of a block at most: three a scheduler, 168 registers each
constexpr int AHEAD = 2;  // tiles between the sums of a row and their use

// Blocks of a cluster.
TBCM_HD int blocks_for(int64_t heads) { return int((heads + WARPS - 1) / WARPS); }

template <class T>
using Four = Pack<T, 4>;
template <class T>
using Eight = Pack<T, 8>;

// Writes it to shared memory.
TBCM_D void store(Shared to, const Pack<uint32_t, 2>& pack) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to.address), "r"(pack.values[0]), "r"(pack.values[1]) : "memory");
#else
  std::memcpy(to.address, &pack, sizeof pack);
#endif
}

TBCM_D int lane() { return threadIdx.x % WARP; }
TBCM_D int warp() { return threadIdx.x / WARP; }
TBCM_D int warps() { return blockDim.x / WARP; }

// A thread's columns are 8t, ..., 8t + 7 of the rows g and g + 8 where rows are rows of a product, and 4g, ..., 4g + 3
// of the rows t, t + 4, t + 8, t + 12 where they are summed over.
TBCM_D int group() { return lane() / 4; }
TBCM_D int member() { return lane() % 4; }

// A tile's place: its sample and first token.
struct Place {
  int batch, token;
};

// The cluster's tiles, of all samples one after another, and the warp's head.
struct Work {
  int begin, tiles, tokens, head;
  Place first;
  bool there;  // whether there is such a head; otherwise it is another's, and no row of it is there

  TBCM_D Work(int64_t batch, int64_t heads, int64_t tokens_, int64_t span) {
    const int all = int(batch) * tiles_of(tokens_);
    begin = int(blockIdx.x) / blocks_for(heads) * int(span);
    first = {begin / tiles_of(tokens_), begin % tiles_of(tokens_) * TOKENS};
    tiles = all - begin < int(span) ? all - begin : int(span);
    tokens = int(tokens_);
    head = cluster_rank() * warps() + warp();
    there = head < heads;
    if (!there) head = 0;
  }
  TBCM_D int rows(const Place& place) const {
    const int left = tokens - place.token;
    return !there ? 0 : left < TOKENS ? left : TOKENS;
  }
  TBCM_D bool last(const Place& place) const { return place.token + TOKENS >= tokens; }  // of its sample
  TBCM_D void next(Place& place) const {
    place = last(place) ? Place{place.batch + 1, 0} : Place{place.batch, place.token + TOKENS};
  }
};

// The thread's columns of row g of one tile after another.
template <class T>
struct Cursor {
  T* at = nullptr;
  TBCM_D Cursor(const Heads<T>& x, const Work& work, const Place& place) { go(x, work, place); }
  TBCM_D void go(const Heads<T>& x, const Work& work, const Place& place) {
    if (x) at = x.at(place.batch, work.head, place.token + group()) + 8 * member();
  }
  // From the tile at `place` to the next one.
  TBCM_D void next(const Heads<T>& x, const Work& work, const Place& place) {
    if (work.last(place)) go(x, work, {place.batch + 1, 0});
    else at += TOKENS * x.token;
  }
};

// Tiles of a warp's head, in shared memory.
template <class T, int TENSORS>
struct Ring {
  static constexpr int STAGES = TENSORS > 2 ? 4 : 5;  // tiles that have room
  static constexpr int ROW = WIDTH * int(sizeof(T)), TILE = TOKENS * ROW, BYTES = WARPS * STAGES * TENSORS * TILE;
  Shared own;

  TBCM_D explicit Ring(unsigned char* shared) : own(shared + warp() * (STAGES * TENSORS * TILE)) {}
  TBCM_D Shared at(unsigned tile, int tensor) const { return own + (tile % STAGES * TENSORS + tensor) * TILE; }
  // V columns of a row.
  template <int V>
  TBCM_D Pack<T, V> columns(unsigned tile, int tensor, int row, int first) const {
    return load<Pack<T, V>>(at(tile, tensor) + (row * WIDTH + first) * int(sizeof(T)));
  }
  // Columns 8t, ...
  TBCM_D Eight<T> eight(unsigned tile, int tensor, int row) const { return columns<8>(tile, tensor, row, 8 * member()); }
  // Columns 4g, ...
  TBCM_D Four<T> four(unsigned tile, int tensor, int row) const { return columns<4>(tile, tensor, row, 4 * group()); }
};

// Copies tiles of up to N tensors ahead, one after another; an absent one has no tiles.
template <class T, int N>
struct Reader {
  Ring<T, N> ring;
  const Work& work;
  Heads<const T> x[N];
  Cursor<const T> cursors[N];
  Place place;

  template <class... Tensors>
  TBCM_D Reader(const Ring<T, N>& ring, const Work& work, const Tensors&... x)
      : ring(ring), work(work), x{x...}, cursors{{x, work, work.first}...}, place(work.first) {}
  // Starts to copy the next tile; rows that are not there are zeros.
  TBCM_D void operator()(int tile) {
    const int rows = work.rows(place), row = group();
    each<N>([&](int i) {
      if (!x[i]) return;
      const Shared to = ring.at(tile, i) + (row * WIDTH + 8 * member()) * int(sizeof(T));
      const T* const from = cursors[i].at;
      copy_async(to, reinterpret_cast<const Eight<T>*>(from), row < rows);
      copy_async(to + 8 * Ring<T, N>::ROW, reinterpret_cast<const Eight<T>*>(from + 8 * x[i].token), row + 8 < rows);
      cursors[i].next(x[i], work, place);
    });
    work.next(place);
  }
};

// Sums over all heads for the rows of a tile, 32 of them, one a lane; those of one head where its norm is over that.
//
// A warp that has the totals of a tile knows that all warps have left theirs of it, and before that have read the totals
// of the tile two before: so no place is wanted by two tiles, of two for what warps leave and three for totals.
class Exchange {
 public:
  static constexpr int LEFT = 2, BOXES = 4;
  static constexpr int BYTES = (LEFT * WARPS + BOXES * MAX_CLUSTER) * WARP * int(sizeof(float)) + BOXES * 8;

  // The n-th one of a block; cluster_sync() before its use.
  TBCM_D Exchange(unsigned char* shared, int n, const Norm& norm, int64_t heads)
      : boxes(reinterpret_cast<Mailbox*>(shared + n * BYTES)), left(reinterpret_cast<float*>(boxes + BOXES)),
        totals(left + LEFT * WARPS * WARP), norm(norm), blocks(blocks_for(heads)), id(1 + 2 * n),
        share(1.f / float(norm.scope == Scope::all ? heads * WIDTH : WIDTH)) {
    if (norm.scope == Scope::all && threadIdx.x == 0)
      each<BOXES>([&](int i) {
        boxes[i].init();
        if (blocks > 1) boxes[i].expect(blocks * PART);
      });
  }
  // A sum of this warp.
  TBCM_D void leave(unsigned tile, int sum, float x) const {
    if (norm.scope == Scope::none) return;
    left[(tile % LEFT * WARPS + warp()) * WARP + sum] = x;
    __syncwarp();
    if (norm.scope == Scope::all && warp() != sender(tile)) arrive(id + tile % 2, blockDim.x);
  }
  // Later: the block's sums to every block of the cluster, by one of its warps.
  TBCM_D void send(unsigned tile) const {
    if (norm.scope != Scope::all || warp() != sender(tile)) return;
    sync(id + tile % 2, blockDim.x);
    const float* from = left + tile % LEFT * WARPS * WARP + lane();
    float sum = 0.f;
    each<WARPS>([&](int i) { sum += i < warps() ? from[i * WARP] : 0.f; });
    Mailbox& box = boxes[tile % BOXES];
    float* const to = totals + (tile % BOXES * MAX_CLUSTER + cluster_rank()) * WARP + lane();
    if (blocks == 1) {  // no block alone may send
      *to = sum;
      __syncwarp();
      if (lane() == 0) box.expect(0);
      return;
    }
#pragma unroll 1
    for (int i = 0; i < blocks; ++i) box.send(i, to, sum);
  }
  // Later still: the lane's mean over the columns of the norm, 0 without one.
  TBCM_D float mean(unsigned tile) const {
    if (norm.scope == Scope::none) return 0.f;
    if (norm.scope == Scope::head) return share * left[(tile % LEFT * WARPS + warp()) * WARP + lane()];
    boxes[tile % BOXES].wait(tile / BOXES);
    const float* from = totals + tile % BOXES * MAX_CLUSTER * WARP + lane();
    float sum = 0.f;
    each<MAX_CLUSTER>([&](int i) { sum += i < blocks ? from[i * WARP] : 0.f; });
    if (threadIdx.x == 0 && blocks > 1) boxes[tile % BOXES].expect(blocks * PART);  // of the tile that has it next
    return share * sum;
  }
  // The scalars of rows from those means: lane 2i has x^2 of row i and gets its r, lane 2i + 1 has x tx and gets its
  // d = r^2 m; 0 for rows that are not there.
  TBCM_D float scalar(float mean, int rows) const {
    const bool upper = lane() % 2;
    const float other = __shfl_xor_sync(~0u, mean, 1);
    const float r = norm.scope == Scope::none ? 1.f : rsqrtf((upper ? other : mean) + norm.eps);
    return lane() / 2 >= rows ? 0.f : upper ? r * r * mean : r;
  }

 private:
  static constexpr int PART = WARP * int(sizeof(float));
  TBCM_D int sender(unsigned tile) const { return int(tile % 4) < warps() ? int(tile % 4) : 0; }

  Mailbox* boxes;
  float *left, *totals;  // [LEFT, WARPS, 32] and [BOXES, MAX_CLUSTER, 32]
  Norm norm;
  int blocks, id;
  float share;  // one over these columns
};

// Sums over lanes that differ in some bits, each lane with one of the results: number i goes to the lane whose bits,
// the upper first, say i.
template <int N>
TBCM_D float scatter_sums(float (&x)[N], int distance) {
#pragma unroll
  for (int n = N / 2; n > 0; n /= 2, distance /= 2) {
    const bool upper = lane() & distance;
    each<N / 2>([&](int i) {
      if (i >= n) return;
      const float given = upper ? x[i] : x[i + n];
      const float kept = upper ? x[i + n] : x[i];
      x[i] = kept + __shfl_xor_sync(~0u, given, distance);
    });
  }
  return x[0];
}

// The sum over the lanes of a group.
TBCM_D float over_four(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

template <class T, int V>
TBCM_D float dot(const Pack<T, V>& x, const Pack<T, V>& y) {
  float sum = 0.f;
  each<V>([&](int j) { sum += widen(x.values[j]) * widen(y.values[j]); });
  return sum;
}

// relu, which keeps a NaN.
TBCM_D float relu(float x) {
#if defined(__CUDA_ARCH__)
  asm("max.NaN.f32 %0, %0, 0f00000000;" : "+f"(x));
  return x;
#else
  return x < 0.f ? 0.f : x;
#endif
}

// The weight of a column of a head, 1 without a norm.
TBCM_D float weight(const Norm& norm, const Work& work, int column) {
  if (norm.scope == Scope::none) return 1.f;
  return norm.weight[(norm.scope == Scope::all ? work.head * WIDTH : 0) + column];
}

// The signs of the weights of N columns, as those of numbers of 16 bits.
template <int N>
struct Signs {
  uint32_t words[N / 2] = {};
  TBCM_D Signs(const Norm& norm, const Work& work, int first) {
    each<N>([&](int i) {
      if (weight(norm, work, first + i) < 0.f) words[i / 2] |= 0x8000u << i % 2 * 16;
    });
  }
  // +- x
  template <class T>
  TBCM_D Pack<T, N> turn(Pack<T, N> x) const {
    uint32_t bits[N / 2];
    std::memcpy(bits, &x, sizeof x);
    each<N / 2>([&](int i) { bits[i] ^= words[i]; });
    std::memcpy(&x, bits, sizeof x);
    return x;
  }
};

// Leaves the sums of x^2, and of x tx if there is one, of the rows g and g + 8 of a tile.
template <class T, int TENSORS>
TBCM_D void leave_squares(const Ring<T, TENSORS>& ring, int tile, int x, const Exchange& sums, int tx = -1) {
  float sum[4];
  each<2>([&](int i) {
    const auto row = ring.eight(tile, x, group() + 8 * i);
    sum[2 * i] = dot(row, row);
    sum[2 * i + 1] = tx < 0 ? 0.f : dot(row, ring.eight(tile, tx, group() + 8 * i));
  });
  sums.leave(tile, 2 * (group() + 8 * (member() / 2)) + member() % 2, scatter_sums(sum, 2));
}

// Leaves one sum of each of these rows, which all lanes of a group have.
TBCM_D void leave_rows(const Exchange& sums, int tile, const float (&x)[2]) {
  const int t = member();
  sums.leave(tile, 2 * (group() + 8 * (t / 2)) + t % 2, t < 2 ? x[0] : x[1]);
}

// N pairs of words of each thread that wait in shared memory.
template <int N>
struct Pairs {
  using Two = Pack<uint32_t, 2>;
  static constexpr int STEP = WARP * int(sizeof(Two)), BYTES = N * WARPS * STEP;
  Shared own;
  TBCM_D explicit Pairs(unsigned char* shared) : own(shared + warp() * (N * STEP) + lane() * int(sizeof(Two))) {}
  TBCM_D void put(int i, const void* from) const {
    Two two;
    std::memcpy(&two, from, sizeof two);
    store(own + i * STEP, two);
  }
  TBCM_D void get(int i, void* to) const {
    const Two two = load<Two>(own + i * STEP);
    std::memcpy(to, &two, sizeof two);
  }
};

// Numbers of a thread: two rows of eight in each of three places.
struct Kept : Pairs<3 * 2 * 4> {
  using Pairs::Pairs;
  TBCM_D void put(int place, int row, const float (&x)[8]) const {
    each<4>([&](int i) { Pairs::put((place * 2 + row) * 4 + i, x + 2 * i); });
  }
  TBCM_D void get(int place, int row, float (&x)[8]) const {
    each<4>([&](int i) { Pairs::get((place * 2 + row) * 4 + i, x + 2 * i); });
  }
};

// Calls for each tile in turn `ask` and `sum`, which are ahead, `use` with its scalars, and `finish`, if there is one,
// LATER tiles later, with the same and the means of what `use` has left.
template <int STAGES, int LATER, class Ask, class Sum, class Use, class Finish>
TBCM_D void walk(const Work& work, const Exchange& sums, const Exchange& later, Ask& ask, const Sum& sum,
                 const Use& use, const Finish& finish) {
  constexpr int KEPT = LATER ? LATER : 1;  // tiles whose room is not free yet
  for (int tile = 0; tile < STAGES - AHEAD - KEPT; ++tile) {
    if (tile < work.tiles) ask(tile);
    commit_copies();
  }
  Place place = work.first, done = work.first;
  float scalars[KEPT] = {};  // of the tiles before
  for (int tile = -AHEAD; tile < work.tiles + LATER; ++tile) {
    if (LATER && tile >= LATER) {
      finish(tile - LATER, done, scalars[LATER - 1], later.mean(tile - LATER));
      work.next(done);
    }
    __syncwarp();  // all lanes have used the tile whose room the next one takes
    if (tile - KEPT + STAGES < work.tiles) ask(tile - KEPT + STAGES);
    commit_copies();
    wait_for_copies<STAGES - AHEAD - KEPT>();
    const bool there = tile >= 0 && tile < work.tiles;
    const float mean = there ? sums.mean(tile) : 0.f;
    __syncwarp();
    if (tile + AHEAD < work.tiles) sum(tile + AHEAD);
    if (tile + 1 >= 0 && tile + 1 < work.tiles) sums.send(tile + 1);
    if (LATER && tile >= 1 && tile <= work.tiles) later.send(tile - 1);
    each<KEPT - 1>([&](int i) { scalars[KEPT - 1 - i] = scalars[KEPT - 2 - i]; });
    if (!there) continue;
    scalars[0] = sums.scalar(mean, work.rows(place));
    use(tile, place, scalars[0]);
    work.next(place);
  }
}
template <int STAGES, class Ask, class Sum, class Use>
TBCM_D void walk(const Work& work, const Exchange& sums, Ask& ask, const Sum& sum, const Use& use) {
  walk<STAGES, 0>(work, sums, sums, ask, sum, use, [](int, const Place&, float, float) {});
}

}  // namespace tbcm::linear_attention
