// Online softmax of one warpgroup's 64 rows, two rows a thread (r and r + 8 of its warp's 16).
// Element i of a score fragment: row (i >> 1) & 1, column 8 * (i >> 2) + 2 * (lane % 4) + (i & 1).
#pragma once

#include <cute/tensor.hpp>

#include "common/exp2.cuh"

namespace hopper_fa {

// NOTE: NaN wins, unlike in fmaxf: one NaN score makes its whole row NaN, as it does in textbook softmax.
__device__ __forceinline__ float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

__device__ __forceinline__ float quad_max(float x) {
  x = max_nan(x, __shfl_xor_sync(~0u, x, 1));
  return max_nan(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

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

// Each row's maximum over the block and `start`, which is one value a row or -inf.
template <class Scores>
__device__ __forceinline__ void block_max(Scores const& s, float const (&start)[2], float (&result)[2]) {
  // Four independent chains of maxima, so that none of them waits for its own latency.
  float partial[4] = {start[0], start[0], start[1], start[1]};
  CUTE_UNROLL
  for (int i = 0; i < decltype(cute::size(s))::value; ++i) partial[i & 3] = max_nan(partial[i & 3], s(i));
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r) result[r] = quad_max(max_nan(partial[2 * r], partial[2 * r + 1]));
}

// 16-bit inputs: one scale for all scores.
template <int kFmaOctets>
struct OnlineSoftmax {
  // The maximum that P is relative to; lags behind the true one by up to the threshold.
  float row_max[2] = {-INFINITY, -INFINITY};
  float row_sum[2] = {0, 0};  // of this thread's columns only, until finish()
  float scale_log2;           // softmax_scale * log2(e), not negative
  float threshold;

  __device__ __forceinline__ OnlineSoftmax(float scale_log2, float threshold)
      : scale_log2(scale_log2), threshold(threshold) {}

  // Scores in, P = exp2(scale_log2 * (S - row_max)) out. Returns whether the output so far must be multiplied
  // by alpha: row_max follows the true maximum only when that has outgrown the threshold (FlashAttention-4's
  // lazy rescaling; exact after the final division).
  template <class Scores>
  __device__ __forceinline__ bool step(Scores& s, float (&alpha)[2]) {
    float new_max[2];
    block_max(s, row_max, new_max);
    bool outgrown[2];
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r)
      outgrown[r] =
          !((new_max[r] - row_max[r]) * scale_log2 <= threshold);  // true for NaN and for -inf - -inf
    // NOTE: the vote only saves the branch. Whether a row is rescaled depends on that row alone, so no row's
    // bits depend on its neighbours, nor on keys that a causal mask hides from it.
    bool const rescale = __any_sync(~0u, outgrown[0] || outgrown[1]);
    if (rescale) {
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        bool const keep = !outgrown[r] || new_max[r] == -INFINITY;
        alpha[r] = keep ? 1.f : exp2_sfu((row_max[r] - new_max[r]) * scale_log2);
        row_max[r] = keep ? row_max[r] : new_max[r];
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
};

}  // namespace hopper_fa
