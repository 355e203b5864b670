// Tiles of 16 tokens that a cluster of blocks walks with all heads, one a warp: so the scalars of a row's norm, r and
// m = mean(x tx) over all heads, are summed on the way and every tensor is read once.
//
// A block has one more warp at work, the carrier: it asks for tiles ahead, a box of all its heads at once; it adds what its
// warps leave of a tile, two tiles before they use it, and sends that to the cluster; and it gives them the scalars that
// it makes of the totals. No warp waits for another but for what it needs.
#pragma once

#include "tensor_cores.h"
#include "tensor_map.h"

namespace tbcm::linear_attention {

constexpr int WARPS = 12;  // of a block that have a head, at most: three a scheduler
constexpr int THREADS = 16 * WARP;  // with four of which the first is the carrier: groups of four share out registers
constexpr int GIVEN = 32, TAKEN = 160;  // registers of the last four, and of others
constexpr int AHEAD = 2;  // tiles between the sums of a row and their use

// Blocks of a cluster, and warps of a block that have a head.
TBCM_HD int blocks_for(int heads) { return (heads + WARPS - 1) / WARPS; }
TBCM_HD int warps_for(int heads) { return (heads + blocks_for(heads) - 1) / blocks_for(heads); }

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

// A thread's columns are 8t, ..., 8t + 7 of the rows g and g + 8 where rows are rows of a product, and 4g, ..., 4g + 3
// of the rows t, t + 4, t + 8, t + 12 where they are summed over.
TBCM_D int group() { return lane() / 4; }
TBCM_D int member() { return lane() % 4; }

// A tile's place: its sample and first token.
struct Place {
  int batch, token;
};

// What a kernel's clusters share: the tiles of all samples one after another, a span for each.
struct Job {
  int batch, heads, tokens, span;
  TBCM_D Job(int64_t batch, int64_t heads, int64_t tokens, int64_t span)
      : batch(int(batch)), heads(int(heads)), tokens(int(tokens)), span(int(span)) {}
};

// The cluster's tiles, and the warp's head.
struct Work {
  int begin, tiles, tokens, warps, head;
  Place first;
  bool there;  // whether there is such a head; otherwise its rows are zeros

  TBCM_D explicit Work(const Job& job) {
    const int of_sample = tiles_of(job.tokens), all = job.batch * of_sample;
    begin = int(blockIdx.x) / blocks_for(job.heads) * job.span;
    first = {begin / of_sample, begin % of_sample * TOKENS};
    tiles = all - begin < job.span ? all - begin : job.span;
    tokens = job.tokens;
    warps = warps_for(job.heads);
    head = cluster_rank() * warps + warp();
    there = head < job.heads;
    if (!there) head = 0;
  }
  TBCM_D int rows(const Place& place) const { return tokens - place.token < TOKENS ? tokens - place.token : TOKENS; }
  // Whether row g + 8i of the tile is one to write.
  TBCM_D bool has(const Place& place, int i) const { return there && group() + 8 * i < tokens - place.token; }
  TBCM_D bool last(const Place& place) const { return place.token + TOKENS >= tokens; }  // of its sample
  TBCM_D void next(Place& place) const {
    place = last(place) ? Place{place.batch + 1, 0} : Place{place.batch, place.token + TOKENS};
  }
};

// Eight numbers to memory.
template <class T>
TBCM_D void put(T* to, const uint32_t (&words)[4]) {
  *reinterpret_cast<Pack<uint32_t, 4>*>(to) = {words[0], words[1], words[2], words[3]};
}

// The thread's columns of row g of a sample's first tile.
template <class T>
TBCM_D T* row_of(const Heads<T>& x, const Work& work, int batch) {
  return x ? x.at(batch, work.head, group()) + 8 * member() : nullptr;
}

// Tiles of the block's heads, in shared memory; the rows of a head lie one after another.
template <class T, int TENSORS>
struct Ring {
  static constexpr int STAGES = TENSORS > 2 ? 4 : 5;  // tiles that have room
  static constexpr int ROW = WIDTH * int(sizeof(T)), TILE = TOKENS * ROW, TENSOR = WARPS * TILE;
  static constexpr int MAIL = 128, BYTES = MAIL + STAGES * TENSORS * TENSOR;
  Mailbox *full, *empty;  // of each stage
  Shared all, own;

  TBCM_D explicit Ring(unsigned char* shared)
      : full(reinterpret_cast<Mailbox*>(shared)), empty(full + STAGES), all(shared + MAIL), own(all + warp() * TILE) {}
  // By one thread.
  TBCM_D void begin(int warps) const {
    each<STAGES>([&](int i) {
      full[i].init(1);
      empty[i].init(warps);
    });
  }
  TBCM_D static int place(unsigned tile, int tensor) { return (int(tile % STAGES) * TENSORS + tensor) * TENSOR; }
  // Until the tile is there, for all of them; and from then on it is not used.
  TBCM_D void wait(unsigned tile) const { full[tile % STAGES].wait(tile / STAGES); }
  TBCM_D void release(unsigned tile) const {
    __syncwarp();
    if (lane() == 0) empty[tile % STAGES].arrive();
  }
};

// One of them.
template <class T, int TENSORS>
struct Tile {
  Shared at;
  TBCM_D Tile(const Ring<T, TENSORS>& ring, unsigned tile) : at(ring.own + ring.place(tile, 0)) {}
  // V columns of a row.
  template <int V>
  TBCM_D Pack<T, V> columns(int tensor, int row, int first) const {
    return load<Pack<T, V>>(at + (tensor * Ring<T, TENSORS>::TENSOR + (row * WIDTH + first) * int(sizeof(T))));
  }
  // Columns 8t, ...
  TBCM_D Eight<T> eight(int tensor, int row) const { return columns<8>(tensor, row, 8 * member()); }
  // Columns 4g, ...
  TBCM_D Four<T> four(int tensor, int row) const { return columns<4>(tensor, row, 4 * group()); }
};

// By the carrier: asks for the tiles of the first N of these tensors, one after another; an absent one has no data.
template <class T, int N>
struct Reader {
  const Ring<T, N>& ring;
  const Work& work;
  const CUtensorMap (&maps)[N];
  bool there[N];
  int count = 0;
  Place place;

  template <class... Tensors>
  TBCM_D Reader(const Ring<T, N>& ring, const Work& work, const CUtensorMap (&maps)[N], const Tensors&... x)
      : ring(ring), work(work), maps(maps), place(work.first) {
    const bool given[] = {bool(x)...};
    each<N>([&](int i) { count += there[i] = given[i]; });
  }
  TBCM_D void operator()(unsigned tile) {
    constexpr int STAGES = Ring<T, N>::STAGES;
    if (tile >= STAGES) ring.empty[tile % STAGES].wait(tile / STAGES - 1);
    if (lane() == 0) {
      Mailbox& full = ring.full[tile % STAGES];
      full.expect(count * work.warps * Ring<T, N>::TILE);
      each<N>([&](int i) {
        if (there[i])
          copy_box(ring.all + ring.place(tile, i), maps[i], full, place.token, cluster_rank() * work.warps, place.batch);
      });
    }
    work.next(place);
  }
};

// Sums over all heads for the rows of a tile, 32 of them, one a lane; those of one head where its norm is over that.
//
// A warp that has the results of a tile knows that its block's sums of it are collected, and that all warps of the
// cluster have left theirs, and before that have read the results of the tile two before: so no place is wanted by two
// tiles, of two for what warps leave, four for totals and eight for results.
class Exchange {
 public:
  static constexpr int LEFT = 2, BOXES = 4, RESULTS = 8, PART = WARP * int(sizeof(float));
  static constexpr int NUMBERS = LEFT * WARPS + BOXES * MAX_CLUSTER;  // in rows of 32
  static constexpr int BYTES = (NUMBERS + RESULTS) * PART + 128;

  // The n-th one of a block; `begin` and cluster_sync() before its use.
  TBCM_D Exchange(unsigned char* shared, int n, const Norm& norm, int heads)
      : boxes(reinterpret_cast<Mailbox*>(shared + n * BYTES)), collected(boxes + BOXES), ready(collected + LEFT),
        left(reinterpret_cast<float*>(boxes + 16)), results(left + NUMBERS * WARP), norm(norm),
        blocks(blocks_for(heads)), warps(warps_for(heads)), share(1.f / float(all() ? heads * WIDTH : WIDTH)) {}
  // By one thread.
  TBCM_D void begin() const {
    each<BOXES>([&](int i) {
      boxes[i].init(1);
      if (blocks > 1) boxes[i].expect(blocks * PART);
    });
    each<LEFT>([&](int i) { collected[i].init(warps); });
    each<RESULTS>([&](int i) { ready[i].init(1); });
  }
  TBCM_D bool all() const { return norm.scope == Scope::all; }
  TBCM_D bool none() const { return norm.scope == Scope::none; }
  // The place of two sums of this warp, of a row, which it fills and then has `done`.
  TBCM_D float2* two(unsigned tile, int row) const { return reinterpret_cast<float2*>(own(tile)) + row; }
  TBCM_D void done(unsigned tile) const {
    __syncwarp();
    if (all() && lane() == 0) collected[tile % LEFT].arrive();
  }
  // By the carrier: the block's sums to every block of the cluster.
  TBCM_D void send(unsigned tile) const {
    if (!all()) return;
    collected[tile % LEFT].wait(tile / LEFT);
    const float* from = left + tile % LEFT * (WARPS * WARP) + lane();
    float sum = 0.f;
    each<WARPS>([&](int i) { sum += i < warps ? from[i * WARP] : 0.f; });
    float* const to = totals(tile) + cluster_rank() * WARP + lane();
    if (blocks == 1) *to = sum;  // no block alone may send
    else
      for (int i = 0; i < blocks; ++i) boxes[tile % BOXES].send(i, to, sum);
  }
  // By the carrier, later: what `of` makes of the means over the columns of the norm, each lane of its own.
  template <class F>
  TBCM_D void publish(unsigned tile, const F& of) const {
    if (!all()) return;
    if (blocks > 1) boxes[tile % BOXES].wait(tile / BOXES);
    const float* from = totals(tile) + lane();
    float sum = 0.f;
    each<MAX_CLUSTER>([&](int i) { sum += i < blocks ? from[i * WARP] : 0.f; });
    if (lane() == 0 && blocks > 1) boxes[tile % BOXES].expect(blocks * PART);  // of the tile that has it next
    results[tile % RESULTS * WARP + lane()] = of(share * sum);
    __syncwarp();
    if (lane() == 0) ready[tile % RESULTS].arrive();
  }
  // By the other warps, later still: waits for it, or makes it of the head's own.
  template <class F>
  TBCM_D void wait(unsigned tile, const F& of) const {
    if (all()) return ready[tile % RESULTS].wait(tile / RESULTS);
    float* const place = own(tile) + lane();
    const float mine = of(none() ? 0.f : share * *place);
    *place = mine;
    __syncwarp();
  }
  // The two results of a row.
  TBCM_D float2 of_row(unsigned tile, int row) const {
    return reinterpret_cast<const float2*>(all() ? results + tile % RESULTS * WARP : own(tile))[row];
  }
  // The scalars of rows from the means: lane 2i has x^2 of row i and gets its r, lane 2i + 1 has x tx and gets its
  // d = r^2 m; 0 for rows that are not there.
  TBCM_D float scalar(float mean, int rows) const {
    const bool upper = lane() % 2;
    const float other = __shfl_xor_sync(~0u, mean, 1);
    const float r = none() ? 1.f : rsqrtf((upper ? other : mean) + norm.eps);
    return lane() / 2 >= rows ? 0.f : upper ? r * r * mean : r;
  }

 private:
  // A warp's own sums; without exchange they stay for four tiles, where the totals would be.
  TBCM_D float* own(unsigned tile) const { return left + (tile % (all() ? LEFT : 4) * WARPS + warp()) * WARP; }
  TBCM_D float* totals(unsigned tile) const { return left + (LEFT * WARPS + tile % BOXES * MAX_CLUSTER) * WARP; }
  static_assert(4 * WARPS <= NUMBERS && BOXES + LEFT + RESULTS <= 16);

  Mailbox *boxes, *collected, *ready;
  float *left, *results;
  Norm norm;
  int blocks, warps;
  float share;  // one over these columns
};

// The sum over the lanes of a group.
TBCM_D float over_four(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
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

// The sums of x^2, and of x tx if there is one, of the rows g and g + 8 of a tile, in the lane whose t is g / 2: the
// diagonals of products of rows.
struct Squares {
  float2 of[2];
};
template <class T, int TENSORS>
TBCM_D Squares squares_of(const Tile<T, TENSORS>& data, int x, int tx = -1) {
  using Words = uint32_t[4];
  const auto words = [&](Words& to, int tensor, int i) {
    const auto pack = data.eight(tensor, group() + 8 * i);
    std::memcpy(to, &pack, sizeof pack);
  };
  // Eight rows are one factor on the left: each row's even pairs of columns are above, its odd ones below.
  const auto dot = [](const Words& x, const Words& y) {
    float even[4] = {}, odd[4] = {};
    multiply<T>(even, x, {y[0], y[2]});
    multiply<T>(odd, x, {y[1], y[3]});
    return group() % 2 ? even[1] + odd[3] : even[0] + odd[2];
  };
  Squares squares;
  each<2>([&](int i) {
    Words row, moved = {};
    words(row, x, i);
    if (tx >= 0) words(moved, tx, i);
    squares.of[i] = {dot(row, row), tx >= 0 ? dot(row, moved) : 0.f};
  });
  return squares;
}
TBCM_D void leave(const Exchange& sums, unsigned tile, const Squares& squares) {
  if (member() == group() / 2) each<2>([&](int i) { *sums.two(tile, group() + 8 * i) = squares.of[i]; });
  sums.done(tile);
}

// Leaves a sum over the lanes of a group, of row g + 8i.
TBCM_D void leave_row(const Exchange& sums, unsigned tile, int i, float x) {
  x = over_four(x);
  if (member() == 0) *sums.two(tile, group() + 8 * i) = {x, 0.f};
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

// An argument of kernels with the maps of the tensors that they read.
template <class P, int N>
struct Mapped {
  P p;
  CUtensorMap maps[N];
};

// The mailboxes of a block: of a ring of tiles, and of one exchange or, where something is left for LATER, two.
template <class Tiles, int LATER = 0>
TBCM_D void begin(unsigned char* shared, const Norm& norm, const Job& job) {
  if (threadIdx.x == 0) {
    Tiles(shared).begin(warps_for(job.heads));
    Exchange(shared + Tiles::BYTES, 0, norm, job.heads).begin();
    if (LATER) Exchange(shared + Tiles::BYTES, 1, norm, job.heads).begin();
  }
  start_of_mail();
  cluster_sync();
}

// What the warps without a head do: the carrier's part of `walk`, below, for these tensors.
template <class Tiles, int LATER = 0, int N, class... Tensors>
TBCM_D void carry(unsigned char* shared, const Norm& norm, const Job& job, const CUtensorMap (&maps)[N],
                  const Tensors&... x) {
  give_registers<GIVEN>();
  if (warp() > WARPS) return;
  constexpr int STAGES = Tiles::STAGES, KEPT = LATER ? LATER + 1 : 1;
  const Work work(job);
  const Tiles ring(shared);
  const Exchange sums(shared + Tiles::BYTES, 0, norm, job.heads);
  const Exchange later(shared + Tiles::BYTES, LATER > 0, norm, job.heads);
  Reader ask(ring, work, maps, x...);
  const int tiles = work.tiles;
  for (int tile = 0; tile < STAGES && tile < tiles; ++tile) ask(tile);
  Place place = work.first;
  for (int tile = -1; tile < tiles + LATER; ++tile) {
    if (tile + 1 < tiles) sums.send(tile + 1);
    if (tile >= 0 && tile < tiles) {
      sums.publish(tile, [&](float mean) { return sums.scalar(mean, work.rows(place)); });
      work.next(place);
    }
    if (const int next = tile + STAGES - KEPT; next >= STAGES && next < tiles) ask(next);
    if (LATER && tile >= 2) later.publish(tile - 2, [](float mean) { return mean; });
    if (LATER && tile >= 1 && tile <= tiles) later.send(tile - 1);
  }
}

// Calls for each tile in turn `sum`, which is ahead, `use`, and `finish`, if there is one, LATER tiles later, when
// what `use` has left is there as well. What `sum` gives is left after `use`, so that neither waits for the other.
template <int LATER, class Tiles, class Sum, class Use, class Finish>
TBCM_D void walk(const Work& work, const Tiles& ring, const Exchange& sums, const Exchange& later, const Sum& sum,
                 const Use& use, const Finish& finish) {
  for (int tile = 0; tile < AHEAD && tile < work.tiles; ++tile) {
    ring.wait(tile);
    leave(sums, tile, sum(tile));
  }
  Place place = work.first, done = work.first;
  for (int tile = 0; tile < work.tiles + LATER; ++tile) {
    if (LATER && tile >= LATER) {
      later.wait(tile - LATER, [](float mean) { return mean; });
      finish(tile - LATER, done);
      ring.release(tile - LATER);
      work.next(done);
    }
    if (LATER && tile >= work.tiles) continue;
    const bool ahead = tile + AHEAD < work.tiles;
    sums.wait(tile, [&](float mean) { return sums.scalar(mean, work.rows(place)); });
    if (ahead) ring.wait(tile + AHEAD);
    const Squares squares = sum(tile + AHEAD);  // of an earlier tile if there is none
    use(tile, place);
    if (ahead) leave(sums, tile + AHEAD, squares);
    if (!LATER) ring.release(tile);
    work.next(place);
  }
}
template <class Tiles, class Sum, class Use>
TBCM_D void walk(const Work& work, const Tiles& ring, const Exchange& sums, const Sum& sum, const Use& use) {
  walk<0>(work, ring, sums, sums, sum, use, [](int, const Place&) {});
}

}  // namespace tbcm::linear_attention
