// The two small kernels around the main one: what it needs of every query row, and dQ in 16 bits.
#pragma once

#include "backward/epilogue.cuh"
#include "backward/traits.cuh"

namespace hopper_fa {

constexpr int kRowThreads = 256;

// For every query row: bias = -lse log2(e) and delta = sum(dO O) - dlse, so that
//   P = exp2(scale_log2 S + bias),   dS = P (dP - delta).
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
      if (exists) {
        int64_t const at = int64_t(head_batch) * args.seqlen_q + row;
        float const lse = args.lse[at];
        if (lse != -INFINITY) bias = -lse * 1.44269504088896341f;
        if (args.dlse) delta -= args.dlse[at];
      }
      int64_t const to = int64_t(blockIdx.x) * Traits::kBlockM + in_block;
      args.bias[to] = bias;
      args.delta[to] = bias == -INFINITY ? 0.f : delta;
    }
  }
}

// dQ = softmax_scale times its sum. One warpgroup a chunk.
template <class Traits>
__global__ void __launch_bounds__(128) finish_dq(__grid_constant__ BackwardArguments const args) {
  int const chunk = blockIdx.x % Traits::kChunks, block = blockIdx.x / Traits::kChunks;
  int const head_batch = block / args.m_blocks, m_block = block % args.m_blocks;
  int const first_row = m_block * Traits::kBlockM + chunk / Traits::kSlabs * 64;
  int const first_column = chunk % Traits::kSlabs * 64;
  float4 const* const sum =
      reinterpret_cast<float4 const*>(args.dq_sum + int64_t(blockIdx.x) * kChunk) + threadIdx.x;
  Tensor dq = make_tensor<float>(Int<32>{});
  bool sum_exists = true;  // else no key is seen by any of the rows
  if (args.stored)
    sum_exists = args.stored[int64_t(block) * Traits::kWarpgroups + chunk / Traits::kWarpgroupChunks] != 0;
  CUTE_UNROLL
  for (int octet = 0; octet < 8; ++octet) {
    float4 const four = sum_exists ? sum[octet * 128] : make_float4(0, 0, 0, 0);
    dq(4 * octet) = four.x, dq(4 * octet + 1) = four.y;
    dq(4 * octet + 2) = four.z, dq(4 * octet + 3) = four.w;
  }
  store_rows<typename Traits::Element>(args.dq, head_batch / args.heads_q, head_batch % args.heads_q,
                                       first_row, args.seqlen_q, args.head_dim, dq, args.softmax_scale,
                                       first_column);
}

}  // namespace hopper_fa
