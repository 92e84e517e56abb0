// The loading warpgroup where it also makes dQ = dS K and adds it to global memory: the computing warpgroups
// have more registers than beside a warpgroup of its own for dQ.
//
//   step i:   dS of the step is there
//             chunk 0 of dQ; warp 0 loads Q and dO of step i + 2, whose slots step i has left
//             chunk 1 of dQ
//   a chunk:  multiply; to shared memory; one thread adds it to global memory
#pragma once

#include "backward/loader.cuh"
#include "backward/scores.cuh"

namespace hopper_fa {

template <class Traits>
class DqLoader {
  using Shared = typename Traits::SharedStorage;
  using Chunk = decltype(partition_fragment_C(typename Traits::MmaQueries{}, Shape<_64, _64>{}));
  static constexpr int kStages = Traits::kTile.q_stages;
  static_assert(Traits::kChunks == 2 && Traits::kTile.do_stages == kStages);

  BackwardArguments const& args_;
  Shared& shared_;
  bool const loads_, adds_;
  RingCursor<kStages> q_ring_, do_ring_;
  RingCursor<Traits::kTile.ds_stages> ds_ring_;
  int load_member_ = 0, load_step_ = 0;  // what to load next: query head of the group, step of its walk
  int before_ = -1;                      // query block whose turn is still to be passed on

 public:
  __device__ DqLoader(BackwardArguments const& args, Shared& shared)
      : args_(args), shared_(shared), loads_(threadIdx.x < 32), adds_(threadIdx.x == 32) {
    q_ring_.phase = do_ring_.phase = 1;
  }

  __device__ __forceinline__ void run() {
    KeyTile const& tile = shared_.tile;
    if (tile.walk.count == 0) return;
    if (loads_) {
      load_keys<Traits>(args_, shared_);
      CUTE_NO_UNROLL
      for (int i = 0; i < kStages; ++i) load_next();
    }
    FullBarrier::wait(&shared_.k_full, 0);
    tile.for_each_step(args_, [&](int head, int m_block) {
      int const block = (tile.batch * args_.heads_q + head) * args_.m_blocks + m_block;
      EmptyBarrier::wait(&shared_.ds_full[ds_ring_.slot], ds_ring_.phase);
      make_chunk<0>(block, m_block);
      make_chunk<1>(block, m_block);
      ds_ring_.advance();
      if (adds_ && args_.turns) pass_turns(block);
      __syncwarp();
    });
    if (!adds_) return;
    wait_added<0>();
    if (before_ >= 0) pass_turn(turn(before_));
  }

 private:
  template <int kIndex>
  __device__ __forceinline__ void make_chunk(int block, int m_block) {
    Chunk dq;
    issue_dq<Traits>(shared_.ds[ds_ring_.slot], shared_.k, kIndex, dq);
    wait_product<0>(dq);
    if constexpr (kIndex == 0) {
      if (loads_) load_next();
    } else {
      arrive_warp(shared_.ds_empty[ds_ring_.slot]);
    }
    // Of this thread's additions only that of the other buffer may still be reading shared memory.
    if (adds_) tma_store_wait<1>();
    __syncwarp();
    meet();
    put_chunk(dq, shared_.dq[kIndex]);
    tma_store_fence();
    meet();
    if (adds_) {
      if (kIndex == 0 && args_.turns) wait_turn(turn(block), turn_of<Traits>(args_, shared_.tile, m_block));
      bulk_add(args_.dq_sum + (int64_t(block) * Traits::kChunks + kIndex) * kChunk, shared_.dq[kIndex],
               kChunk * sizeof(float));
    }
    __syncwarp();  // products want whole warps
  }

  static __device__ __forceinline__ void meet() { asm volatile("bar.sync 1, 128;" ::: "memory"); }

  __device__ __forceinline__ void load_next() {
    KeyTile const& tile = shared_.tile;
    if (load_member_ == args_.q_heads_per_kv) return;
    load_queries<Traits>(args_, shared_, tile.head * args_.q_heads_per_kv + load_member_,
                         tile.walk.block(load_step_), q_ring_, do_ring_);
    if (++load_step_ == tile.walk.count) load_step_ = 0, ++load_member_;
  }

  // NOTE: one counter of the two a query block has: one thread adds both chunks.
  __device__ __forceinline__ int* turn(int block) const {
    return args_.turns + int64_t(block) * Traits::kWarpgroups;
  }

  // As in add_dq: causal turns a step late, full ones at once.
  __device__ __forceinline__ void pass_turns(int block) {
    if (args_.causal) {
      wait_added<Traits::kChunks>();
      if (before_ >= 0) pass_turn(turn(before_));
      before_ = block;
    } else {
      wait_added<0>();
      pass_turn(turn(block));
    }
  }
};

}  // namespace hopper_fa
