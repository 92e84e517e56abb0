// What both mainloops do with scores: operands of their products, P and dS element by element, dS to shared
// memory. Scores are transposed: a row a key.
#pragma once

#include "backward/traits.cuh"
#include "common/exp2.cuh"
#include "common/fragment.cuh"
#include "common/mask.cuh"

namespace hopper_fa {

// A operand: 64 rows of a block of K or V, from `first` on.
template <class Traits>
__device__ __forceinline__ auto key_rows(typename Traits::Element const* block, int first) {
  Tensor all =
      make_tensor(make_smem_ptr(block + first * 64), typename Traits::template LayoutRows<Traits::kBlockN>{});
  Tensor mine = local_tile(all, Shape<_64, Int<Traits::kHeadDim>>{}, make_coord(_0{}, _0{}));
  auto thread = typename Traits::template MmaScores<64>{}.get_slice(0);
  return thread.make_fragment_A(thread.partition_A(mine));
}

// B operand: kRows rows of a block of Q or dO, from `first` on.
template <class Traits, int kRows>
__device__ __forceinline__ auto query_rows(typename Traits::Element const* block, int first) {
  Tensor all =
      make_tensor(make_smem_ptr(block + first * 64), typename Traits::template LayoutRows<Traits::kBlockM>{});
  Tensor mine = local_tile(all, Shape<Int<kRows>, Int<Traits::kHeadDim>>{}, make_coord(_0{}, _0{}));
  auto thread = typename Traits::template MmaScores<kRows>{}.get_slice(0);
  return thread.make_fragment_B(thread.partition_B(mine));
}

// B operand: a part's rows of a block of Q or dO, from `first` on, transposed.
template <class Traits>
__device__ __forceinline__ auto query_columns(typename Traits::Element const* block, int first) {
  Tensor all = make_tensor(make_smem_ptr(block + first * 64),
                           typename Traits::template LayoutColumns<Traits::kHeadDim, Traits::kBlockM>{});
  Tensor mine =
      local_tile(all, Shape<Int<Traits::kHeadDim>, Int<Traits::kPartQueries>>{}, make_coord(_0{}, _0{}));
  auto thread = typename Traits::MmaKeys{}.get_slice(0);
  return thread.make_fragment_B(thread.partition_B(mine));
}

// A chunk of dQ = dS K: 64 query rows by 64 columns.
template <class Traits, class Chunk>
__device__ __forceinline__ void issue_dq(typename Traits::Element const* ds,
                                         typename Traits::Element const* k, int chunk, Chunk& dq) {
  using Layout = typename Traits::template LayoutColumns<64, Traits::kBlockN>;
  int const row_group = chunk / Traits::kSlabs, slab = chunk % Traits::kSlabs;
  auto thread = typename Traits::MmaQueries{}.get_slice(0);
  Tensor a = make_tensor(make_smem_ptr(ds + row_group * 64 * Traits::kBlockN), Layout{});
  Tensor b = make_tensor(make_smem_ptr(k + slab * 64 * Traits::kBlockN), Layout{});
  issue_product(typename Traits::MmaQueries{}, thread.make_fragment_A(thread.partition_A(a)),
                thread.make_fragment_B(thread.partition_B(b)), dq, false);
}

// S to P in place: 64 keys from first_key on by up to 64 queries from `first` on of query block m, whose Q is
// in the stage q_slot.
template <class Traits, class Scores>
__device__ __forceinline__ void probabilities(BackwardArguments const& args,
                                              typename Traits::SharedStorage const& shared, int first_key,
                                              int m, int first, int q_slot, Scores& s) {
  constexpr int kSize = decltype(size(s))::value;
  int const first_row = m * Traits::kBlockM + first, column = first + 2 * (threadIdx.x % 4);
  float const* const bias = shared.bias[q_slot] + column;
  float scale = args.scale_log2;
  if constexpr (Traits::kQuantized) scale = shared.factor[q_slot][first];
  CUTE_UNROLL
  for (int octet = 0; octet < kSize / 4; ++octet) {
    float2 const b = *reinterpret_cast<float2 const*>(bias + 8 * octet);
    float2 factor = make_float2(scale, scale);
    if constexpr (Traits::kRowFactors)
      factor = *reinterpret_cast<float2 const*>(shared.factor[q_slot] + column + 8 * octet);
    CUTE_UNROLL
    for (int i = 4 * octet; i < 4 * octet + 4; ++i)
      s(i) = fmaf(s(i), i % 2 ? factor.y : factor.x, i % 2 ? b.y : b.x);
  }
  int const shift = args.seqlen_k - args.seqlen_q;
  // NOTE: keys past the end are masked although they are zeros: exp2(0 + bias) may be infinite.
  if (first_key + 63 >= args.seqlen_k || (args.causal && first_key + 63 > first_row + shift)) {
    int hidden[2];
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      int const key = first_key + row_in_tile() + 8 * r;
      hidden[r] = key >= args.seqlen_k ? 64 : args.causal ? key - shift - first_row : 0;
    }
    mask_transposed(s, hidden);
  }
  CUTE_UNROLL
  for (int i = 0; i < kSize; ++i) s(i) = exp2_sfu(s(i));
}

// Two neighbouring elements of dS = P (dP - delta), rounded.
template <class Element>
__device__ __forceinline__ uint32_t score_gradients(float p0, float p1, float dp0, float dp1, float2 delta) {
  return round_pair<Element>(p0 * (dp0 - delta.x), p1 * (dp1 - delta.y));
}
// The same times factors, which delta has already.
template <class Element>
__device__ __forceinline__ uint32_t score_gradients(float p0, float p1, float dp0, float dp1, float2 delta,
                                                    float2 factor) {
  return round_pair<Element>(p0 * fmaf(dp0, factor.x, -delta.x), p1 * fmaf(dp1, factor.y, -delta.y));
}

// dS of 64 keys by 64 queries to shared memory, 128 bytes a key in WGMMA's 128-byte swizzle. Four 8 x 8
// matrices at a time, 16 keys by two octets of queries: lane i has the address of row i % 8 of matrix i / 8.
template <class Element, class Operand>
__device__ __forceinline__ void write_ds(Operand const& ds, Element* first_row, unsigned thread) {
  int const lane = thread % 32;
  Element* const row = first_row + (thread % 128 / 32 * 16 + lane % 16) * 64;
  auto words = recast<uint32_t>(ds);
  CUTE_UNROLL
  for (int octet = 0; octet < decltype(size(words))::value / 2; octet += 2) {
    int const swizzled = (octet + lane / 16) ^ (lane % 8);
    SM90_U32x4_STSM_N::copy(words(2 * octet), words(2 * octet + 1), words(2 * octet + 2),
                            words(2 * octet + 3), *reinterpret_cast<uint128_t*>(row + swizzled * 8));
  }
}

// A chunk to shared memory in fragment order, 16 bytes a thread and octet of columns.
template <class Chunk>
__device__ __forceinline__ void put_chunk(Chunk const& x, float* to) {
  CUTE_UNROLL
  for (int octet = 0; octet < 8; ++octet)
    reinterpret_cast<float4*>(to)[octet * 128 + threadIdx.x % 128] =
        make_float4(x(4 * octet), x(4 * octet + 1), x(4 * octet + 2), x(4 * octet + 3));
}

// The same with every column times its factor, or that of the first.
template <bool kEvery, class Chunk>
__device__ __forceinline__ void put_scaled_chunk(Chunk const& x, float const* factors, float* to) {
  CUTE_UNROLL
  for (int octet = 0; octet < 8; ++octet) {
    float2 f = make_float2(factors[0], factors[0]);
    if constexpr (kEvery) f = *reinterpret_cast<float2 const*>(factors + 8 * octet + 2 * (threadIdx.x % 4));
    int const i = 4 * octet;
    reinterpret_cast<float4*>(to)[octet * 128 + threadIdx.x % 128] =
        make_float4(x(i) * f.x, x(i + 1) * f.y, x(i + 2) * f.x, x(i + 3) * f.y);
  }
}

}  // namespace hopper_fa
