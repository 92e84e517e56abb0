// Online softmax of one warpgroup's 64 rows, two rows a thread (r and r + 8 of its warp's 16).
// Element i of a score fragment: row (i >> 1) & 1, column 8 * (i >> 2) + 2 * (lane % 4) + (i & 1).
#pragma once

#include <cute/tensor.hpp>

#include "common/exp2.cuh"
#include "common/quad.cuh"

namespace hopper_fa {

// P = exp2(scale[r] * S + bias[r]) in place, summed into row_sum if that is wanted.
// kFmaOctets of every 8 column octets take exp2 on the FP32 pipe.
template <int kFmaOctets, bool kSum, class Scores>
__device__ __forceinline__ void exponentiate(Scores& s, float const (&scale)[2], float const (&bias)[2],
                                             float (&row_sum)[2]) {
  CUTE_UNROLL
  for (int i = 0; i < decltype(cute::size(s))::value; ++i) {
    int const r = (i >> 1) & 1;
    float const x = fmaf(s(i), scale[r], bias[r]);
    s(i) = (i >> 2) % 8 < kFmaOctets ? exp2_fma(x) : exp2_sfu(x);
    if constexpr (kSum) row_sum[r] += s(i);
  }
}

// Two rows' maxima, from each thread's of its columns.
__device__ __forceinline__ void quad_max(float (&rows)[2]) {
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r) rows[r] = quad_max(rows[r]);
}

// The maxima of `start` and the scores in this thread's columns.
template <class Scores>
__device__ __forceinline__ void thread_max(Scores const& s, float const (&start)[2], float (&result)[2]) {
  // Four independent chains of maxima, so that none of them waits for its own latency.
  float partial[4] = {start[0], start[0], start[1], start[1]};
  CUTE_UNROLL
  for (int i = 0; i < decltype(cute::size(s))::value; ++i) partial[i & 3] = max_nan(partial[i & 3], s(i));
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r) result[r] = max_nan(partial[2 * r], partial[2 * r + 1]);
}

// best: the largest of each row's scores in this thread's columns, as integers (of floats their bits, and at
// least 0), and what best was unless kStart.
// NOTE: integers, because Hopper has a three-way integer maximum and no float one: half the instructions.
// Floats that are not negative are ordered as their bits are, and NaN is the largest of them.
template <bool kStart, class Scores>
__device__ __forceinline__ void max_bits(Scores const& s, int (&best)[2]) {
  constexpr bool kInteger = std::is_same_v<typename Scores::value_type, int32_t>;
  auto const bits = [&](int i) {
    if constexpr (kInteger)
      return static_cast<int>(s(i));
    else
      return __float_as_int(s(i));
  };
  constexpr int kSize = decltype(cute::size(s))::value;
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r) {
    int chains[2];
    CUTE_UNROLL
    for (int c = 0; c < 2; ++c) {
      int const first = 4 * c + 2 * r;
      int const start = kStart ? (kInteger ? bits(first) : 0) : best[r];
      chains[c] = kStart || c == 0 ? __vimax3_s32(start, bits(first), bits(first + 1))
                                   : max(bits(first), bits(first + 1));
      CUTE_UNROLL
      for (int i = first + 8; i < kSize; i += 8) chains[c] = __vimax3_s32(chains[c], bits(i), bits(i + 1));
    }
    best[r] = max(chains[0], chains[1]);
  }
}

// As thread_max, from the best that max_bits<true> found.
// NOTE: below 0 the larger float has the smaller bits.
template <class Scores>
__device__ __forceinline__ void finish_max(Scores const& s, int const (&best)[2], float const (&start)[2],
                                           float (&result)[2]) {
  auto const bits = [&](int i) { return __float_as_uint(s(i)); };
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r) {
    uint32_t chains[2] = {~0u, ~0u};
    CUTE_UNROLL
    for (int i = 2 * r; i < decltype(cute::size(s))::value; i += 4)
      chains[i / 4 % 2] = __vimin3_u32(chains[i / 4 % 2], bits(i), bits(i + 1));
    uint32_t const largest = best[r] > 0 ? static_cast<uint32_t>(best[r]) : min(chains[0], chains[1]);
    result[r] = max_nan(start[r], __uint_as_float(largest));
  }
}

// 16-bit inputs: one scale for all scores. kMaxBits: whether a thread's maxima are of integers first.
//
// Lazy rescaling (FlashAttention-4's idea): P is relative to row_max, which follows the true maximum only
// when it must. The factor between the two cancels in the final division. The rounding of P does not: at the
// true maximum P is exactly 1 if row_max is that maximum, and rounded otherwise. So row_max lags only where
// the largest P is too small a part of its row's sum for its rounding to count.
template <int kFmaOctets, bool kMaxBits, int kPeakBits>
struct OnlineSoftmax {
  float row_max[2] = {-INFINITY, -INFINITY};  // what P is relative to
  float row_sum[2] = {0, 0};                  // of this thread's columns only, until finish()
  // Log2 growth that moves neither row's row_max: no more than either row's allowed_lag. NOTE: 0 at first, so
  // a tile's second block computes it; to do so behind the first block is 2% slower at d64.
  float lag = 0;
  float scale_log2;  // softmax_scale * log2(e), not negative
  float threshold;   // most log2 growth of the maximum that row_max does not follow

  __device__ __forceinline__ OnlineSoftmax(float scale_log2, float threshold)
      : scale_log2(scale_log2), threshold(threshold) {}

  // Scores in, P = exp2(scale_log2 * (S - row_max)) out. Returns whether the output so far must be multiplied
  // by alpha. kFirst: of the tile's blocks.
  template <bool kFirst, class Scores>
  __device__ __forceinline__ bool step(Scores& s, float (&alpha)[2]) {
    // True for NaN and for -inf - -inf.
    auto const outgrows = [&](float max, int r, float lag) {
      return !((max - row_max[r]) * scale_log2 <= lag);
    };
    auto const any_outgrows = [&](float max0, float max1, float lag0, float lag1) {
      return __any_sync(~0u, outgrows(max0, 0, lag0) || outgrows(max1, 1, lag1));
    };
    // NOTE: of each thread's columns alone: where no thread's outgrow, no row's do, and what other threads
    // have need not be known.
    float new_max[2];
    bool rescale = true;
    if constexpr (!kFirst && kMaxBits) {
      int best[2];
      max_bits<true>(s, best);
      rescale = any_outgrows(__int_as_float(best[0]), __int_as_float(best[1]), lag, lag);
      if (rescale) finish_max(s, best, row_max, new_max);
    } else {
      thread_max(s, row_max, new_max);
      if constexpr (!kFirst) rescale = any_outgrows(new_max[0], new_max[1], lag, lag);
    }
    if (rescale) {
      quad_max(new_max);
      float allowed[2] = {0, 0};
      if constexpr (!kFirst) {
        CUTE_UNROLL
        for (int r = 0; r < 2; ++r) allowed[r] = allowed_lag(r);
        rescale = any_outgrows(new_max[0], new_max[1], allowed[0], allowed[1]);
        lag = fminf(allowed[0], allowed[1]);
      }
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        // NOTE: every row decides by itself, so its bits depend on no neighbour, nor on keys that a causal
        // mask hides from it. Whether its warp comes here may depend on them; but what a row is allowed never
        // falls until it follows, so a row that outgrows it has made its warp come.
        bool const keep = !outgrows(new_max[r], r, allowed[r]) || new_max[r] == -INFINITY;
        alpha[r] = keep ? 1.f : exp2_sfu((row_max[r] - new_max[r]) * scale_log2);
        row_max[r] = keep ? row_max[r] : new_max[r];
        if constexpr (!kFirst) lag = keep ? lag : 0.f;
        row_sum[r] *= alpha[r];
      }
    }
    float const scale[2] = {scale_log2, scale_log2};
    float bias[2];
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) bias[r] = row_max[r] == -INFINITY ? 0.f : -row_max[r] * scale_log2;
    exponentiate<kFmaOctets, true>(s, scale, bias, row_sum);
    return rescale;
  }

  // Final factor of each row, and its log-sum-exp: (0, -inf) for a row that saw no key.
  __device__ __forceinline__ void finish(float (&factor)[2], float (&lse)[2]) {
    constexpr float kLn2 = 0.693147180559945309f;
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      row_sum[r] = quad_sum(row_sum[r]);
      bool const empty = row_max[r] == -INFINITY;
      factor[r] = empty ? 0.f : 1.f / row_sum[r];
      lse[r] = empty ? -INFINITY : kLn2 * fmaf(row_max[r], scale_log2, log2f(row_sum[r]));
    }
  }

 private:
  // How far above row_max, in log2, a maximum may be: until its P is 2^-kPeakBits of the row's sum so far,
  // and no further than the threshold. NOTE: the logarithm is linear between powers of two, so that it never
  // falls while the sum grows.
  __device__ __forceinline__ float allowed_lag(int r) const {
    int const bits = __float_as_int(quad_sum(row_sum[r]));
    float const log2_part = fmaf(static_cast<float>(bits), 0x1p-23f, -127.f - kPeakBits);
    return fminf(fmaxf(log2_part, 0.f), threshold);
  }
};

}  // namespace hopper_fa
