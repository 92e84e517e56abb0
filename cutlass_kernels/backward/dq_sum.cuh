// dQ's sum in global memory: of the copying warpgroup, one warp a computing warpgroup adds its chunks of dQ
// to it.
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
// hand and needs no other CTA for the rest; all others wait until it is stored.
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

// How the parts of a sum come together: onto zeros; the first to come is stored; in turns, and turn 0 stores.
enum class Adding { kOntoZeros, kStoreFirst, kInTurns };

// One thread: takes the chunks of dQ that a warpgroup leaves in shared memory and adds them to the sum.
// NOTE: a loop for each way, because what a step takes here delays the warpgroup: it waits for its chunk to
// be read before it can leave the next one (d256: asking for the way in every step cost 8%).
template <class Traits, Adding kAdding>
__device__ __forceinline__ void add_chunks(BackwardArguments const& args,
                                           typename Traits::SharedStorage& shared, int warpgroup) {
  KeyTile const& tile = shared.tile;
  float const* const from = shared.dq[warpgroup];
  uint32_t phase = 0;
  int before = -1;  // query block whose turn is still to be passed on
  auto const turn = [&](int block) { return args.turns + (block * Traits::kWarpgroups + warpgroup); };
  auto const sum = [&](int block) { return args.stored + (block * Traits::kWarpgroups + warpgroup); };
  tile.for_each_step(args, [&](int head, int m_block) {
    int const block = (tile.batch * args.heads_q + head) * args.m_blocks + m_block;
    float* to =
        args.dq_sum + int64_t(block * Traits::kChunks + warpgroup * Traits::kWarpgroupChunks) * kChunk;
    bool first = false;
    int state = kStored;
    if constexpr (kAdding == Adding::kInTurns) {
      int const mine = turn_of<Traits>(args, tile, m_block);
      wait_turn(turn(block), mine);
      first = mine == 0;
    } else if constexpr (kAdding == Adding::kStoreFirst) {
      state = load_acquire(sum(block));
    }
    // NOTE: unrolled it would spill: 24 registers.
    CUTE_NO_UNROLL
    for (int i = 0; i < Traits::kWarpgroupChunks; ++i) {
      FullBarrier::wait(&shared.dq_full[warpgroup], phase);
      phase ^= 1;
      if (kAdding == Adding::kStoreFirst && i == 0) first = claim_sum(sum(block), state);
      if (first) {
        SM90_BULK_COPY_S2G::copy(from, to, kChunk * sizeof(float));
        tma_store_arrive();
      } else {
        bulk_add(to, from, kChunk * sizeof(float));
      }
      to += kChunk;
      tma_store_wait<0>();  // read; shared memory is free
      EmptyBarrier::arrive(&shared.dq_empty[warpgroup]);
    }
    // NOTE: causal turns are passed on a step late, since an addition takes about a step to arrive. Full ones
    // are not: all CTAs of a group might wait for each other in a circle.
    if (kAdding == Adding::kInTurns && args.causal) {
      wait_added<Traits::kWarpgroupChunks>();
      if (before >= 0) pass_turn(turn(before));
      before = block;
    } else if (kAdding == Adding::kInTurns) {
      wait_added<0>();
      pass_turn(turn(block));
    } else if (first) {
      wait_added<0>();
      announce_sum(sum(block));
    }
  });
  wait_added<0>();
  if (before >= 0) pass_turn(turn(before));
}

template <class Traits>
__device__ __forceinline__ void add_dq(BackwardArguments const& args, typename Traits::SharedStorage& shared,
                                       int warpgroup) {
  if (args.turns)
    add_chunks<Traits, Adding::kInTurns>(args, shared, warpgroup);
  else if (!Traits::kSplit || args.stored)
    add_chunks<Traits, Adding::kStoreFirst>(args, shared, warpgroup);
  else
    add_chunks<Traits, Adding::kOntoZeros>(args, shared, warpgroup);
}

}  // namespace hopper_fa
