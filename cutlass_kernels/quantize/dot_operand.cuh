// Products of rows of Q with a vector, on the tensor cores.
#pragma once

#include "quantize/rotate.cuh"

namespace hopper_fa {

// A float32 vector as B of products whose rows are the 16-bit elements themselves: a column for each of three
// parts, 16-bit numbers that add up to 24 of the vector's bits (FP16: as many as its range holds). Of 256
// columns the lower rows of an operand are the upper columns, so three more for those.
template <int kColumns>
struct DotOperand {
  using Rows = WarpRows<kColumns>;
  uint2 b[Rows::kRowGroups][32];  // [group][lane], in the order of HadamardOperand

  // All threads of the CTA, which then synchronise.
  template <DType kDType>
  __device__ __forceinline__ void set(float const* vector, int head_dim) {
    for (int i = threadIdx.x; i < Rows::kRowGroups * 32; i += blockDim.x) {
      int const group = i / 32, t = i % 4, n = i % 32 / 4;
      int const column = kRotateGroup * (group + (n < 3 ? 0 : Rows::kGroups)) + 4 * t;
      bool const exists = (n < 3 || Rows::kHalves && n < 6) && column < head_dim;
      float4 const v =
          exists ? __ldcg(reinterpret_cast<float4 const*>(vector + column)) : make_float4(0, 0, 0, 0);
      int const part = n % 3;
      b[group][i % 32] = make_uint2(part_of<kDType>(v.x, part) | part_of<kDType>(v.y, part) << 16,
                                    part_of<kDType>(v.z, part) | part_of<kDType>(v.w, part) << 16);
    }
  }

  // Products of the thread's own rows with the vector.
  template <DType kDType>
  __device__ __forceinline__ void multiply(uint2 const (&raw)[2][Rows::kGroups],
                                           float (&dots)[Rows::kOwn]) const {
    constexpr int kProducts = Rows::kGroups / Rows::kRowGroups;  // of two rows each, or two halves of one
    float d[kProducts][4] = {};
#pragma unroll
    for (int j = 0; j < Rows::kGroups; ++j) {
      uint2 const with = b[j % Rows::kRowGroups][threadIdx.x % 32];
      float (&x)[4] = d[j / Rows::kRowGroups];
      Mma<kDType>::fma(x[0], x[1], x[2], x[3], raw[0][j].x, raw[1][j].x, raw[0][j].y, raw[1][j].y, with.x,
                       with.y, x[0], x[1], x[2], x[3]);
    }
    int const t = threadIdx.x % 4;
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
      float const(&x)[4] = d[product];  // columns 2 t, 2 t + 1 of both rows
      if constexpr (Rows::kHalves) {
        dots[0] = quad_sum(t == 0 ? x[0] + x[1] : t == 1 ? x[0] + x[3] : t == 2 ? x[2] + x[3] : 0.f);
      } else {
        dots[2 * product] = quad_sum(x[0] + x[1]), dots[2 * product + 1] = quad_sum(x[2] + x[3]);
      }
    }
  }

 private:
  // The bits of part 0, 1 or 2 of x.
  template <DType kDType>
  static __device__ __forceinline__ uint32_t part_of(float x, int part) {
    uint32_t bits = 0;
#pragma unroll
    for (int p = 0; p < 3; ++p) {
      uint32_t const nearest = nearest_16bit<kDType>(x);
      x -= unpack<kDType>(nearest).x;
      if (p == part) bits = nearest;
    }
    return bits;
  }
};

}  // namespace hopper_fa
