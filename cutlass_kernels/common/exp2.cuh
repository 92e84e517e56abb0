// exp2 on either of two pipes: 16 a clock and SM on the special-function unit, the rest of the FP32 lanes
// otherwise.
#pragma once

#include "common/exp2_polynomial.h"

namespace hopper_fa {

__device__ __forceinline__ float exp2_sfu(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_sfu(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_sfu(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Cody-Waite: 2^x = 2^n 2^r with n = round(x), 2^r by a cubic. 2^-126 and less become a denormal.
// NOTE: so a masked score keeps a weight of 1e-38. NaN in gives a large number out; the softmax catches NaN
// in the row maximum instead.
__device__ __forceinline__ float exp2_fma(float x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves round(x) in the low mantissa bits
  float const clamped = fmaxf(x, -126.f);
  float const shifted = clamped + kRound;
  float const r = clamped - (shifted - kRound);
  constexpr float c0 = kExp2Polynomial[0], c1 = kExp2Polynomial[1], c2 = kExp2Polynomial[2],
                  c3 = kExp2Polynomial[3];
  float const p = fmaf(fmaf(fmaf(c3, r, c2), r, c1), r, c0);
  return __int_as_float(__float_as_int(p) + (__float_as_int(shifted) << 23));
}

}  // namespace hopper_fa
