// The rotation of rows of Q and K: random signs, then Hadamard blocks.
//
// A Hadamard matrix of size 2^n is a step (a, b) -> (a + b, a - b) for each bit of the column. Bits 0 to 3
// are one product with the 16 x 16 matrix on the tensor cores, whose operand are the 16-bit elements
// themselves; the bits above are between registers of a thread. quantization.py has the rounding of that
// product.
#pragma once

#include <cute/arch/mma_sm80.hpp>
#include <type_traits>

#include "quantize/layout.h"
#include "quantize/numerics.cuh"

namespace hopper_fa {

// A warp's rows, 2048 elements: 32, 16 or 8 of them. A thread has 64 elements: of each of its rows, which are
// lane / 4 + 8 own for own < kOwn, columns 4 t to 4 t + 3 in every group of 16, t = lane % 4. x[h][j][i] is
// column(h, j) + i of row own(h, j), where h = 0, 1 are the two rows of a product's operand.
template <int kColumns>
struct WarpRows {
  static constexpr bool kHalves = kColumns == 256;
  static constexpr int kRows = 2048 / kColumns, kOwn = kRows / 8;
  static constexpr int kGroups = 8;
  static constexpr int kRowGroups = kColumns == 64 ? 4 : 8;  // neighbouring j that are of one row

  float x[2][kGroups][4];
  int row, quad;  // first row in the warp's, column in a group

  __device__ __forceinline__ WarpRows() : row(threadIdx.x % 32 / 4), quad(4 * (threadIdx.x % 4)) {}

  static __device__ __forceinline__ int own(int h, int j) { return kHalves ? 0 : h + 2 * (j / kRowGroups); }
  static __device__ __forceinline__ int group(int h, int j) {
    return j % kRowGroups + (kHalves ? h * kGroups : 0);
  }
  __device__ __forceinline__ int column(int h, int j) const { return kRotateGroup * group(h, j) + quad; }

  // f(element) for those of own row r.
  template <class F>
  __device__ __forceinline__ void for_row(int r, F&& f) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int j = 0; j < kGroups; ++j)
        if (own(h, j) == r)
#pragma unroll
          for (int i = 0; i < 4; ++i) f(x[h][j][i]);
  }

  // f(element, that column's element of a vector in shared memory, own row).
  template <class F>
  __device__ __forceinline__ void with_vector(float const* vector, F&& f) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float4 const v = *reinterpret_cast<float4 const*>(vector + column(h, j));
        int const r = own(h, j);
        f(x[h][j][0], v.x, r), f(x[h][j][1], v.y, r), f(x[h][j][2], v.z, r), f(x[h][j][3], v.w, r);
      }
  }
};

template <DType kDType>
using Mma = std::conditional_t<kDType == DType::kBF16, cute::SM80_16x8x16_F32BF16BF16F32_TN,
                               cute::SM80_16x8x16_F32F16F16F32_TN>;

// The 16 x 16 Hadamard matrix as B of two products m16n8k16.
// NOTE: element i of B's register of half k is column 4 t + 2 k + i of the input, and of D's of product n
// column 4 t + 2 n + i of the output, so that a thread gets the columns that it has.
template <DType kDType>
struct HadamardOperand {
  uint32_t b[2][2];  // [product][k half]

  __device__ __forceinline__ HadamardOperand() {
    constexpr uint32_t kOne = kDType == DType::kBF16 ? 0x3f80 : 0x3c00;
    int const lane = threadIdx.x % 32, t = lane % 4, n = lane / 4;
#pragma unroll
    for (int product = 0; product < 2; ++product)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const out = 4 * (n / 2) + 2 * product + n % 2, in = 4 * t + 2 * half;
        auto const entry = [&](int k) { return kOne | uint32_t(__popc(k & out) & 1) << 15; };
        b[product][half] = entry(in) | entry(in + 1) << 16;
      }
  }

  // The groups of two rows from their elements, two in a word.
  __device__ __forceinline__ void multiply(uint2 row0, uint2 row1, float (&d0)[4], float (&d1)[4]) const {
#pragma unroll
    for (int n = 0; n < 2; ++n)
      Mma<kDType>::fma(d0[2 * n], d0[2 * n + 1], d1[2 * n], d1[2 * n + 1], row0.x, row1.x, row0.y, row1.y,
                       b[n][0], b[n][1], 0.f, 0.f, 0.f, 0.f);
  }
};

__device__ __forceinline__ void butterfly(float& a, float& b) {
  float const sum = a + b;
  b = a - b;
  a = sum;
}

// x from raw 16-bit elements, rotated, without the blocks' factors. signs: of two columns a word, in their
// elements' sign bits. kWhole: head_dim is kColumns.
template <DType kDType, bool kWhole, int kColumns>
__device__ __forceinline__ void rotate_rows(WarpRows<kColumns>& rows,
                                            uint2 const (&raw)[2][WarpRows<kColumns>::kGroups],
                                            uint32_t const* signs, int head_dim) {
  using Rows = WarpRows<kColumns>;
  HadamardOperand<kDType> const matrix;
  auto& x = rows.x;
#pragma unroll
  for (int j = 0; j < Rows::kGroups; ++j) {
    uint2 signed_raw[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint2 const sign = *reinterpret_cast<uint2 const*>(signs + rows.column(h, j) / 2);
      signed_raw[h] = make_uint2(raw[h][j].x ^ sign.x, raw[h][j].y ^ sign.y);
    }
    matrix.multiply(signed_raw[0], signed_raw[1], x[0][j], x[1][j]);
  }
  auto const joined = [&](int group, int step) {
    return kWhole || kRotateGroup * step < hadamard_block(kRotateGroup * group, head_dim);
  };
#pragma unroll
  for (int step = 1; step < Rows::kRowGroups; step *= 2)
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int j = 0; j < Rows::kGroups; ++j)
        if (!(j & step) && joined(Rows::group(h, j), step))
#pragma unroll
          for (int i = 0; i < 4; ++i) butterfly(x[h][j][i], x[h][j + step][i]);
  if constexpr (Rows::kHalves) {
#pragma unroll
    for (int j = 0; j < Rows::kGroups; ++j)
      if (joined(j, Rows::kGroups))
#pragma unroll
        for (int i = 0; i < 4; ++i) butterfly(x[0][j][i], x[1][j][i]);
  }
}

// A float32 vector of head_dim elements into shared memory, zeros behind it; if it is to be rotated, by steps
// at distances 1, 2, 4, ... . All threads of the CTA, at least kColumns of them, which then synchronise.
// squared: with the squares of the blocks' factors, as products of two rotated vectors want them.
template <int kColumns>
__device__ __forceinline__ void share_vector(float const* vector, int head_dim, bool rotated,
                                             uint8_t const (&signs)[32], bool squared, float* scratch,
                                             float* shared) {
  int const c = threadIdx.x;
  float v = c < head_dim ? __ldcg(vector + c) : 0.f;
  if (!rotated) {
    if (c < kColumns) shared[c] = v;
    return;
  }
  int const block = hadamard_block(c, head_dim);
  if (c < head_dim && signs[c / 8] >> c % 8 & 1) v = -v;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    float const other = __shfl_xor_sync(~0u, v, distance);
    if (distance < block) v = c & distance ? other - v : v + other;
  }
  if (c < kColumns) scratch[c] = v;
  __syncthreads();
  if (c >= kColumns) return;
  constexpr int kWarps = kColumns / 32;
  float w[kWarps];
#pragma unroll
  for (int k = 0; k < kWarps; ++k) w[k] = scratch[c % 32 + 32 * k];
  // Only what leads to this column's sum.
#pragma unroll
  for (int left = kWarps / 2, distance = 32; left >= 1; left /= 2, distance *= 2)
#pragma unroll
    for (int k = 0; k < left; ++k) {
      float const low = w[2 * k], high = w[2 * k + 1];
      w[k] = distance < block ? (c & distance ? low - high : low + high) : c & distance ? high : low;
    }
  v = w[0];
  shared[c] = squared && c < head_dim ? v * (1.f / block) : v;
}

}  // namespace hopper_fa
