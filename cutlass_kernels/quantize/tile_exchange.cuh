// What the warps that share a block's scale tell each other.
#pragma once

#include <cute/arch/cluster_sm90.hpp>

#include "common/pipeline.cuh"

namespace hopper_fa {

// Numbers of all warps that share a tile, be they of one CTA or of a cluster's two, from each warp's own.
struct TileExchange {
  uint32_t of_warps[2][32];  // of even and odd tiles
  uint64_t arrived[2];       // of a cluster's

  // All threads of the CTA call both before they exchange, loads in between.
  // NOTE: an arrival that is not relaxed would wait for those.
  __device__ __forceinline__ void start(int ctas) {
    if (ctas == 1) return;
    if (threadIdx.x < 2) FullBarrier::init(&arrived[threadIdx.x], 1);
    cutlass::arch::fence_barrier_init();
    __syncwarp();
    cute::cluster_arrive_relaxed();
  }
  __device__ __forceinline__ void wait_for_start(int ctas) {
    if (ctas > 1) cute::cluster_wait();
  }

  // Of warp `lane`, of `warps` in `ctas` CTAs; 0 above. own: this is warp `warp` of them. n: tiles before
  // this one. NOTE: a cluster's own barrier would wait until the rows of the tile before are written to
  // global memory.
  __device__ __forceinline__ uint32_t exchange(uint32_t own, int warp, int warps, int ctas, int n) {
    int const lane = threadIdx.x % 32;
    uint32_t (&numbers)[32] = of_warps[n % 2];
    if (ctas == 1) {
      if (lane == 0) numbers[warp] = own;
      __syncthreads();
    } else {
      uint64_t* const all = &arrived[n % 2];
      if (threadIdx.x == 0) FullBarrier::arrive_and_expect_tx(all, warps * sizeof(uint32_t));
      if (lane < ctas)
        cute::store_shared_remote(own, cute::cast_smem_ptr_to_uint(&numbers[warp]),
                                  cute::cast_smem_ptr_to_uint(all), lane);
      FullBarrier::wait(all, n / 2 % 2);
    }
    return lane < warps ? const_cast<uint32_t volatile&>(numbers[lane]) : 0;
  }
};

}  // namespace hopper_fa
