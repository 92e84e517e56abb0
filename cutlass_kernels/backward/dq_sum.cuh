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

// One thread: tells the finishing warp which sum is complete, -1: that there will be no more from here.
// NOTE: tickets of several adding warps are consecutive, so no two of them wait for the same slot.
template <class Traits>
__device__ __forceinline__ void post(typename Traits::SharedStorage& shared, int sum) {
  uint32_t const ticket = atomicAdd(&shared.mails, 1u);
  uint32_t const slot = ticket % kMailSlots;
  EmptyBarrier::wait(&shared.mail_empty[slot], ~(ticket / kMailSlots) & 1);
  shared.mail[slot] = sum;
  EmptyBarrier::arrive(&shared.mail_full[slot]);
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
  auto const count = [&](int block) {
    int const parts = dq_parts(block % args.m_blocks, args.n_blocks, args.seqlen_q, args.seqlen_k,
                               Traits::kBlockM, Traits::kBlockN, args.causal);
    if (count_part(sum(block), args.turns ? 0 : kBeingStored, parts))
      post<Traits>(shared, block * Traits::kWarpgroups + warpgroup);
  };
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
    post<Traits>(shared, -1);
  } else if (before >= 0) {
    pass_turn(turn(before));
  }
}

// One warp: a chunk of dQ = softmax_scale times its sum, which lies in shared memory.
template <class Traits>
__device__ __forceinline__ void store_sum(BackwardArguments const& args, int chunk, float const* sum) {
  using Element = typename Traits::Element;
  int const block = chunk / Traits::kChunks, head_batch = block / args.m_blocks;
  int const in_block = chunk % Traits::kChunks, lane = threadIdx.x % 32;
  int row =
      (block - head_batch * args.m_blocks) * Traits::kBlockM + in_block / Traits::kSlabs * 64 + lane / 4;
  uint16_t* out = args.dq.row(head_batch / args.heads_q, head_batch % args.heads_q, row);
  float4 const* from = reinterpret_cast<float4 const*>(sum) + lane;
  // NOTE: not unrolled for want of registers.
  CUTE_NO_UNROLL
  for (int warp = 0; warp < 4; ++warp) {  // that had made these 16 rows
    CUTE_NO_UNROLL
    for (int octet = 0; octet < 8; octet += 4) {
      uint32_t words[2][4];
      CUTE_UNROLL
      for (int j = 0; j < 4; ++j) {
        float4 const four = from[(octet + j) * 128];
        words[0][j] = round_pair<Element>(four.x * args.softmax_scale, four.y * args.softmax_scale);
        words[1][j] = round_pair<Element>(four.z * args.softmax_scale, four.w * args.softmax_scale);
      }
      int const column = in_block % Traits::kSlabs * 64 + 8 * (octet + lane % 4);
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        quad_transpose(words[r]);
        if (row + 8 * r < args.seqlen_q && column < args.head_dim)
          *reinterpret_cast<uint4*>(out + 8 * r * args.dq.row_stride + column) =
              make_uint4(words[r][0], words[r][1], words[r][2], words[r][3]);
      }
    }
    row += 16;
    out += 16 * args.dq.row_stride;
    from += 32;
  }
}

// One warp: makes dQ of every sum that is complete, chunk by chunk through shared memory.
template <class Traits>
__device__ __forceinline__ void finish_sums(BackwardArguments const& args,
                                            typename Traits::SharedStorage& shared) {
  constexpr uint32_t kChunkBytes = kChunk * sizeof(float);
  RingCursor<kMailSlots> mail;
  uint32_t phase = 0;
  for (int adding = Traits::kWarpgroups; adding > 0;) {
    FullBarrier::wait(&shared.mail_full[mail.slot], mail.phase);
    int const sum = shared.mail[mail.slot];
    arrive_warp(shared.mail_empty[mail.slot]);
    mail.advance();
    if (sum < 0) {
      --adding;
      continue;
    }
    CUTE_NO_UNROLL
    for (int i = 0; i < Traits::kWarpgroupChunks; ++i) {
      int const chunk = sum * Traits::kWarpgroupChunks + i;
      if (elect_one_sync()) {
        // NOTE: the additions went through the asynchronous proxy, and so does the copy.
        asm volatile("fence.proxy.async.global;" ::: "memory");
        FullBarrier::arrive_and_expect_tx(&shared.sum_full, kChunkBytes);
        SM90_BULK_COPY_G2S::copy(args.dq_sum + int64_t(chunk) * kChunk, &shared.sum_full, shared.sum,
                                 kChunkBytes);
      }
      __syncwarp();
      FullBarrier::wait(&shared.sum_full, phase);
      phase ^= 1;
      store_sum<Traits>(args, chunk, shared.sum);
      __syncwarp();  // all lanes have read
    }
  }
}

}  // namespace hopper_fa
