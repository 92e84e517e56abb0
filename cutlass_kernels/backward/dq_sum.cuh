// dQ's sum in global memory. Of the copying warpgroup, one warp a computing warpgroup adds its chunks of dQ
// to it; and, where the kernel finishes dQ itself, one more makes dQ of the sums that are complete.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "backward/traits.cuh"
#include "common/fragment.cuh"

namespace hopper_fa {

__device__ __forceinline__ void bulk_add(float* global, float const* smem, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
               "r"(cast_smem_ptr_to_uint(smem)), "r"(bytes)
               : "memory");
  tma_store_arrive();
}

__device__ __forceinline__ int load_acquire(int const* from) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

// Deterministic mode: `done` counts the key blocks that have added to a query block. Waits for its turn.
__device__ __forceinline__ void wait_turn(int const* done, int mine) {
  while (load_acquire(done) != mine) {
  }
  // NOTE: what follows goes through the asynchronous proxy.
  asm volatile("fence.proxy.async.global;" ::: "memory");
}
__device__ __forceinline__ void pass_turn(int* done) {
  asm volatile("fence.proxy.async.global;" ::: "memory");
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(done) : "memory");
}

// Who stores the first part of a sum, where no turns say so. The one that claims it has its first chunk at
// hand and needs no other CTA for the rest; all others wait until it is stored. Further parts are counted
// from kStored on, if somebody asks which is the last.
enum Sum : int { kNothing = 0, kBeingStored = 1, kStored = 2 };

// Whether the caller is to store. `state` was the sum's a while ago.
__device__ __forceinline__ bool claim_sum(int* sum, int state) {
  if (state == kNothing)
    asm volatile("atom.acquire.gpu.global.cas.b32 %0, [%1], %2, %3;"
                 : "=r"(state)
                 : "l"(sum), "r"(kNothing), "r"(kBeingStored)
                 : "memory");
  if (state == kNothing) return true;
  while (state < kStored) state = load_acquire(sum);
  asm volatile("fence.proxy.async.global;" ::: "memory");
  return false;
}
__device__ __forceinline__ void announce_sum(int* sum) {
  asm volatile("fence.proxy.async.global;" ::: "memory");
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(sum), "r"(kStored) : "memory");
}

// One more part of a sum is complete. Whether that was the last of `parts`, when `before_first` stands in the
// counter of a sum without parts.
__device__ __forceinline__ bool count_part(int* sum, int before_first, int parts) {
  int counted;
  asm volatile("fence.proxy.async.global;" ::: "memory");
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(counted) : "l"(sum) : "memory");
  return counted + 1 == before_first + parts;
}

// The turn of this CTA's key block at a query block.
template <class Traits>
__device__ __forceinline__ int turn_of(BackwardArguments const& args, KeyTile const& tile, int m_block) {
  return dq_turn(tile.walk, tile.n_block, args.n_blocks, m_block, args.seqlen_q, args.seqlen_k,
                 Traits::kBlockM, Traits::kBlockN, args.group_size);
}

// Until at most kPending of this thread's bulk additions have not been carried out in global memory.
template <int kPending>
__device__ __forceinline__ void wait_added() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// One thread: has a half of a complete chunk brought to shared memory for the finishing warp; head -1: tells
// it that no more will come from here.
// NOTE: tickets of several adding warps are consecutive, so no two of them wait for the same slot.
template <class Traits>
__device__ __forceinline__ void fetch_half(typename Traits::SharedStorage& shared, float const* sum, int head,
                                           int row, int column) {
  uint32_t const ticket = atomicAdd(&shared.tickets, 1u);
  uint32_t const slot = ticket % kSumSlots;
  EmptyBarrier::wait(&shared.sum_empty[slot], ~(ticket / kSumSlots) & 1);
  shared.half_of[slot] = {head, row, column};
  if (head < 0) return EmptyBarrier::arrive(&shared.sum_full[slot]);
  FullBarrier::arrive_and_expect_tx(&shared.sum_full[slot], sizeof(shared.sum[0]));
  SM90_BULK_COPY_G2S::copy(sum, &shared.sum_full[slot], shared.sum[slot], sizeof(shared.sum[0]));
}

// One thread: counts this key block's part of a warpgroup's sum; after the last one dQ can be made of it.
template <class Traits>
__device__ __forceinline__ void count_and_fetch(BackwardArguments const& args,
                                                typename Traits::SharedStorage& shared, int* sum, int block,
                                                int warpgroup) {
  int const head_batch = block / args.m_blocks, m_block = block - head_batch * args.m_blocks;
  int const parts = dq_parts(m_block, args.n_blocks, args.seqlen_q, args.seqlen_k, Traits::kBlockM,
                             Traits::kBlockN, args.causal);
  if (!count_part(sum, args.turns ? 0 : kBeingStored, parts)) return;
  asm volatile("fence.proxy.async.global;" ::: "memory");
  CUTE_NO_UNROLL
  for (int i = 0; i < 2 * Traits::kWarpgroupChunks; ++i) {
    int const half = 2 * Traits::kWarpgroupChunks * warpgroup + i, chunk = half / 2;
    fetch_half<Traits>(shared, args.dq_sum + (int64_t(block) * Traits::kChunks * 2 + half) * (kChunk / 2),
                       head_batch - shared.tile.batch * args.heads_q,
                       m_block * Traits::kBlockM + chunk / Traits::kSlabs * 64,
                       chunk % Traits::kSlabs * 64 + half % 2 * 32);
  }
}

// One thread: takes the chunks of dQ that a warpgroup leaves in shared memory and adds them to the sum, or
// stores them if they are its first; in deterministic mode when it is this key block's turn.
template <class Traits>
__device__ __forceinline__ void add_dq(BackwardArguments const& args, typename Traits::SharedStorage& shared,
                                       int warpgroup) {
  KeyTile const& tile = shared.tile;
  float const* const from = shared.dq[warpgroup];
  uint32_t phase = 0;
  int before = -1;  // query block whose turn is still to be passed on, or whose part is not counted yet
  constexpr bool kStoreFirst = Traits::kTile.store_first, kFinish = Traits::kTile.finish_inside;
  auto const turn = [&](int block) { return args.turns + (block * Traits::kWarpgroups + warpgroup); };
  auto const sum = [&](int block) { return args.stored + (block * Traits::kWarpgroups + warpgroup); };
  auto const count = [&](int block) { count_and_fetch<Traits>(args, shared, sum(block), block, warpgroup); };
  tile.for_each_step(args, [&](int head, int m_block) {
    int const block = (tile.batch * args.heads_q + head) * args.m_blocks + m_block;
    bool first = false;
    int state = kStored;
    if (args.turns) {
      int const mine = turn_of<Traits>(args, tile, m_block);
      wait_turn(turn(block), mine);
      first = kStoreFirst && mine == 0;
    } else if (kStoreFirst) {
      state = load_acquire(sum(block));
    }
    // NOTE: unrolled it would spill: 24 registers.
    CUTE_NO_UNROLL
    for (int i = 0; i < Traits::kWarpgroupChunks; ++i) {
      int const chunk = block * Traits::kChunks + warpgroup * Traits::kWarpgroupChunks + i;
      FullBarrier::wait(&shared.dq_full[warpgroup], phase);
      phase ^= 1;
      if (kStoreFirst && !args.turns && i == 0) first = claim_sum(sum(block), state);
      float* const to = args.dq_sum + int64_t(chunk) * kChunk;
      if (first) {
        SM90_BULK_COPY_S2G::copy(from, to, kChunk * sizeof(float));
        tma_store_arrive();
      } else {
        bulk_add(to, from, kChunk * sizeof(float));
      }
      tma_store_wait<0>();  // read; shared memory is free
      EmptyBarrier::arrive(&shared.dq_empty[warpgroup]);
    }
    // NOTE: causal turns are passed on a step late, since an addition takes about a step to arrive. Full ones
    // are not: all CTAs of a group might wait for each other in a circle.
    if constexpr (kFinish) {
      // Nor is a first part counted late, for which others wait.
      bool const late = args.turns ? args.causal : !first;
      if (late)
        wait_added<Traits::kWarpgroupChunks>();
      else
        wait_added<0>();
      if (before >= 0) count(before);
      before = late ? block : -1;
      if (!late) count(block);
    } else if (args.turns && args.causal) {
      wait_added<Traits::kWarpgroupChunks>();
      if (before >= 0) pass_turn(turn(before));
      before = block;
    } else if (args.turns) {
      wait_added<0>();
      pass_turn(turn(block));
    } else if (first) {
      wait_added<0>();
      announce_sum(sum(block));
    }
  });
  wait_added<0>();
  if constexpr (kFinish) {
    if (before >= 0) count(before);
    fetch_half<Traits>(shared, nullptr, -1, 0, 0);
  } else if (before >= 0) {
    pass_turn(turn(before));
  }
}

// One warp: dQ = softmax_scale times its sum, of 64 rows and 32 columns at a time.
template <class Traits>
__device__ __forceinline__ void finish_sums(BackwardArguments const& args,
                                            typename Traits::SharedStorage& shared) {
  using Element = typename Traits::Element;
  RingCursor<kSumSlots> ring;
  int const lane = threadIdx.x % 32;
  for (int adding = Traits::kWarpgroups; adding > 0; ring.advance()) {
    FullBarrier::wait(&shared.sum_full[ring.slot], ring.phase);
    HalfChunk const half = shared.half_of[ring.slot];
    if (half.head >= 0) {
      auto const* from = reinterpret_cast<float4 const*>(shared.sum[ring.slot]) + lane;
      int rows = args.seqlen_q - (half.row + lane / 4);  // that exist from this thread's first one on
      int const octets = (args.head_dim - half.column) / 8;
      uint16_t* out[2];
      out[0] = args.dq.row(shared.tile.batch, half.head, half.row + lane / 4) + half.column + 2 * (lane % 4);
      out[1] = out[0] + 8 * args.dq.row_stride;
      // NOTE: not unrolled for want of registers; and without a transpose across the quad, which would be
      // most of the instructions here: two stores of 4 bytes a lane fill a sector of L2.
      CUTE_NO_UNROLL
      for (int warp = 0; warp < 4; ++warp) {  // that made these 16 rows
        CUTE_UNROLL
        for (int octet = 0; octet < 4; ++octet) {
          float4 const four = from[octet * 128];
          uint32_t const words[2] = {
              round_pair<Element>(four.x * args.softmax_scale, four.y * args.softmax_scale),
              round_pair<Element>(four.z * args.softmax_scale, four.w * args.softmax_scale)};
          CUTE_UNROLL
          for (int r = 0; r < 2; ++r)
            if (8 * r < rows && octet < octets) *reinterpret_cast<uint32_t*>(out[r] + 8 * octet) = words[r];
        }
        rows -= 16, from += 32;
        out[0] += 16 * args.dq.row_stride, out[1] += 16 * args.dq.row_stride;
      }
    } else {
      --adding;
    }
    arrive_warp(shared.sum_empty[ring.slot]);
  }
}

}  // namespace hopper_fa
