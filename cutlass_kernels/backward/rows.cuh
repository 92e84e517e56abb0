// The two small kernels around the main one: what it needs of every query row, and dQ in 16 bits.
#pragma once

#include "backward/epilogue.cuh"
#include "backward/traits.cuh"

namespace hopper_fa {

constexpr int kRowThreads = 256;

// For every query row: bias = -lse log2(e) and delta = sum(dO O) - dlse, so that
//   P = exp2(scale_log2 S + bias),   dS = P (dP - delta).
// Quantized: factor too, and delta times factor (codes.cuh).
// Rows that see no key and rows that only pad a block get bias -inf: their P is 0. Clears dQ's sum, or the
// counters that say whose part is the first. One CTA a query block of one head.
template <class Traits>
__global__ void __launch_bounds__(kRowThreads) prepare_rows(__grid_constant__ BackwardArguments const args) {
  using Element = typename Traits::Element;
  constexpr int kLanes = Traits::kHeadDim / 8;  // of a row, 16 bytes each
  int const head_batch = blockIdx.x / args.m_blocks, m_block = blockIdx.x % args.m_blocks;
  int const batch = head_batch / args.heads_q, head = head_batch % args.heads_q;

  if (args.stored) {
    if (threadIdx.x < Traits::kWarpgroups)
      args.stored[int64_t(blockIdx.x) * Traits::kWarpgroups + threadIdx.x] = 0;
  } else {
    auto* const sum = reinterpret_cast<float4*>(args.dq_sum + int64_t(blockIdx.x) * Traits::kChunks * kChunk);
    for (int i = threadIdx.x; i < Traits::kChunks * kChunk / 4; i += kRowThreads)
      sum[i] = make_float4(0, 0, 0, 0);
  }

  int const column = threadIdx.x % kLanes * 8;
  CUTE_UNROLL
  for (int i = 0; i < Traits::kBlockM; i += kRowThreads / kLanes) {
    int const in_block = i + threadIdx.x / kLanes;
    int const row = m_block * Traits::kBlockM + in_block;
    bool const exists = row < args.seqlen_q;
    float delta = 0;
    if (exists && column < args.head_dim) {
      uint4 const o = *reinterpret_cast<uint4 const*>(args.out.row(batch, head, row) + column);
      uint4 const g = *reinterpret_cast<uint4 const*>(args.dout_rows.row(batch, head, row) + column);
      auto const* const o8 = reinterpret_cast<Element const*>(&o);
      auto const* const g8 = reinterpret_cast<Element const*>(&g);
      CUTE_UNROLL
      for (int j = 0; j < 8; ++j) delta = fmaf(static_cast<float>(o8[j]), static_cast<float>(g8[j]), delta);
    }
    CUTE_UNROLL
    for (int lane = kLanes / 2; lane > 0; lane /= 2) delta += __shfl_xor_sync(~0u, delta, lane);
    if (column == 0) {
      float bias = -INFINITY;
      [[maybe_unused]] float factor = 0;
      if (exists) {
        int64_t const at = int64_t(head_batch) * args.seqlen_q + row;
        float lse = args.lse[at];
        if constexpr (Traits::kQuantized) {
          float const full = full_row_factor(args, batch, head, row);
          factor = full * power_of_two(-code_exponent<Element>(full, args.codes.dtype));
          // NOTE: -inf stays -inf unless the shift is infinite.
          if (args.codes.lse_shift && lse != -INFINITY) lse -= args.softmax_scale * args.codes.lse_shift[at];
        }
        if (lse != -INFINITY) bias = -lse * 1.44269504088896341f;
        if (args.dlse) delta -= args.dlse[at];
      }
      int64_t const to = int64_t(blockIdx.x) * Traits::kBlockM + in_block;
      if constexpr (Traits::kQuantized) {
        args.factor[to] = factor;
        if constexpr (!Traits::kSplit) delta *= factor;  // split: P brings it
      }
      args.bias[to] = bias;
      args.delta[to] = bias == -INFINITY ? 0.f : delta;
    }
  }
}

// A chunk of dQ's sum into a fragment from `first` on, where it exists: else no key is seen by any of the
// rows.
template <class Traits, class Fragment>
__device__ __forceinline__ void read_sum(BackwardArguments const& args, int64_t block, int chunk,
                                         Fragment& dq, int first) {
  float4 const* const sum =
      reinterpret_cast<float4 const*>(args.dq_sum + (block * Traits::kChunks + chunk) * kChunk) + threadIdx.x;
  bool exists = true;
  if (args.stored) exists = args.stored[block * Traits::kWarpgroups + chunk / Traits::kWarpgroupChunks] != 0;
  CUTE_UNROLL
  for (int octet = 0; octet < 8; ++octet) {
    float4 const four = exists ? sum[octet * 128] : make_float4(0, 0, 0, 0);
    int const i = first + 4 * octet;
    dq(i) = four.x, dq(i + 1) = four.y, dq(i + 2) = four.z, dq(i + 3) = four.w;
  }
}

// dQ of 64 rows from the sum over all keys of dS' K' (codes.cuh). One warpgroup 64 rows, as all columns of a
// row are rotated together.
template <class Traits>
__global__ void __launch_bounds__(128) finish_quantized_dq(__grid_constant__ BackwardArguments const args) {
  constexpr int kGroups = Traits::kBlockM / 64;
  int const block = blockIdx.x / kGroups, group = blockIdx.x % kGroups;
  int const head_batch = block / args.m_blocks, m_block = block % args.m_blocks;
  int const batch = head_batch / args.heads_q, head = head_batch % args.heads_q;
  int const first_row = m_block * Traits::kBlockM + group * 64;
  Tensor dq = make_tensor<float>(Int<Traits::kHeadDim / 2>{});
  CUTE_UNROLL
  for (int slab = 0; slab < Traits::kSlabs; ++slab)
    read_sum<Traits>(args, block, group * Traits::kSlabs + slab, dq, 32 * slab);
  if (args.codes.rotated) rotate_back(dq, args.head_dim, args.codes.signs);
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r) {
    int const row = first_row + row_in_tile() + 8 * r;
    float const factor = args.factor[int64_t(block) * Traits::kBlockM + group * 64 + row_in_tile() + 8 * r];
    // NOTE: 0 where softmax_scale is, and in rows past the end.
    float const inverse = factor == 0 ? 0.f : args.softmax_scale / factor;
    CUTE_UNROLL
    for (int i = 2 * r; i < Traits::kHeadDim / 2; i += 4) dq(i) *= inverse, dq(i + 1) *= inverse;
    // The rows of dS add up to the gradient of LSE, so what all keys have in common enters by that alone.
    if (args.dlse && args.codes.k_mean && row < args.seqlen_q) {
      int64_t const at = int64_t(head_batch) * args.seqlen_q + row;
      float const dlse = args.lse[at] == -INFINITY ? 0.f : args.softmax_scale * args.dlse[at];
      int const kv_head = batch * (args.heads_q / args.q_heads_per_kv) + head / args.q_heads_per_kv;
      float const* const mean = args.codes.k_mean + int64_t(kv_head) * args.head_dim + 2 * (threadIdx.x % 4);
      CUTE_UNROLL
      for (int octet = 0; octet < Traits::kHeadDim / 8; ++octet)
        if (8 * octet < args.head_dim)
          for (int i = 0; i < 2; ++i) dq(4 * octet + 2 * r + i) += dlse * mean[8 * octet + i];
    }
  }
  store_rows<typename Traits::Element>(args.dq, batch, head, first_row, args.seqlen_q, args.head_dim, dq,
                                       1.f);
}

// dQ = softmax_scale times its sum. One warpgroup a chunk.
template <class Traits>
__global__ void __launch_bounds__(128) finish_dq(__grid_constant__ BackwardArguments const args) {
  int const chunk = blockIdx.x % Traits::kChunks, block = blockIdx.x / Traits::kChunks;
  int const head_batch = block / args.m_blocks, m_block = block % args.m_blocks;
  int const first_row = m_block * Traits::kBlockM + chunk / Traits::kSlabs * 64;
  int const first_column = chunk % Traits::kSlabs * 64;
  Tensor dq = make_tensor<float>(Int<32>{});
  read_sum<Traits>(args, block, chunk, dq, 0);
  store_rows<typename Traits::Element>(args.dq, head_batch / args.heads_q, head_batch % args.heads_q,
                                       first_row, args.seqlen_q, args.head_dim, dq, args.softmax_scale,
                                       first_column);
}

}  // namespace hopper_fa
