// Where a warpgroup's product of 64 rows lies in its threads: element i of a fragment is row
// row_in_tile() + 8 ((i >> 1) & 1), column 8 (i >> 2) + 2 (lane % 4) + (i & 1).
#pragma once

#include <cutlass/numeric_conversion.h>

#include <cute/tensor.hpp>

namespace hopper_fa {

// Of this thread's first row in the warpgroup's 64; its second is 8 further.
__device__ __forceinline__ int row_in_tile() { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4; }

// threadIdx.x, but not known to be the same every time: what is computed from it takes no registers over a
// loop.
__device__ __forceinline__ unsigned fresh_thread() {
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// row_in_tile() from that.
__device__ __forceinline__ int fresh_row_in_tile() {
  unsigned const thread = fresh_thread();
  return thread % 128 / 32 * 16 + thread % 32 / 4;
}

// 4 x 4 transposes across a quad: lane t passes word j of each to lane j and ends with word t of lanes 0
// to 3.
//
// NOTE: all exchanges of a step before the first result, which comes some 25 clocks later.
template <int kCount>
__device__ __forceinline__ void quad_transpose(uint32_t (&w)[kCount][4]) {
  auto const step = [&](auto distance) {
    constexpr int kDistance = distance, kStep = 3 - kDistance;  // pairs of words begin at 0 and kStep
    bool const second = threadIdx.x & kDistance;
    uint32_t received[kCount][2];
    CUTE_UNROLL
    for (int c = 0; c < kCount; ++c) {
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i)
        received[c][i] =
            __shfl_xor_sync(~0u, second ? w[c][kStep * i] : w[c][kStep * i + kDistance], kDistance);
    }
    CUTE_UNROLL
    for (int c = 0; c < kCount; ++c) {
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) (second ? w[c][kStep * i] : w[c][kStep * i + kDistance]) = received[c][i];
    }
  };
  step(cute::Int<2>{});
  step(cute::Int<1>{});
}
__device__ __forceinline__ void quad_transpose(uint32_t (&w)[4]) {
  quad_transpose(reinterpret_cast<uint32_t (&)[1][4]>(w));
}

template <class Element>
__device__ __forceinline__ uint32_t round_pair(cutlass::Array<float, 2> const& pair) {
  cutlass::NumericArrayConverter<Element, float, 2> round;
  return reinterpret_cast<uint32_t const&>(static_cast<cutlass::Array<Element, 2> const&>(round(pair)));
}

template <class Element>
__device__ __forceinline__ uint32_t round_pair(float a, float b) {
  cutlass::Array<float, 2> pair;
  pair[0] = a, pair[1] = b;
  return round_pair<Element>(pair);
}

}  // namespace hopper_fa
