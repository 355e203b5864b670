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

  // Writes it, its rows times |w|, to a part of the sum, and begins again.
  TBCM_D void flush(const Parts& parts, int which, const Norm& norm, const Work& work, int batch) {
    const int first = 4 * group(), t = member();
    const int64_t part = parts.part_of(batch, work.begin) * (parts.tstate ? 2 : 1) + which;
    float* to = parts.scratch + part * parts.numbers() + (batch * parts.heads + work.head) * STATE + first * COLUMNS;
    each<4>([&](int row) {
      const float one = over_four(z[row]), size = fabsf(weight(norm, work, first + row));
      each<8>([&](int c) {
        float& sum = s[row / 2][c % 4][row % 2 * 2 + c / 4];
        if (work.there) to[row * COLUMNS + 8 * t + c] = size * sum;
        sum = 0.f;
      });
      if (work.there && t == 0) to[row * COLUMNS + WIDTH] = size * one;
      z[row] = 0.f;
    });
  }
};

// Adds a tile to a state: relu(+-k)^T [f v, one], with f and `one` of the rows t, t + 4, t + 8, t + 12.
//
// With the tangent also phi'(+-tk)^T [f v, one] + relu(+-k)^T [f tv - d f v, -d one] to that of the state.
template <bool TANGENT, class T, int TENSORS>
TBCM_D void gather(const Ring<T, TENSORS>& ring, int tile, const Signs<4>& signs, const float (&f)[4],
                   const float (&one)[4], const float (&d)[4], bool moving_k, bool moving_v, Total& total,
                   Total& tangent) {
  enum { K, V, TK, TV };
  const int t = member();
  Left<PARTS<T>> y[2], ty[2];
  each<2>([&](int i) {  // rows t + 8i and t + 8i + 4, a pair in the sums
    const int low = 2 * i, high = 2 * i + 1;
    const auto row = [&](int tensor, int i) { return signs.turn(ring.four(tile, tensor, t + 4 * i)); };
    const auto k0 = row(K, low), k1 = row(K, high);
    Four<T> tk0, tk1;
    if (TANGENT) tk0 = row(TK, low), tk1 = row(TK, high);  // not used where it does not move
    each<4>([&](int j) {
      const float y0 = relu(widen(k0.values[j])), y1 = relu(widen(k1.values[j]));
      y[j / 2].put(2 * i + j % 2, y0, y1);
      total.z[j] += y0 * one[low] + y1 * one[high];
      if (moving_k) {
        const float ty0 = y0 > 0.f ? widen(tk0.values[j]) : 0.f, ty1 = y1 > 0.f ? widen(tk1.values[j]) : 0.f;
        ty[j / 2].put(2 * i + j % 2, ty0, ty1);
        tangent.z[j] += (ty0 - d[low] * y0) * one[low] + (ty1 - d[high] * y1) * one[high];
      }
    });
  });
  each<2>([&](int half) {
    Pack<T, 2> v[4], tv[4];
    each<4>([&](int i) {
      v[i] = ring.template columns<2>(tile, V, t + 4 * i, 4 * group() + 2 * half);
      if (moving_v) tv[i] = ring.template columns<2>(tile, TV, t + 4 * i, 4 * group() + 2 * half);
    });
    each<2>([&](int k) {
      const int j = 2 * half + k;
      Right fv, moved;
      each<2>([&](int i) {
        const int low = 2 * i, high = 2 * i + 1;
        const float v0 = f[low] * widen(v[low], k), v1 = f[high] * widen(v[high], k);
        fv.put(i, v0, v1);
        if (TANGENT) {
          const float tv0 = moving_v ? f[low] * widen(tv[low], k) : 0.f;
          const float tv1 = moving_v ? f[high] * widen(tv[high], k) : 0.f;
          moved.put(i, moving_k ? tv0 - d[low] * v0 : tv0, moving_k ? tv1 - d[high] * v1 : tv1);
        }
      });
      each<2>([&](int m) {
        multiply(total.s[m][j], y[m], fv);
        if (moving_k) multiply(tangent.s[m][j], ty[m], fv);
        if (TANGENT) multiply(tangent.s[m][j], y[m], moved);
      });
    });
  });
}

template <class T, bool TANGENT>
__global__ void __launch_bounds__(THREADS, 1) state_kernel(const Forward<T> p) {
#if !defined(TBCM_NO_CLUSTERS)
  TBCM_DYNAMIC_SHARED(shared);
  enum { K, V, TK, TV };
  using Tiles = Ring<T, TANGENT ? 4 : 2>;
  const Tiles ring(shared);
  const Exchange sums(shared + Tiles::BYTES, 0, p.k_norm, p.keys.heads);
  cluster_sync();
  const Work work(p.keys.batch, p.keys.heads, p.keys.tokens, p.keys.span);
  const int g = group(), t = member();
  const Signs<4> signs(p.k_norm, work, 4 * g);
  const bool moving_k = TANGENT && p.tk, moving_v = TANGENT && p.tv;
  Total total, tangent;

  auto ask = [&] {
    if constexpr (TANGENT) return Reader(ring, work, p.k, p.v, p.tk, p.tv);
    else return Reader(ring, work, p.k, p.v);
  }();
  const auto sum = [&](int tile) { leave_squares(ring, tile, K, sums, moving_k ? int(TK) : -1); };
  const auto use = [&](int tile, const Place& place, float scalar) {
    float r[4], d[4];
    each<4>([&](int i) {
      r[i] = __shfl_sync(~0u, scalar, 2 * (t + 4 * i));
      d[i] = TANGENT ? __shfl_sync(~0u, scalar, 2 * (t + 4 * i) + 1) : 0.f;
    });
    gather<TANGENT>(ring, tile, signs, r, r, d, moving_k, moving_v, total, tangent);
    if (tile + 1 < work.tiles && !work.last(place)) return;
    total.flush(p.keys, 0, p.k_norm, work, place.batch);
    if (TANGENT) tangent.flush(p.keys, 1, p.k_norm, work, place.batch);
  };
  walk<Tiles::STAGES>(work, sums, ask, sum, use);
#endif
}

// The sums of the parts of states, and of their tangents.
template <class P>
__global__ void __launch_bounds__(8 * WARP) add_kernel(const P p) {
  const int64_t size = p.numbers(), both = p.tstate ? 2 * size : size;
  const int64_t i = int64_t(blockIdx.x) * (8 * WARP) + threadIdx.x;
  if (i >= both) return;
  const int64_t parts = p.of_sample(i % size / (p.heads * STATE));
  float sum = 0.f;
#pragma unroll 8
  for (int64_t part = 0; part < parts; ++part) sum += p.scratch[part * both + i];
  (i < size ? p.state + i : p.tstate + (i - size))[0] = sum;
}

// A state as a factor on the right, and its last column at rows 8t, ..., 8t + 7.
struct Factor {
  Right s[2][4];
  float z[8];
  // Its rows, times |w|, are summed over.
  TBCM_D void rows(const float* state, const Norm& norm, const Work& work) {
    const int first = 8 * member();
    float sizes[8];
    each<8>([&](int i) { sizes[i] = fabsf(weight(norm, work, first + i)); });
    read([&](int i, int j) { return sizes[i] * state[(first + i) * COLUMNS + column(j)]; });
    each<8>([&](int i) { z[i] = sizes[i] * state[(first + i) * COLUMNS + WIDTH]; });
  }
  // Its columns are.
  TBCM_D void columns(const float* state) {
    const int first = 8 * member();
    read([&](int i, int j) { return state[column(j) * COLUMNS + first + i]; });
    each<8>([&](int i) { z[i] = state[(first + i) * COLUMNS + WIDTH]; });
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

template <class T, bool TANGENT>
__global__ void __launch_bounds__(THREADS, 1) output_kernel(const Forward<T> p) {
#if !defined(TBCM_NO_CLUSTERS)
  TBCM_DYNAMIC_SHARED(shared);
  enum { Q, TQ };
  using Tiles = Ring<T, TANGENT ? 2 : 1>;
  const Tiles ring(shared);
  const Exchange exchange(shared + Tiles::BYTES, 0, p.q_norm, p.keys.heads);
  cluster_sync();
  const Stored tangent(shared + Tiles::BYTES + Exchange::BYTES);
  const Work work(p.keys.batch, p.keys.heads, p.queries, p.query_span);
  const int g = group(), t = member();
  const Signs<8> signs(p.q_norm, work, 8 * t);
  const bool moving_q = TANGENT && p.tq, moving_s = TANGENT && p.keys.tstate;
  Factor state;
  int batch = -1;

  Cursor<T> o(p.o, work, work.first), to(p.to, work, work.first);
  auto ask = [&] {
    if constexpr (TANGENT) return Reader(ring, work, p.q, p.tq);
    else return Reader(ring, work, p.q);
  }();
  const auto sum = [&](int tile) { leave_squares(ring, tile, Q, exchange, moving_q ? int(TQ) : -1); };
  const auto use = [&](int tile, const Place& place, float scalar) {
    float r[2], d[2];
    each<2>([&](int i) {
      r[i] = __shfl_sync(~0u, scalar, 2 * (g + 8 * i));
      d[i] = TANGENT ? __shfl_sync(~0u, scalar, 2 * (g + 8 * i) + 1) : 0.f;
    });
    if (place.batch != batch) {
      batch = place.batch;
      const int64_t index = (batch * p.keys.heads + work.head) * STATE;
      if (moving_s) {
        state.rows(p.keys.tstate + index, p.q_norm, work);
        tangent.put(state);
      }
      state.rows(p.keys.state + index, p.q_norm, work);
    }
    Left<PARTS<T>> y[2], ty[2];
    float inverse[2], drift[2];
    each<2>([&](int i) {
      const auto qs = signs.turn(ring.eight(tile, Q, g + 8 * i));
      Eight<T> tqs;
      if (TANGENT) tqs = signs.turn(ring.eight(tile, TQ, g + 8 * i));
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
      if (TANGENT) drift[i] = r[i] * over_four(tn) + (moving_q ? d[i] * p.eps : 0.f);
    });
    Eight<T> value[2], moved[2];
    each<4>([&](int j) {
      float n[4] = {}, tn[4] = {};
      each<2>([&](int k) {
        multiply(n, y[k], state.s[k][j]);
        if (moving_q) multiply(tn, ty[k], state.s[k][j]);
        if (moving_s) multiply(tn, y[k], tangent.s(k, j));
      });
      each<4>([&](int c) {
        const int i = c / 2;
        const float x = n[c] * (r[i] * inverse[i]);
        narrow(x, &value[i].values[2 * j + c % 2]);
        if (TANGENT) narrow((r[i] * tn[c] - x * drift[i]) * inverse[i], &moved[i].values[2 * j + c % 2]);
      });
    });
    each<2>([&](int i) {
      if (g + 8 * i >= work.rows(place)) return;
      *reinterpret_cast<Eight<T>*>(o.at + 8 * i * p.o.token) = value[i];
      if (TANGENT) *reinterpret_cast<Eight<T>*>(to.at + 8 * i * p.to.token) = moved[i];
    });
    o.next(p.o, work, place);
    if (TANGENT) to.next(p.to, work, place);
  };
  walk<Tiles::STAGES>(work, exchange, ask, sum, use);
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
  TBCM_D void flush(float* parts, const Work& work, int64_t heads) {
    if (!parts) return;
    each<8>([&](int i) {
      each<3>([&](int k) { grad[i] += __shfl_xor_sync(~0u, grad[i], 4 << k); });
    });
    float* to = parts + (blockIdx.x / blocks_for(heads) * heads + work.head) * WIDTH + 8 * member();
    if (work.there && group() == 0) each<8>([&](int i) { to[i] = grad[i]; });
  }
};

// The gradient of a row of x through its norm, from that of w x r without r, h: r (h - x r^2 mean(x h)).
template <class T>
TBCM_D void store_gradient(T* to, const Eight<T>& x, const float (&h)[8], float r, float mean) {
  Eight<T> gradient;
  each<8>([&](int i) { narrow(r * (h[i] - widen(x.values[i]) * (r * r * mean)), &gradient.values[i]); });
  *reinterpret_cast<Eight<T>*>(to) = gradient;
}

// Two rows, g and g + 8, as a factor on the left, whose columns are summed over.
template <class T>
TBCM_D void put_row(Left<PARTS<T>> (&left)[2], int i, const float (&row)[8]) {
  each<4>([&](int pair) { left[pair / 2].put(pair % 2 * 2 + i, row[2 * pair], row[2 * pair + 1]); });
}

// The rows g and g + 8 of a tensor's tile times a factor, of which a thread gets the columns 8t, ..., 8t + 7.
template <class T, int TENSORS>
TBCM_D void multiply_rows(const Ring<T, TENSORS>& ring, int tile, int tensor, const Factor& factor,
                          float (&product)[2][8]) {
  Left<PARTS<T>> rows[2];
  each<2>([&](int i) {
    const auto row = ring.eight(tile, tensor, group() + 8 * i);
    float x[8];
    each<8>([&](int j) { x[j] = widen(row.values[j]); });
    put_row<T>(rows, i, x);
  });
  each<4>([&](int j) {
    float c[4] = {};
    each<2>([&](int k) { multiply(c, rows[k], factor.s[k][j]); });
    each<4>([&](int e) { product[e / 2][2 * j + e % 2] = c[e]; });
  });
}

// With n the normaliser and P = g S_v^T: the gradient of phi(q) is (P - (g.o) z) / n, that of S is
// phi(q)^T [g, -g.o] / n, and n_v.g = phi(q).P gives g.o.
template <class T>
__global__ void __launch_bounds__(THREADS, 1) queries_kernel(const Backward<T> p) {
#if !defined(TBCM_NO_CLUSTERS)
  TBCM_DYNAMIC_SHARED(shared);
  enum { Q, G };
  constexpr int LATER = 2;
  using Tiles = Ring<T, 2>;
  const int64_t heads = p.queries.heads;
  const Tiles ring(shared);
  const Exchange sums(shared + Tiles::BYTES, 0, p.q_norm, heads);
  const Exchange later(shared + Tiles::BYTES, 1, p.q_norm, heads);
  const Kept kept(shared + Tiles::BYTES + 2 * Exchange::BYTES);
  cluster_sync();
  const Work work(p.queries.batch, heads, p.queries.tokens, p.queries.span);
  const int g = group(), t = member();
  Weights(p.q_norm, work).keep(kept);
  Total total, none;
  Factor state;
  int batch = -1;

  Cursor<T> gq(p.gq, work, work.first);
  Reader ask(ring, work, p.q, p.go);
  const auto sum = [&](int tile) { leave_squares(ring, tile, Q, sums); };
  const auto use = [&](int tile, const Place& place, float scalar) {
    if (place.batch != batch) {
      batch = place.batch;
      state.columns(p.state + (batch * heads + work.head) * STATE);
    }
    float h[2][8];
    multiply_rows(ring, tile, G, state, h);
    float f[2], one[2], mixed[2];
    Weights weights(kept);
    each<2>([&](int i) {
      const auto row = ring.eight(tile, Q, g + 8 * i);
      const float r = __shfl_sync(~0u, scalar, 2 * (g + 8 * i));
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
      mixed[i] = 0.f;
      each<8>([&](int j) {
        const float x = widen(row.values[j]);
        const float u = weights.rises(j, weights.y(j, x)) ? (h[i][j] - go_o * state.z[j]) * inverse : 0.f;
        weights.grad[j] += u * x * r;
        h[i][j] = weights.w[j] * u;
        mixed[i] += x * h[i][j];
      });
      mixed[i] = over_four(mixed[i]);
      kept.put(tile % LATER, i, h[i]);
    });
    weights.keep(kept);
    leave_rows(later, tile, mixed);
    float fs[4], ones[4];
    each<4>([&](int i) {  // of row t + 4i, which lanes of its group have
      const int from = (t + 4 * i) % 8 * 4;
      fs[i] = __shfl_sync(~0u, f[i / 2], from);
      ones[i] = __shfl_sync(~0u, one[i / 2], from);
    });
    const float zeros[4] = {};
    const Signs<4> signs(p.q_norm, work, 4 * g);  // again for each tile: there is no register for them
    gather<false>(ring, tile, signs, fs, ones, zeros, false, false, total, none);
    if (tile + 1 == work.tiles || work.last(place)) total.flush(p.queries, 0, p.q_norm, work, batch);
  };
  const auto finish = [&](int tile, const Place& place, float scalar, float mean) {
    each<2>([&](int i) {
      const float r = __shfl_sync(~0u, scalar, 2 * (g + 8 * i));
      const float m = __shfl_sync(~0u, mean, 2 * (g + 8 * i));
      float h[8];
      kept.get(tile % LATER, i, h);
      if (g + 8 * i >= work.rows(place)) return;
      store_gradient(gq.at + 8 * i * p.gq.token, ring.eight(tile, Q, g + 8 * i), h, r, m);
    });
    gq.next(p.gq, work, place);
  };
  walk<Tiles::STAGES, LATER>(work, sums, later, ask, sum, use, finish);
  Weights(kept).flush(p.q_weight.of[0].parts, work, heads);
#endif
}

// gv = phi(k) gS_v; the gradient of phi(k) is G = v gS_v^T + gz, and as phi(k).G = v.gv + phi(k).gz, the sum of x h over
// a row is known before G is.
template <class T>
__global__ void __launch_bounds__(THREADS, 1) keys_kernel(const Backward<T> p) {
#if !defined(TBCM_NO_CLUSTERS)
  TBCM_DYNAMIC_SHARED(shared);
  enum { K, V };
  constexpr int LATER = 2;
  using Tiles = Ring<T, 2>;
  const int64_t heads = p.queries.heads;
  const Tiles ring(shared);
  const Exchange sums(shared + Tiles::BYTES, 0, p.k_norm, heads);
  const Exchange later(shared + Tiles::BYTES, 1, p.k_norm, heads);
  const Stored rows(shared + Tiles::BYTES + 2 * Exchange::BYTES);
  cluster_sync();
  const Work work(p.queries.batch, heads, p.keys, p.key_span);
  const int g = group();
  Weights weights(p.k_norm, work);
  Factor columns;
  int batch = -1, done = -1;

  Cursor<T> gk(p.gk, work, work.first), gv(p.gv, work, work.first);
  Reader ask(ring, work, p.k, p.v);
  const auto sum = [&](int tile) { leave_squares(ring, tile, K, sums); };
  const auto use = [&](int tile, const Place& place, float scalar) {
    if (place.batch != batch) {
      batch = place.batch;
      Factor factor;
      factor.rows(p.queries.state + (batch * heads + work.head) * STATE, p.k_norm, work);
      rows.put(factor);
    }
    Left<PARTS<T>> ys[2];
    float mixed[2] = {};
    each<2>([&](int i) {
      const auto row = ring.eight(tile, K, g + 8 * i);
      float y[8];
      each<8>([&](int j) { y[j] = weights.y(j, widen(row.values[j])); });
      each<4>([&](int pair) {
        const float2 z = rows.z(pair);
        mixed[i] += y[2 * pair] * z.x + y[2 * pair + 1] * z.y;
      });
      put_row<T>(ys, i, y);
    });
    const Eight<T> vs[2] = {ring.eight(tile, V, g), ring.eight(tile, V, g + 8)};
    float r[2];
    each<2>([&](int i) { r[i] = __shfl_sync(~0u, scalar, 2 * (g + 8 * i)); });
    Eight<T> gradient[2];
    each<4>([&](int j) {
      float c[4] = {};
      each<2>([&](int k) { multiply(c, ys[k], rows.s(k, j)); });
      each<4>([&](int e) {
        mixed[e / 2] += widen(vs[e / 2].values[2 * j + e % 2]) * c[e];
        narrow(r[e / 2] * c[e], &gradient[e / 2].values[2 * j + e % 2]);
      });
    });
    each<2>([&](int i) {
      mixed[i] = over_four(mixed[i]);
      if (g + 8 * i < work.rows(place)) *reinterpret_cast<Eight<T>*>(gv.at + 8 * i * p.gv.token) = gradient[i];
    });
    leave_rows(later, tile, mixed);
    gv.next(p.gv, work, place);
  };
  const auto finish = [&](int tile, const Place& place, float scalar, float mean) {
    if (place.batch != done) {
      done = place.batch;
      columns.columns(p.queries.state + (done * heads + work.head) * STATE);
    }
    float h[2][8];
    multiply_rows(ring, tile, V, columns, h);
    each<2>([&](int i) {
      const float r = __shfl_sync(~0u, scalar, 2 * (g + 8 * i));
      const float m = __shfl_sync(~0u, mean, 2 * (g + 8 * i));
      if (g + 8 * i >= work.rows(place)) return;
      const auto row = ring.eight(tile, K, g + 8 * i);
      each<8>([&](int j) {
        const float x = widen(row.values[j]);
        const float u = weights.rises(j, weights.y(j, x)) ? h[i][j] + columns.z[j] : 0.f;
        weights.grad[j] += u * x * r;
        h[i][j] = weights.w[j] * u;
      });
      store_gradient(gk.at + 8 * i * p.gk.token, row, h[i], r, m);
    });
    gk.next(p.gk, work, place);
  };
  walk<Tiles::STAGES, LATER>(work, sums, later, ask, sum, use, finish);
  weights.flush(p.k_weight.of[0].parts, work, heads);
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

constexpr int MOST_SHARED = 219 << 10;  // CUDA_SHARED in functional.py
template <class T>
constexpr bool FITS = state_shared<T>(true) <= MOST_SHARED && output_shared<T>(true) <= MOST_SHARED &&
                      queries_shared<T>() <= MOST_SHARED && keys_shared<T>() <= MOST_SHARED;
static_assert(FITS<bfloat16> && FITS<float16>);

inline int warps_for(int64_t heads) { return int((heads + blocks_for(heads) - 1) / blocks_for(heads)); }

// The tiles of a cluster, so that all clusters are at work at once.
template <auto KERNEL>
const char* divide(int64_t batch, int64_t heads, int64_t tokens, int shared, int64_t* span) {
  const int blocks = blocks_for(heads);
  if (batch * heads == 0) return nullptr;
  if (blocks > MAX_CLUSTER) return "linear_attention has a warp for each of up to 96 heads";
  if (batch * tiles_of(tokens) > INT32_MAX) return "the tensors are too large for one grid";
  int clusters = 0;
  if (const char* fault = hold<KERNEL>(blocks, warps_for(heads), shared, &clusters)) return fault;
  *span = (batch * tiles_of(tokens) + clusters - 1) / clusters;
  return nullptr;
}

inline int64_t clusters_for(int64_t batch, int64_t tokens, int64_t span) {
  return span ? (batch * tiles_of(tokens) + span - 1) / span : 0;
}

template <class P>
const char* start_tiles(void (*kernel)(P), const P& p, int64_t clusters, int64_t heads, int shared, void* stream) {
  if (clusters == 0) return nullptr;
  return start_clusters(kernel, clusters, blocks_for(heads), warps_for(heads) * WARP, shared, p, stream);
}

inline const char* start_adding(const Parts& parts, void* stream) {
  const int64_t sums = parts.numbers() * (parts.tstate ? 2 : 1);
  return start(add_kernel<Parts>, (sums + 8 * WARP - 1) / (8 * WARP), 8 * WARP, parts, stream);
}

template <class T, bool TANGENT>
const char* divide_keys(Parts& keys) {
  return divide<state_kernel<T, TANGENT>>(keys.batch, keys.heads, keys.tokens, state_shared<T>(TANGENT), &keys.span);
}
template <class T, bool TANGENT>
const char* divide_queries(Forward<T>* p) {
  return divide<output_kernel<T, TANGENT>>(p->keys.batch, p->keys.heads, p->queries, output_shared<T>(TANGENT),
                                           &p->query_span);
}

template <class T>
const char* divide(Forward<T>* p) {
  const char* fault = p->keys.tstate ? divide_keys<T, true>(p->keys) : divide_keys<T, false>(p->keys);
  return fault ? fault : p->to ? divide_queries<T, true>(p) : divide_queries<T, false>(p);
}

template <class T>
const char* launch(const Forward<T>& p, void* stream) {
  const bool tangent = p.keys.tstate, moving = bool(p.to);
  const int64_t heads = p.keys.heads;
  const char* fault = start_tiles(tangent ? state_kernel<T, true> : state_kernel<T, false>, p,
                                  clusters_for(p.keys.batch, p.keys.tokens, p.keys.span), heads,
                                  state_shared<T>(tangent), stream);
  if (!fault) fault = start_adding(p.keys, stream);
  return fault ? fault : start_tiles(moving ? output_kernel<T, true> : output_kernel<T, false>, p,
                                     clusters_for(p.keys.batch, p.queries, p.query_span), heads,
                                     output_shared<T>(moving), stream);
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
  const int64_t heads = p.queries.heads;
  const char* fault = start_tiles(queries_kernel<T>, p, p.q_weight.count, heads, queries_shared<T>(), stream);
  if (!fault) fault = start_adding(p.queries, stream);
  if (!fault) fault = start_tiles(keys_kernel<T>, p, p.k_weight.count, heads, keys_shared<T>(), stream);
  if (!fault) fault = start_adding(p.q_weight, p.q_norm, heads, stream);
  return fault ? fault : start_adding(p.k_weight, p.k_norm, heads, stream);
}

#define TBCM_INSTANCES_OF_HEADS(T)                      \
  template const char* divide(Forward<T>*);             \
  template const char* divide(Backward<T>*);            \
  template const char* launch(const Forward<T>&, void*); \
  template const char* launch(const Backward<T>&, void*);
TBCM_INSTANCES_OF_HEADS(bfloat16)
TBCM_INSTANCES_OF_HEADS(float16)

}  // namespace tbcm::linear_attention
