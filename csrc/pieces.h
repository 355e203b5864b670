// Samples [B, D] cut into pieces of fixed length, so that work and sums do not depend on threads.
#pragma once

#include "bindings.h"

namespace tbcm {

constexpr int64_t PIECE = 4096;

struct Span {
  int64_t sample, begin, count;
};

inline int64_t pieces_of(int64_t width) { return width > PIECE ? (width + PIECE - 1) / PIECE : 1; }

// The k-th piece of all; the pieces of a sample follow each other.
TBCM_INLINE Span piece(int64_t k, int64_t width) {
  const int64_t pieces = pieces_of(width), begin = k % pieces * PIECE;
  return {k / pieces, begin, width - begin < PIECE ? width - begin : PIECE};
}

// Runs the kernel of p on all pieces of so many samples.
template <class Params>
void over_pieces(const Params& p, int64_t batch, int64_t width) {
  parallel(batch * pieces_of(width), width < PIECE ? width : PIECE, [&](int64_t a, int64_t z) { run(p, a, z); });
}

// What is read in place of a row that is not there.
template <class T>
TBCM_INLINE const T* row_or_zeros(const Rows<const T>& rows, Span k) {
  static const T zeros[PIECE] = {};
  return rows ? rows.at(k.sample, k.begin) : zeros;
}

}  // namespace tbcm
