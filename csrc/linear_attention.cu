// CUDA kernels of linear_attention, relu with heads of 32: S, o, (gq and gS), (gk and gv), each a walk of clusters over
// tiles (linear_attention_tiles.h), and the sum of the parts of S.
//
// Factors of products are exact or sums of three numbers of bf16: relu(w r x) is r relu(+-x) |w| with r > 0, so
// relu(+-x) is exact, r goes with v and |w| with the state. Its tangent is r (phi' (+-tx) - d relu(+-x)) |w|, d = r^2 m.
//
// Floor: q, k, v and o move once, 4 B H N 32 numbers, with the tangent twice that. Three products of bf16 each:
// 3 * 4 B H N 32^2 FLOPs, with the tangent three times that.
#include "linear_attention_tiles.h"
#include "sums.h"

namespace tbcm::linear_attention {

// A state, of which a thread has the rows 4g, ..., 4g + 3 at columns 8t, ..., 8t + 7, and its last column in parts.
struct Total {
  float s[2][4][4] = {}, z[4] = {};

  // Writes it, its rows times |w|, to a part of the sum, and begins again. There each half of a thread's row lies beside
  // those of other threads, and the last column behind them: `place_of` finds them.
  TBCM_D void flush(const Parts& parts, int which, const Norm& norm, const Work& work, int batch) {
    const int64_t part = parts.part_of(batch, work.begin) * (parts.tstate ? 2 : 1) + which;
    float* const to = parts.scratch + part * parts.numbers() + (batch * parts.heads + work.head) * STATE;
    float size[4], last = 0.f;
    each<4>([&](int row) { size[row] = fabsf(weight(norm, work, 4 * group() + row)); });
    each<4>([&](int row) {
      const float one = size[row] * over_four(z[row]);
      if (row == member()) last = one;
      z[row] = 0.f;
      each<2>([&](int half) {
        Four<float> numbers;
        each<4>([&](int c) {
          float& sum = s[row / 2][c][row % 2 * 2 + half];
          numbers.values[c] = size[row] * sum;
          sum = 0.f;
        });
        if (work.there) reinterpret_cast<Four<float>*>(to)[(2 * row + half) * WARP + lane()] = numbers;
      });
    });
    if (work.there) to[WIDTH * WIDTH + lane()] = last;
  }
  // Row and first column of the i-th four numbers; of the last column's the first row.
  TBCM_D static int2 place_of(int i) {
    const int lane = i % WARP, half = i / WARP;
    if (half == 8) return {4 * lane, WIDTH};
    return {lane / 4 * 4 + half / 2, lane % 4 * 8 + half % 2 * 4};
  }
};

// Adds a tile to a state: relu(+-k)^T [f v, one], with f and `one` of the rows t, t + 4, t + 8, t + 12.
//
// With the tangent also phi'(+-tk)^T [f v, one] + relu(+-k)^T [f tv - d f v, -d one] to that of the state.
template <bool TANGENT, class T, int TENSORS>
TBCM_D void gather(const Tile<T, TENSORS>& data, const Signs<4>& signs, const float (&f)[4], const float (&one)[4],
                   const float (&d)[4], bool moving_k, bool moving_v, Total& total, Total& tangent) {
  enum { K, V, TK, TV };
  const int t = member();
  Left<PARTS<T>> y[2], ty[2];
  each<2>([&](int i) {  // rows t + 8i and t + 8i + 4, a pair in the sums
    const int low = 2 * i, high = 2 * i + 1;
    const auto row = [&](int tensor, int i) { return signs.turn(data.four(tensor, t + 4 * i)); };
    const auto k0 = row(K, low), k1 = row(K, high);
    Four<T> tk0, tk1;
    if (TANGENT) tk0 = row(TK, low), tk1 = row(TK, high);  // not used where it does not move
    each<4>([&](int c) {
      const float y0 = relu(widen(k0.values[c])), y1 = relu(widen(k1.values[c]));
      y[c / 2].put(2 * i + c % 2, y0, y1);
      total.z[c] += y0 * one[low];
      total.z[c] += y1 * one[high];
      if (moving_k) {
        const float ty0 = y0 > 0.f ? widen(tk0.values[c]) : 0.f, ty1 = y1 > 0.f ? widen(tk1.values[c]) : 0.f;
        ty[c / 2].put(2 * i + c % 2, ty0, ty1);
        tangent.z[c] += (ty0 - d[low] * y0) * one[low];
        tangent.z[c] += (ty1 - d[high] * y1) * one[high];
      }
    });
  });
  each<2>([&](int half) {
    Pack<T, 2> v[4], tv[4];
    each<4>([&](int i) {
      v[i] = data.template columns<2>(V, t + 4 * i, 4 * group() + 2 * half);
      if (TANGENT && moving_v) tv[i] = data.template columns<2>(TV, t + 4 * i, 4 * group() + 2 * half);
    });
    each<2>([&](int c) {
      const int j = 2 * half + c;
      Right fv, moved;
      each<2>([&](int i) {
        const int low = 2 * i, high = 2 * i + 1;
        const float v0 = f[low] * widen(v[low], c), v1 = f[high] * widen(v[high], c);
        fv.put(i, v0, v1);
        if (TANGENT) {
          const float tv0 = moving_v ? f[low] * widen(tv[low], c) : 0.f;
          const float tv1 = moving_v ? f[high] * widen(tv[high], c) : 0.f;
          moved.put(i, moving_k ? tv0 - d[low] * v0 : tv0, moving_k ? tv1 - d[high] * v1 : tv1);
        }
      });
      each<PRODUCTS<PARTS<T>>>([&](int part) {  // in turns, so that few wait for one before
        each<2>([&](int m) { multiply(part, total.s[m][j], y[m], fv); });
        if (moving_k) each<2>([&](int m) { multiply(part, tangent.s[m][j], ty[m], fv); });
        if (TANGENT) each<2>([&](int m) { multiply(part, tangent.s[m][j], y[m], moved); });
      });
    });
  });
}

template <class T, bool TANGENT, bool ALL>  // all: k and v move, not one alone
__global__ void __launch_bounds__(THREADS, 1)
    state_kernel(const __grid_constant__ Mapped<Forward<T>, TANGENT ? 4 : 2> given) {
#if !defined(TBCM_NO_CLUSTERS)
  TBCM_DYNAMIC_SHARED(shared);
  enum { K, V, TK, TV };
  using Tiles = Ring<T, TANGENT ? 4 : 2>;
  const Forward<T>& p = given.p;
  const Job job{p.keys.batch, p.keys.heads, p.keys.tokens, p.keys.span};
  begin<Tiles>(shared, p.k_norm, job);
  if (warp() >= WARPS) return carry<Tiles>(shared, p.k_norm, job, given.maps, p.k, p.v, p.tk, p.tv);
  take_registers<TAKEN>();
  const Work work(job);
  if (warp() >= work.warps) return;
  const Tiles ring(shared);
  const Exchange sums(shared + Tiles::BYTES, 0, p.k_norm, job.heads);
  const int g = group(), t = member();
  const Signs<4> signs(p.k_norm, work, 4 * g);
  const bool moving_k = TANGENT && (ALL || p.tk), moving_v = TANGENT && (ALL || p.tv);
  Total total, tangent;

  const auto sum = [&](int tile) { return squares_of(Tile(ring, tile), K, moving_k ? int(TK) : -1); };
  const auto use = [&](int tile, const Place& place) {
    float r[4], d[4];
    each<4>([&](int i) {
      const float2 scalars = sums.of_row(tile, t + 4 * i);
      r[i] = scalars.x, d[i] = scalars.y;
    });
    gather<TANGENT>(Tile(ring, tile), signs, r, r, d, moving_k, moving_v, total, tangent);
    if (tile + 1 < work.tiles && !work.last(place)) return;
    total.flush(p.keys, 0, p.k_norm, work, place.batch);
    if (TANGENT) tangent.flush(p.keys, 1, p.k_norm, work, place.batch);
  };
  walk(work, ring, sums, sum, use);
#endif
}

template <class P>
TBCM_HD int blocks_to_add(const P& p) {
  return (int(p.heads) * STATE / 4 + 8 * WARP - 1) / (8 * WARP);
}

// The sums of the parts of states, and of their tangents, four numbers a thread.
template <class P>
__global__ void __launch_bounds__(8 * WARP) add_kernel(const P p) {
  const int blocks = blocks_to_add(p), state = blockIdx.x / blocks;  // blocks of a sample's state, or of its tangent
  const int which = p.tstate ? state % 2 : 0, batch = p.tstate ? state / 2 : state;
  const int i = blockIdx.x % blocks * (8 * WARP) + int(threadIdx.x), head = i / (STATE / 4);
  if (head >= p.heads) return;
  const int64_t step = p.numbers() * (p.tstate ? 2 : 1), before = batch * p.heads * STATE;
  const float* const from = p.scratch + which * p.numbers() + before;
  const int parts = int(p.of_sample(batch));
  Four<float> sum{};
  for (int part = 0; part < parts; part += 4) {  // whose loads do not wait for one another
    Four<float> x[4]{};
    each<4>([&](int k) {
      if (part + k < parts) x[k] = reinterpret_cast<const Four<float>*>(from + (part + k) * step)[i];
    });
    each<16>([&](int n) { sum.values[n % 4] += x[n / 4].values[n % 4]; });
  }
  const int2 place = Total::place_of(i % (STATE / 4));
  float* const to = (which ? p.tstate : p.state) + before + head * STATE + place.x * COLUMNS + place.y;
  each<4>([&](int c) { to[place.y == WIDTH ? c * COLUMNS : c] = sum.values[c]; });
}

// A state as a factor on the right, and its last column at rows 8t, ..., 8t + 7.
struct Factor {
  Right s[2][4];
  float z[8];
  // Its rows, times |w|, are summed over.
  TBCM_D void rows(const float* state, const float (&w)[8]) {
    const int first = 8 * member();
    each<8>([&](int i) { z[i] = fabsf(w[i]) * state[(first + i) * COLUMNS + WIDTH]; });
    read([&](int i, int j) { return fabsf(w[i]) * state[(first + i) * COLUMNS + column(j)]; });
  }
  // Its columns are.
  TBCM_D void columns(const float* state) {
    const int first = 8 * member();
    each<8>([&](int i) { z[i] = state[(first + i) * COLUMNS + WIDTH]; });
    read([&](int i, int j) { return state[column(j) * COLUMNS + first + i]; });
  }

 private:
  TBCM_D static int column(int j) { return group() / 2 * 8 + 2 * j + group() % 2; }
  template <class F>
  TBCM_D void read(const F& at) {
    each<2>([&](int k) {
      each<4>([&](int j) {
        each<2>([&](int i) { s[k][j].put(i, at(4 * k + 2 * i, j), at(4 * k + 2 * i + 1, j)); });
      });
    });
  }
};

// One that waits in shared memory.
struct Stored : Pairs<2 * 4 * 3 + 4> {
  using Pairs::Pairs;
  TBCM_D void put(const Factor& factor) const {
    each<24>([&](int i) { Pairs::put(i, factor.s[i / 12][i / 3 % 4].parts[i % 3]); });
    each<4>([&](int i) { Pairs::put(24 + i, factor.z + 2 * i); });
  }
  TBCM_D Right s(int k, int j) const {
    Right right;
    each<3>([&](int i) { get(12 * k + 3 * j + i, right.parts[i]); });
    return right;
  }
  TBCM_D float2 z(int pair) const {
    float2 z;
    get(24 + pair, &z);
    return z;
  }
};

template <class T, bool TANGENT, bool ALL>  // all: q and the state move
__global__ void __launch_bounds__(THREADS, 1)
    output_kernel(const __grid_constant__ Mapped<Forward<T>, TANGENT ? 2 : 1> given) {
#if !defined(TBCM_NO_CLUSTERS)
  TBCM_DYNAMIC_SHARED(shared);
  enum { Q, TQ };
  using Tiles = Ring<T, TANGENT ? 2 : 1>;
  const Forward<T>& p = given.p;
  const Job job{p.keys.batch, p.keys.heads, p.queries, p.query_span};
  begin<Tiles>(shared, p.q_norm, job);
  if (warp() >= WARPS) return carry<Tiles>(shared, p.q_norm, job, given.maps, p.q, p.tq);
  take_registers<TAKEN>();
  const Work work(job);
  if (warp() >= work.warps) return;
  const Tiles ring(shared);
  const Exchange sums(shared + Tiles::BYTES, 0, p.q_norm, job.heads);
  const Stored tangent(shared + Tiles::BYTES + Exchange::BYTES);
  const int g = group(), t = member();
  const Signs<8> signs(p.q_norm, work, 8 * t);
  const bool moving_q = TANGENT && (ALL || p.tq), moving_s = TANGENT && (ALL || p.keys.tstate);
  Factor state;
  int batch = -1;
  T *o = nullptr, *to = nullptr;

  const auto sum = [&](int tile) { return squares_of(Tile(ring, tile), Q, moving_q ? int(TQ) : -1); };
  const auto use = [&](int tile, const Place& place) {
    const Tile data(ring, tile);
    if (place.batch != batch) {
      batch = place.batch;
      const int64_t index = (batch * p.keys.heads + work.head) * STATE;
      float w[8];
      each<8>([&](int i) { w[i] = weight(p.q_norm, work, 8 * t + i); });
      if (moving_s) {
        state.rows(p.keys.tstate + index, w);
        tangent.put(state);
      }
      state.rows(p.keys.state + index, w);
      o = row_of(p.o, work, batch), to = row_of(p.to, work, batch);
    }
    Left<PARTS<T>> y[2], ty[2];
    float r[2], inverse[2], drift[2];
    each<2>([&](int i) {
      const float2 scalars = sums.of_row(tile, g + 8 * i);
      r[i] = scalars.x;
      const auto qs = signs.turn(data.eight(Q, g + 8 * i));
      Eight<T> tqs;
      if (TANGENT) tqs = signs.turn(data.eight(TQ, g + 8 * i));
      float n = 0.f, tn = 0.f;
      each<4>([&](int pair) {
        float both[2], tboth[2] = {};
        float2 tz = {};
        if (moving_s) tz = tangent.z(pair);
        each<2>([&](int half) {
          const int j = 2 * pair + half;
          both[half] = relu(widen(qs.values[j]));
          n += both[half] * state.z[j];
          if (moving_q) {
            tboth[half] = both[half] > 0.f ? widen(tqs.values[j]) : 0.f;
            tn += tboth[half] * state.z[j];
          }
          if (moving_s) tn += both[half] * (half ? tz.y : tz.x);
        });
        y[pair / 2].put(pair % 2 * 2 + i, both[0], both[1]);
        if (moving_q) ty[pair / 2].put(pair % 2 * 2 + i, tboth[0], tboth[1]);
      });
      inverse[i] = quick_reciprocal(r[i] * over_four(n) + p.eps);
      if (TANGENT) drift[i] = r[i] * over_four(tn) + (moving_q ? scalars.y * p.eps : 0.f);
    });
    uint32_t value[2][4], moved[2][4];
    each<2>([&](int half) {  // two columns of the state at once: their products do not wait for one another
      float n[2][4] = {}, tn[2][4] = {};
      each<2>([&](int k) {
        each<PRODUCTS<PARTS<T>>>([&](int part) {
          each<2>([&](int j) { multiply(part, n[j], y[k], state.s[k][2 * half + j]); });
          if (moving_q) each<2>([&](int j) { multiply(part, tn[j], ty[k], state.s[k][2 * half + j]); });
        });
        if (moving_s) {
          const Right moving[2] = {tangent.s(k, 2 * half), tangent.s(k, 2 * half + 1)};
          each<PRODUCTS<PARTS<T>>>([&](int part) { each<2>([&](int j) { multiply(part, tn[j], y[k], moving[j]); }); });
        }
      });
      each<4>([&](int c) {
        const int j = c / 2, i = c % 2;
        float x[2], tx[2];
        each<2>([&](int k) {
          x[k] = n[j][2 * i + k] * (r[i] * inverse[i]);
          if (TANGENT) tx[k] = (r[i] * tn[j][2 * i + k] - x[k] * drift[i]) * inverse[i];
        });
        value[i][2 * half + j] = narrow_both<T>(x[0], x[1]);
        if (TANGENT) moved[i][2 * half + j] = narrow_both<T>(tx[0], tx[1]);
      });
    });
    each<2>([&](int i) {
      if (!work.has(place, i)) return;
      put(o + (place.token + 8 * i) * p.o.token, value[i]);
      if (TANGENT) put(to + (place.token + 8 * i) * p.to.token, moved[i]);
    });
  };
  walk(work, ring, sums, sum, use);
#endif
}

// Weights of the columns 8t, ..., 8t + 7 and the sums of their gradients over the rows g, g + 8.
struct Weights {
  float w[8], grad[8] = {};
  TBCM_D explicit Weights(const Kept& kept) {
    kept.get(2, 0, w);
    kept.get(2, 1, grad);
  }
  TBCM_D void keep(const Kept& kept) const {
    kept.put(2, 0, w);
    kept.put(2, 1, grad);
  }
  TBCM_D Weights(const Norm& norm, const Work& work) {
    each<8>([&](int i) { w[i] = weight(norm, work, 8 * member() + i); });
  }
  // relu(+- x) of column i, and whether phi' is 1 there.
  TBCM_D float y(int i, float x) const { return relu(float_of(bits_of(x) ^ (bits_of(w[i]) & 0x80000000u))); }
  TBCM_D bool rises(int i, float y) const { return y > 0.f && w[i] != 0.f; }
  // Writes the sums to the cluster's place, [clusters, H, 32].
  TBCM_D void flush(float* parts, const Work& work, int heads) {
    if (!parts) return;
    each<8>([&](int i) {
      each<3>([&](int k) { grad[i] += __shfl_xor_sync(~0u, grad[i], 4 << k); });
    });
    float* to = parts + (int64_t(blockIdx.x / blocks_for(heads)) * heads + work.head) * WIDTH + 8 * member();
    if (work.there && group() == 0) each<8>([&](int i) { to[i] = grad[i]; });
  }
};

// The gradient of a row of x through its norm, from that of w x r without r, h: r (h - x r^2 mean(x h)).
template <class T>
TBCM_D void store_gradient(T* to, const Eight<T>& x, const float (&h)[8], float r, float mean) {
  uint32_t gradient[4];
  const auto at = [&](int i) { return r * (h[i] - widen(x.values[i]) * (r * r * mean)); };
  each<4>([&](int i) { gradient[i] = narrow_both<T>(at(2 * i), at(2 * i + 1)); });
  put(to, gradient);
}

// Two rows, g and g + 8, as a factor on the left, whose columns are summed over.
template <class T>
TBCM_D void put_row(Left<PARTS<T>> (&left)[2], int i, const float (&row)[8]) {
  each<4>([&](int pair) { left[pair / 2].put(pair % 2 * 2 + i, row[2 * pair], row[2 * pair + 1]); });
}

// The product of two rows, as a factor on the left, with one on the right, of which a thread gets the columns 8t, ...
template <class T>
TBCM_D void multiply_rows(const Left<PARTS<T>> (&rows)[2], const Factor& factor, float (&product)[2][8]) {
  float c[4][4] = {};
  each<2>([&](int k) {
    each<PRODUCTS<PARTS<T>>>([&](int part) {
      each<4>([&](int j) { multiply(part, c[j], rows[k], factor.s[k][j]); });
    });
  });
  each<16>([&](int n) { product[n % 4 / 2][n / 4 * 2 + n % 2] = c[n / 4][n % 4]; });
}
// The rows g and g + 8 of a tensor's tile as such a factor: they are exact.
template <class T, int TENSORS>
TBCM_D void put_rows(Left<PARTS<T>> (&left)[2], const Tile<T, TENSORS>& data, int tensor) {
  each<2>([&](int i) {
    const auto row = data.eight(tensor, group() + 8 * i);
    if constexpr (PARTS<T> == 1) {
      uint32_t words[4];
      std::memcpy(words, &row, sizeof words);
      each<4>([&](int pair) { left[pair / 2].parts[0][pair % 2 * 2 + i] = words[pair]; });
    } else {
      float x[8];
      each<8>([&](int j) { x[j] = widen(row.values[j]); });
      put_row<T>(left, i, x);
    }
  });
}

// With n the normaliser and P = g S_v^T: the gradient of phi(q) is (P - (g.o) z) / n, that of S is
// phi(q)^T [g, -g.o] / n, and n_v.g = phi(q).P gives g.o.
template <class T>
__global__ void __launch_bounds__(THREADS, 1) queries_kernel(const __grid_constant__ Mapped<Backward<T>, 2> given) {
#if !defined(TBCM_NO_CLUSTERS)
  TBCM_DYNAMIC_SHARED(shared);
  enum { Q, G };
  constexpr int LATER = 2;
  using Tiles = Ring<T, 2>;
  const Backward<T>& p = given.p;
  const Job job{p.queries.batch, p.queries.heads, p.queries.tokens, p.queries.span};
  begin<Tiles, LATER>(shared, p.q_norm, job);
  if (warp() >= WARPS) return carry<Tiles, LATER>(shared, p.q_norm, job, given.maps, p.q, p.go);
  take_registers<TAKEN>();
  const Work work(job);
  if (warp() >= work.warps) return;
  const Tiles ring(shared);
  const Exchange sums(shared + Tiles::BYTES, 0, p.q_norm, job.heads), later(shared + Tiles::BYTES, 1, p.q_norm, job.heads);
  const Kept kept(shared + Tiles::BYTES + 2 * Exchange::BYTES);
  const int g = group(), t = member();
  Weights(p.q_norm, work).keep(kept);
  Total total, none;
  Factor state;
  int batch = -1;

  const auto sum = [&](int tile) { return squares_of(Tile(ring, tile), Q); };
  const auto use = [&](int tile, const Place& place) {
    const Tile data(ring, tile);
    if (place.batch != batch) {
      batch = place.batch;
      state.columns(p.state + (int64_t(batch) * job.heads + work.head) * STATE);
    }
    float h[2][8];
    Left<PARTS<T>> gs[2];
    put_rows(gs, data, G);
    multiply_rows<T>(gs, state, h);
    float f[2], one[2];
    Weights weights(kept);
    each<2>([&](int i) {
      const auto row = data.eight(Q, g + 8 * i);
      const float r = sums.of_row(tile, g + 8 * i).x;
      float n = 0.f, product = 0.f;
      each<8>([&](int j) {
        const float y = fabsf(weights.w[j]) * weights.y(j, widen(row.values[j]));
        n += y * state.z[j];
        product += y * h[i][j];
      });
      const float inverse = quick_reciprocal(r * over_four(n) + p.eps);
      f[i] = g + 8 * i < work.rows(place) ? r * inverse : 0.f;
      const float go_o = f[i] * over_four(product);
      one[i] = -go_o * f[i];
      float mixed = 0.f;
      each<8>([&](int j) {
        const float x = widen(row.values[j]);
        const float u = weights.rises(j, weights.y(j, x)) ? (h[i][j] - go_o * state.z[j]) * inverse : 0.f;
        weights.grad[j] += u * x * r;
        h[i][j] = weights.w[j] * u;
        mixed += x * h[i][j];
      });
      leave_row(later, tile, i, mixed);
      kept.put(tile % LATER, i, h[i]);
    });
    later.done(tile);
    weights.keep(kept);
    float fs[4], ones[4];
    each<4>([&](int i) {  // of row t + 4i, which lanes of its group have
      const int from = (t + 4 * i) % 8 * 4;
      fs[i] = __shfl_sync(~0u, f[i / 2], from);
      ones[i] = __shfl_sync(~0u, one[i / 2], from);
    });
    const float zeros[4] = {};
    const Signs<4> signs(p.q_norm, work, 4 * g);  // again for each tile: there is no register for them
    gather<false>(data, signs, fs, ones, zeros, false, false, total, none);
    if (tile + 1 == work.tiles || work.last(place)) total.flush(p.queries, 0, p.q_norm, work, batch);
  };
  const auto finish = [&](int tile, const Place& place) {
    const Tile data(ring, tile);
    T* const to = row_of(p.gq, work, place.batch) + place.token * p.gq.token;
    each<2>([&](int i) {
      const float r = sums.of_row(tile, g + 8 * i).x, mean = later.of_row(tile, g + 8 * i).x;
      float h[8];
      kept.get(tile % LATER, i, h);
      if (work.has(place, i)) store_gradient(to + 8 * i * p.gq.token, data.eight(Q, g + 8 * i), h, r, mean);
    });
  };
  walk<LATER>(work, ring, sums, later, sum, use, finish);
  Weights(kept).flush(p.q_weight.of[0].parts, work, job.heads);
#endif
}

// gv = phi(k) gS_v; the gradient of phi(k) is G = v gS_v^T + gz, and as phi(k).G = v.gv + phi(k).gz, the sum of x h over
// a row is known before G is.
template <class T>
__global__ void __launch_bounds__(THREADS, 1) keys_kernel(const __grid_constant__ Mapped<Backward<T>, 2> given) {
#if !defined(TBCM_NO_CLUSTERS)
  TBCM_DYNAMIC_SHARED(shared);
  enum { K, V };
  constexpr int LATER = 2;
  using Tiles = Ring<T, 2>;
  const Backward<T>& p = given.p;
  const Job job{p.queries.batch, p.queries.heads, p.keys, p.key_span};
  begin<Tiles, LATER>(shared, p.k_norm, job);
  if (warp() >= WARPS) return carry<Tiles, LATER>(shared, p.k_norm, job, given.maps, p.k, p.v);
  take_registers<TAKEN>();
  const Work work(job);
  if (warp() >= work.warps) return;
  const Tiles ring(shared);
  const Exchange sums(shared + Tiles::BYTES, 0, p.k_norm, job.heads), later(shared + Tiles::BYTES, 1, p.k_norm, job.heads);
  const Stored rows(shared + Tiles::BYTES + 2 * Exchange::BYTES);
  const int g = group();
  Weights weights(p.k_norm, work);
  Factor columns;
  int batch = -1, done = -1;

  const auto sum = [&](int tile) { return squares_of(Tile(ring, tile), K); };
  const auto use = [&](int tile, const Place& place) {
    const Tile data(ring, tile);
    if (place.batch != batch) {
      batch = place.batch;
      Factor factor;
      factor.rows(p.queries.state + (int64_t(batch) * job.heads + work.head) * STATE, weights.w);
      rows.put(factor);
    }
    Left<PARTS<T>> ys[2];
    float mixed[2] = {};
    each<2>([&](int i) {
      const auto row = data.eight(K, g + 8 * i);
      float y[8];
      each<8>([&](int j) { y[j] = weights.y(j, widen(row.values[j])); });
      each<4>([&](int pair) {
        const float2 z = rows.z(pair);
        mixed[i] += y[2 * pair] * z.x + y[2 * pair + 1] * z.y;
      });
      put_row<T>(ys, i, y);
    });
    float c[4][4] = {};
    each<2>([&](int k) {
      const Right factor[4] = {rows.s(k, 0), rows.s(k, 1), rows.s(k, 2), rows.s(k, 3)};
      each<PRODUCTS<PARTS<T>>>([&](int part) { each<4>([&](int j) { multiply(part, c[j], ys[k], factor[j]); }); });
    });
    T* const to = row_of(p.gv, work, batch) + place.token * p.gv.token;
    each<2>([&](int i) {
      const auto v = data.eight(V, g + 8 * i);
      const float r = sums.of_row(tile, g + 8 * i).x;
      uint32_t gradient[4];
      each<4>([&](int n) {
        const float low = c[n][2 * i], high = c[n][2 * i + 1];
        mixed[i] += widen(v.values[2 * n]) * low;
        mixed[i] += widen(v.values[2 * n + 1]) * high;
        gradient[n] = narrow_both<T>(r * low, r * high);
      });
      leave_row(later, tile, i, mixed[i]);
      if (work.has(place, i)) put(to + 8 * i * p.gv.token, gradient);
    });
    later.done(tile);
  };
  const auto finish = [&](int tile, const Place& place) {
    const Tile data(ring, tile);
    if (place.batch != done) {
      done = place.batch;
      columns.columns(p.queries.state + (int64_t(done) * job.heads + work.head) * STATE);
    }
    float h[2][8];
    Left<PARTS<T>> vs[2];
    put_rows(vs, data, V);
    multiply_rows<T>(vs, columns, h);
    T* const to = row_of(p.gk, work, done) + place.token * p.gk.token;
    each<2>([&](int i) {
      const float r = sums.of_row(tile, g + 8 * i).x, mean = later.of_row(tile, g + 8 * i).x;
      if (!work.has(place, i)) return;
      const auto row = data.eight(K, g + 8 * i);
      each<8>([&](int j) {
        const float x = widen(row.values[j]);
        const float u = weights.rises(j, weights.y(j, x)) ? h[i][j] + columns.z[j] : 0.f;
        weights.grad[j] += u * x * r;
        h[i][j] = weights.w[j] * u;
      });
      store_gradient(to + 8 * i * p.gk.token, row, h[i], r, mean);
    });
  };
  walk<LATER>(work, ring, sums, later, sum, use, finish);
  weights.flush(p.k_weight.of[0].parts, work, job.heads);
#endif
}

template <class T>
constexpr int state_shared(bool tangent) {
  return (tangent ? Ring<T, 4>::BYTES : Ring<T, 2>::BYTES) + Exchange::BYTES;
}
template <class T>
constexpr int output_shared(bool tangent) {
  return (tangent ? Ring<T, 2>::BYTES + Stored::BYTES : Ring<T, 1>::BYTES) + Exchange::BYTES;
}

template <class T>
constexpr int queries_shared() {
  return Ring<T, 2>::BYTES + 2 * Exchange::BYTES + Kept::BYTES;
}
template <class T>
constexpr int keys_shared() {
  return Ring<T, 2>::BYTES + 2 * Exchange::BYTES + Stored::BYTES;
}

constexpr int MOST_SHARED = 222 << 10;  // CUDA_SHARED in functional.py
template <class T>
constexpr bool FITS = state_shared<T>(true) <= MOST_SHARED && output_shared<T>(true) <= MOST_SHARED &&
                      queries_shared<T>() <= MOST_SHARED && keys_shared<T>() <= MOST_SHARED;
static_assert(FITS<bfloat16> && FITS<float16>);

// The tiles of a cluster, so that all clusters are at work at once.
template <auto KERNEL>
const char* divide(int64_t batch, int64_t heads, int64_t tokens, int shared, int64_t* span) {
  if (batch * heads == 0) return nullptr;
  if (heads > MAX_CLUSTER * WARPS) return "linear_attention has a warp for each of up to 96 heads";
  if (tokens > INT32_MAX || batch * (tokens / TOKENS + 1) > INT32_MAX) return "linear_attention has too many tokens";
  int clusters = 0;
  if (const char* fault = hold<KERNEL>(blocks_for(int(heads)), THREADS / WARP, shared, &clusters)) return fault;
  *span = (batch * tiles_of(tokens) + clusters - 1) / clusters;
  return nullptr;
}

inline int64_t clusters_for(int64_t batch, int64_t tokens, int64_t span) {
  return span ? (batch * tiles_of(tokens) + span - 1) / span : 0;
}

// Starts clusters on tiles of tensors of so many tokens.
template <class P, int N, class... Tensors>
const char* start_tiles(void (*kernel)(Mapped<P, N>), const P& p, const Parts& shape, int64_t tokens, int64_t span,
                        int shared, void* stream, const Tensors&... tensors) {
  static_assert(sizeof...(tensors) == N);
  const int64_t clusters = clusters_for(shape.batch, tokens, span);
  if (clusters == 0) return nullptr;
  Mapped<P, N> given{p, {}};
  const char* fault = nullptr;
  int i = 0;
  const auto describe_one = [&](const auto& x) {
    CUtensorMap* const map = &given.maps[i++];
    if (x && !fault) fault = describe(map, x, shape.batch, shape.heads, tokens, warps_for(int(shape.heads)));
  };
  (describe_one(tensors), ...);
  if (fault) return fault;
  return start_clusters(kernel, clusters, blocks_for(int(shape.heads)), THREADS, shared, given, stream);
}

inline const char* start_adding(const Parts& parts, void* stream) {
  if (parts.numbers() == 0) return nullptr;
  return start(add_kernel<Parts>, parts.batch * (parts.tstate ? 2 : 1) * blocks_to_add(parts), 8 * WARP, parts, stream);
}

// f of two constants: whether there is a tangent, and whether all that it needs moves.
template <class F>
const char* choose(bool tangent, bool all, const F& f) {
  const std::true_type yes;
  const std::false_type no;
  return !tangent ? f(no, no) : all ? f(yes, yes) : f(yes, no);
}

template <class T>
const char* divide(Forward<T>* p) {
  Parts& keys = p->keys;
  const char* fault = choose(keys.tstate, p->tk && p->tv, [&](auto tangent, auto all) {
    return divide<state_kernel<T, tangent, all>>(keys.batch, keys.heads, keys.tokens, state_shared<T>(tangent), &keys.span);
  });
  return fault ? fault : choose(bool(p->to), p->tq && keys.tstate, [&](auto tangent, auto all) {
    return divide<output_kernel<T, tangent, all>>(keys.batch, keys.heads, p->queries, output_shared<T>(tangent),
                                                  &p->query_span);
  });
}

template <class T>
const char* launch(const Forward<T>& p, void* stream) {
  const Parts& keys = p.keys;
  const char* fault = choose(keys.tstate, p.tk && p.tv, [&](auto tangent, auto all) {
    const auto start = [&](const auto&... tensors) {
      return start_tiles(state_kernel<T, tangent, all>, p, keys, keys.tokens, keys.span, state_shared<T>(tangent), stream,
                         tensors...);
    };
    if constexpr (tangent) return start(p.k, p.v, p.tk, p.tv);
    else return start(p.k, p.v);
  });
  if (!fault) fault = start_adding(keys, stream);
  return fault ? fault : choose(bool(p.to), p.tq && keys.tstate, [&](auto tangent, auto all) {
    const auto start = [&](const auto&... tensors) {
      return start_tiles(output_kernel<T, tangent, all>, p, keys, p.queries, p.query_span, output_shared<T>(tangent),
                         stream, tensors...);
    };
    if constexpr (tangent) return start(p.q, p.tq);
    else return start(p.q);
  });
}

template <class T>
const char* divide(Backward<T>* p) {
  Parts& queries = p->queries;
  const char* fault =
      divide<queries_kernel<T>>(queries.batch, queries.heads, queries.tokens, queries_shared<T>(), &queries.span);
  if (fault) return fault;
  fault = divide<keys_kernel<T>>(queries.batch, queries.heads, p->keys, keys_shared<T>(), &p->key_span);
  p->q_weight.count = clusters_for(queries.batch, queries.tokens, queries.span);
  p->k_weight.count = clusters_for(queries.batch, p->keys, p->key_span);
  return fault;
}

// The parts of a norm over each head alone are [clusters * H, 32], and of one over all heads [clusters, H * 32].
inline const char* start_adding(Sums sums, const Norm& norm, int64_t heads, void* stream) {
  if (!sums.of[0].sum) return nullptr;
  const bool all = norm.scope == Scope::all;
  sums.batch = 1;
  sums.count *= all ? 1 : heads;
  sums.of[0].width = all ? heads * WIDTH : WIDTH;
  return start(sums, stream);
}

template <class T>
const char* launch(const Backward<T>& p, void* stream) {
  const Parts& queries = p.queries;
  const char* fault = start_tiles(queries_kernel<T>, p, queries, queries.tokens, queries.span, queries_shared<T>(),
                                  stream, p.q, p.go);
  if (!fault) fault = start_adding(queries, stream);
  if (!fault) fault = start_tiles(keys_kernel<T>, p, queries, p.keys, p.key_span, keys_shared<T>(), stream, p.k, p.v);
  if (!fault) fault = start_adding(p.q_weight, p.q_norm, queries.heads, stream);
  return fault ? fault : start_adding(p.k_weight, p.k_norm, queries.heads, stream);
}

#define TBCM_INSTANCES_OF_heads(T)                      \
  template const char* divide(Forward<T>*);             \
  template const char* divide(Backward<T>*);            \
  template const char* launch(const Forward<T>&, void*); \
  template const char* launch(const Backward<T>&, void*);
TBCM_INSTANCES_OF_heads(bfloat16)
TBCM_INSTANCES_OF_heads(float16)

}  // namespace tbcm::linear_attention
