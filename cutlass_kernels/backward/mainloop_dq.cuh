// A warpgroup that does nothing but dQ = dS K, from both computing warpgroups' dS.
//
//   chunk by chunk, 64 queries by 64 columns:   multiply; leave it in shared memory, from where another warp
//                                               adds it to global memory
#pragma once

#include "backward/scores.cuh"

namespace hopper_fa {

template <class Traits>
class DqMainloop {
  using Shared = typename Traits::SharedStorage;
  using Chunk = decltype(partition_fragment_C(typename Traits::MmaQueries{}, Shape<_64, _64>{}));

  Shared& shared_;
  RingCursor<Traits::kTile.ds_stages> ds_ring_;
  uint32_t dq_phase_ = 1;

 public:
  __device__ explicit DqMainloop(Shared& shared) : shared_(shared) {}

  __device__ __forceinline__ void run(BackwardArguments const& args) {
    int const steps = args.q_heads_per_kv * shared_.tile.walk.count;
    if (steps == 0) return;
    FullBarrier::wait(&shared_.k_full, 0);
    CUTE_NO_UNROLL
    for (int step = 0; step < steps; ++step) {
      EmptyBarrier::wait(&shared_.ds_full[ds_ring_.slot], ds_ring_.phase);
      // Each adding warp has its chunks, one after the other.
      CUTE_UNROLL
      for (int i = 0; i < Traits::kWarpgroupChunks; ++i) {
        CUTE_UNROLL
        for (int adder = 0; adder < Traits::kWarpgroups; ++adder)
          make_chunk(adder * Traits::kWarpgroupChunks + i, adder,
                     i == Traits::kWarpgroupChunks - 1 && adder == Traits::kWarpgroups - 1);
        dq_phase_ ^= 1;
      }
      ds_ring_.advance();
    }
  }

 private:
  __device__ __forceinline__ void make_chunk(int chunk, int adder, bool last) {
    Chunk dq;
    issue_dq<Traits>(shared_.ds[ds_ring_.slot], shared_.k, chunk, dq);
    wait_product<0>(dq);
    if (last) arrive_warp(shared_.ds_empty[ds_ring_.slot]);
    EmptyBarrier::wait(&shared_.dq_empty[adder], dq_phase_);
    put_chunk(dq, shared_.dq[adder]);
    tma_store_fence();
    arrive_warp(shared_.dq_full[adder]);
  }
};

}  // namespace hopper_fa
