// Operands of the CUDA kernels of linear_attention, relu with heads of 32: q, o [B, H, N, 32], k, v [B, H, S, 32].
//   S = phi(k)^T [v, 1],  n = phi(q) S,  o = n_v / (n_1 + eps),  phi(x) = relu(w r x)
#pragma once

#include "vector.h"

namespace tbcm::linear_attention {

constexpr int WIDTH = 32, COLUMNS = WIDTH + 1;  // of a state, whose last column is the normaliser's
constexpr int STATE = WIDTH * COLUMNS;
constexpr int TOKENS = 16;  // of a tile
TBCM_HD int tiles_of(int64_t tokens) { return int((tokens + TOKENS - 1) / TOKENS); }

// A [B, H, N, 32] tensor whose rows lie at multiples of 16 bytes, or nothing.
template <class T>
struct Heads {
  T* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;  // strides
  TBCM_HD explicit operator bool() const { return data != nullptr; }
  TBCM_HD T* at(int64_t b, int64_t h, int64_t n) const { return data + b * batch + h * head + n * token; }
};

// The rows over which a norm takes its mean.
enum class Scope { none, head, all };

struct Norm {
  const float* weight = nullptr;
  Scope scope = Scope::none;
  float eps = 0.f;
};

// States [B, H, 32, 33], and maybe their tangents, as sums of what clusters make of some tiles each, which are those of
// all samples one after another.
struct Parts {
  float *state, *tstate;
  int64_t batch, heads, tokens;
  int64_t span = 0;  // tiles of a cluster
  float* scratch = nullptr;  // [most, tstate ? 2 : 1, B, H, 32, 33]

  TBCM_HD int64_t numbers() const { return batch * heads * STATE; }
  TBCM_HD int64_t room() const { return most() * numbers() * (tstate ? 2 : 1); }
  // The part of a sample that has a tile; there are fewer than 2^31 tiles, and numbers of 32 bits are divided sooner.
  TBCM_HD int part_of(int b, int tile) const { return tile / int(span) - b * tiles_of(tokens) / int(span); }
  TBCM_HD int of_sample(int b) const { return tiles_of(tokens) ? part_of(b, (b + 1) * tiles_of(tokens) - 1) + 1 : 0; }

 private:
  TBCM_HD int64_t most() const { return span ? (tiles_of(tokens) + span - 2) / span + 1 : 0; }
};

template <class T>
struct Forward {
  Heads<const T> q, k, v, tq, tk, tv;
  Norm q_norm, k_norm;
  Heads<T> o, to;
  Parts keys;
  int64_t queries;
  float eps;
  int64_t query_span = 0;
};

template <class T>
struct Backward {
  Heads<const T> go, q, k, v;
  Norm q_norm, k_norm;
  const float* state;
  Heads<T> gq, gk, gv;
  Parts queries;  // of the gradient of the state
  int64_t keys;
  float eps;
  int64_t key_span = 0;
  Sums q_weight = {}, k_weight = {};  // of what clusters leave of the gradients of the norms' weights
};

// On a GPU, in linear_attention.cu; all return null, or what is wrong. The spans, by what the GPU holds at once.
template <class T>
const char* divide(Forward<T>* p);
template <class T>
const char* divide(Backward<T>* p);
// Queues the kernels on a CUDA stream.
template <class T>
const char* launch(const Forward<T>& p, void* stream);
template <class T>
const char* launch(const Backward<T>& p, void* stream);

}  // namespace tbcm::linear_attention
