// Shared-memory barriers and the ring of K/V blocks that connects the loading warp with the computing
// warpgroups.
#pragma once

#include <cutlass/arch/barrier.h>

namespace hopper_fa {

using FullBarrier = cutlass::arch::ClusterTransactionBarrier;  // bytes landed
using EmptyBarrier = cutlass::arch::ClusterBarrier;            // every reader is done

// Position in a ring of kStages slots. The phase bit flips every time round; a fresh reader waits for phase
// 0, a fresh writer for phase 1 (which an untouched barrier passes at once).
template <int kStages>
struct RingCursor {
  int slot = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (kStages == 1 || ++slot == kStages) slot = 0, phase ^= 1;
  }
};

// A warp is done with something.
__device__ __forceinline__ void arrive_warp(uint64_t& barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) EmptyBarrier::arrive(&barrier);
}

// Turn-taking of the computing warpgroups on the tensor cores: one named barrier a warpgroup, 128 threads
// wait on it and the 128 of the warpgroup before arrive on it.
struct Baton {
  int warpgroup, count;  // count 1: nobody to take turns with

  static constexpr int kFirstId = 1;  // 0 is __syncthreads

  __device__ __forceinline__ void start() const {  // the first warpgroup may go first
    if (count > 1 && warpgroup == count - 1) pass();
  }
  // NOTE: the same with the numbers as immediates: no register, where a warpgroup has none left.
  __device__ __forceinline__ void take_immediate() const {
    if (count < 2) return;
    if (warpgroup == 0)
      asm volatile("bar.sync 1, 256;" ::: "memory");
    else if (warpgroup == 1)
      asm volatile("bar.sync 2, 256;" ::: "memory");
    else if (warpgroup == 2)
      asm volatile("bar.sync 3, 256;" ::: "memory");
    else
      asm volatile("bar.sync 4, 256;" ::: "memory");
  }
  __device__ __forceinline__ void take() const {
    if (count > 1) asm volatile("bar.sync %0, 256;" ::"r"(kFirstId + warpgroup) : "memory");
  }
  __device__ __forceinline__ void pass() const {
    int const next = warpgroup + 1 == count ? 0 : warpgroup + 1;
    if (count > 1) asm volatile("bar.arrive %0, 256;" ::"r"(kFirstId + next) : "memory");
  }
};

}  // namespace hopper_fa
