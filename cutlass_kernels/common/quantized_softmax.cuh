// Online softmax over 8-bit products: of one warpgroup's 64 rows, two rows a thread; elements as in
// softmax.cuh. A factor for every row and one for every block of keys. The row sum is a column of the output
// (V has a row of ones), so numerator and denominator hold the same rounded P.
#pragma once

#include "common/exp2_linear.h"
#include "common/softmax.cuh"

namespace hopper_fa {

// The maximum of a row that has seen no key.
// NOTE: finite, and eight times it too, so that what is left of it is no infinity less an infinity: nothing
// needs to look.
constexpr float kNoMaximum = -0x1p120f;

// Score: int32_t of int8 products, or float of e4m3's.
// kLinear: P by its code, exp2_linear.h.
//
// NOTE: maxima are of integers in both: see max_bits.
template <class Score, bool kLinear>
struct QuantizedSoftmax {
  static constexpr bool kInteger = std::is_same_v<Score, int32_t>;
  // Added to the integer S the bits of kMagic give the bits of S + kMagic, for |S| < 2^22.
  static constexpr float kMagic = 12582912.f;  // 1.5 * 2^23
  static constexpr uint32_t kMagicBits = 0x4b400000u, kMinusInfinityBits = 0xff800000u;
  // What the tensor core's integer sums start from. The bits of kMagic cost an instruction each as adding
  // them afterwards does, but nothing waits for it. NOTE: not everywhere, as with Q K in halves of the keys
  // ptxas waits for the first before the second.
  static constexpr uint32_t kStart = kInteger && kLinear ? kMagicBits : 0;

  float row_max[2] = {kNoMaximum, kNoMaximum};  // that P is relative to, in log2 units of scaled scores
  float row_scale[2];                           // dequantisation of Q, times softmax_scale * log2(e)

  // The score of a key that a row must not see: -inf once it is a float.
  static __device__ __forceinline__ Score hidden() {
    if constexpr (kInteger)
      return static_cast<int32_t>(kMinusInfinityBits - (kMagicBits - kStart));
    else
      return -INFINITY;
  }

  static __device__ __forceinline__ Score negated(Score s) {
    if constexpr (kInteger)
      return static_cast<int32_t>(2 * kStart - static_cast<uint32_t>(s));
    else
      return -s;
  }

  // Scores in, P = exp2(S row_scale block_scale - row_max + p_offset) out, without row_scale if not kRowScale
  // (block_scale is positive then); if kLinear its e4m3 code, not rounded yet. row_max follows the
  // rows' maxima once they outgrow it by more than `threshold`, so P never exceeds 2^(p_offset + threshold).
  // The output so far must be multiplied by alpha before this P's product is added; false: it is 1 in all
  // rows of the warp. row_sum: if kSum, what the unrounded P of this thread's columns add up to.
  template <bool kSum, bool kRowScale, class Scores, class Probabilities>
  __device__ __forceinline__ bool step(Scores const& s, int (&best)[2], Probabilities&& p, float block_scale,
                                       float p_offset, float threshold, float (&alpha)[2],
                                       float (&row_sum)[2]) {
    float scale[2];
    bool outgrown = false;
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      // NOTE: never 0, which would turn the mask's -inf into NaN.
      scale[r] = kRowScale ? max_nan(row_scale[r] * block_scale, 0x1p-149f) : block_scale;
      // NOTE: of this thread's columns alone: where no thread's outgrow, no row's do. True for NaN.
      outgrown |= !(fmaf(as_value(best[r]), scale[r], -row_max[r]) <= threshold);
      alpha[r] = 1.f;
    }
    bool const any_outgrown = __any_sync(~0u, outgrown);
    if (any_outgrown) {
      float unscaled[2];
      block_max(s, best, unscaled);
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        // NOTE: nor NaN where the row sees no key of the block.
        if (kRowScale && unscaled[r] == -INFINITY) scale[r] = 1.f;
        // NOTE: every row decides by itself, or its result would depend on its neighbours.
        if (fmaf(unscaled[r], scale[r], -row_max[r]) <= threshold) continue;
        float const new_max = unscaled[r] * scale[r];
        alpha[r] = exp2_sfu(row_max[r] - new_max);
        row_max[r] = new_max;
        if constexpr (kSum) row_sum[r] *= alpha[r];
      }
    }
    float bias[2];
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      bias[r] = p_offset - row_max[r];
      if constexpr (kLinear) scale[r] *= 8.f, bias[r] = fmaf(bias[r], 8.f, 56.f - kExp2LinearMean);
      // NOTE: rounding this sum moves all scores of a row and block by at most one in the integers' last
      // place together.
      if (kInteger) bias[r] = fmaf(-kMagic, scale[r], bias[r]);
    }
    CUTE_UNROLL
    for (int i = 0; i < decltype(cute::size(s))::value; ++i) {
      int const r = (i >> 1) & 1;
      p(i) = fmaf(as_float(s(i)), scale[r], bias[r]);
      if constexpr (!kLinear) p(i) = exp2_sfu(p(i));
      if constexpr (kSum) row_sum[r] += p(i);
    }
    return any_outgrown;
  }

  // row_sum: of the rounded P. As OnlineSoftmax::finish.
  // NOTE: by the special-function unit, a unit in FP32's last place off.
  __device__ __forceinline__ void finish(float const (&row_sum)[2], float p_offset, float (&factor)[2],
                                         float (&lse)[2]) const {
    constexpr float kLn2 = 0.693147180559945309f;
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      bool const empty = row_max[r] == kNoMaximum;
      factor[r] = empty ? 0.f : reciprocal_sfu(row_sum[r]);
      lse[r] = empty ? -INFINITY : kLn2 * (row_max[r] - p_offset + log2_sfu(row_sum[r]));
    }
  }

 private:
  static __device__ __forceinline__ float as_float(Score s) {  // of integers: plus kMagic
    if constexpr (kInteger)
      return __uint_as_float(static_cast<uint32_t>(s) + (kMagicBits - kStart));
    else
      return s;
  }

  // A maximum's bits as a score.
  static __device__ __forceinline__ float as_value(int best) {
    return kInteger ? as_float(static_cast<Score>(best)) - kMagic : __int_as_float(best);
  }

  // The rows' maxima over the block, across the quads.
  template <class Scores>
  static __device__ __forceinline__ void block_max(Scores const& s, int (&best)[2], float (&result)[2]) {
    // NOTE: both rows' shuffles before the first result, which comes some 25 clocks later.
    CUTE_UNROLL
    for (int distance = 1; distance <= 2; distance *= 2) {
      int const other[2] = {__shfl_xor_sync(~0u, best[0], distance), __shfl_xor_sync(~0u, best[1], distance)};
      best[0] = max(best[0], other[0]);
      best[1] = max(best[1], other[1]);
    }
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) result[r] = as_value(best[r]);
    if constexpr (!kInteger) {
      // A row without a positive score: rare, unless the mask hides all of its keys.
      if (__any_sync(~0u, best[0] <= 0 || best[1] <= 0)) {
        float const none[2] = {-INFINITY, -INFINITY};
        thread_max(s, none, result);
        quad_max(result);
      }
    }
  }
};

}  // namespace hopper_fa
