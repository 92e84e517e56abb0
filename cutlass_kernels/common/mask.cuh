// Sets scores of keys a row must not see to -inf.
#pragma once

#include <cute/tensor.hpp>

namespace hopper_fa {

// visible[r]: how many keys of this block, counted from its first, row r of the thread sees (may be negative
// or large).
//
// NOTE: one bit an element instead of one comparison: ptxas moves seven bits at a time into predicates (R2P).
template <class Scores>
__device__ __forceinline__ void mask_scores(Scores& s, int const (&visible)[2]) {
  // Elements of a row that the thread has: columns 8 j and 8 j + 1 past its first.
  constexpr int kPerRow = decltype(cute::size(s))::value / 2;
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r) {
    int const limit = max(visible[r] - 2 * static_cast<int>(threadIdx.x % 4), 0);
    int const seen = 2 * (limit / 8) + min(limit % 8, 2);  // of those elements, in column order
    CUTE_UNROLL
    for (int first = 0; first < kPerRow; first += 32) {
      int const bits = max(seen - first, 0);
      uint32_t const mask = bits < 32 ? (1u << bits) - 1 : ~0u;
      CUTE_UNROLL
      for (int i = first; i < min(first + 32, kPerRow); ++i) {
        int const element = 4 * (i / 2) + 2 * r + i % 2;
        if (!(mask >> (i - first) & 1)) s(element) = -INFINITY;
      }
    }
  }
}

// The same for scores transposed, a row a key: hidden[r] queries of this block, counted from its first, do
// not see the key of row r.
template <class Scores>
__device__ __forceinline__ void mask_transposed(Scores& s, int const (&hidden)[2]) {
  constexpr int kPerRow = decltype(cute::size(s))::value / 2;
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r) {
    int const limit = max(hidden[r] - 2 * static_cast<int>(threadIdx.x % 4), 0);
    int const unseen = 2 * (limit / 8) + min(limit % 8, 2);
    CUTE_UNROLL
    for (int first = 0; first < kPerRow; first += 32) {
      int const bits = max(unseen - first, 0);
      uint32_t const mask = bits < 32 ? (1u << bits) - 1 : ~0u;
      CUTE_UNROLL
      for (int i = first; i < min(first + 32, kPerRow); ++i) {
        int const element = 4 * (i / 2) + 2 * r + i % 2;
        if (mask >> (i - first) & 1) s(element) = -INFINITY;
      }
    }
  }
}

}  // namespace hopper_fa
