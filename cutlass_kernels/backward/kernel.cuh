// The backward's main kernel: warp roles and barriers. A CTA a key block; loader.cuh, the mainloops and
// dq_sum.cuh are its parts.
//
//   warpgroup 0, warp 0        TMA: K and V once, Q and dO block by block
//   warpgroup 0, warp 1        of an 8-bit forward: scales the rows' numbers by the keys' factor
//   warpgroup 0, warps 2, 3    add warpgroup 1's and 2's part of dQ to global memory
//   warpgroups 1, 2            the products
//   warpgroup 3                dQ, where there is one
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "backward/codes.cuh"
#include "backward/dq_sum.cuh"
#include "backward/loader.cuh"
#include "backward/mainloop_dq.cuh"
#include "backward/mainloop_keys.cuh"
#include "backward/mainloop_split.cuh"

namespace hopper_fa {

template <class Traits>
__device__ __forceinline__ void init_barriers(typename Traits::SharedStorage& shared) {
  constexpr int kWarps = 4;
  FullBarrier::init(&shared.k_full, 1);
  FullBarrier::init(&shared.v_full, 1);
  for (int i = 0; i < Traits::kTile.q_stages; ++i) {
    FullBarrier::init(&shared.q_full[i], Traits::kQuantized ? 2 : 1);
    FullBarrier::init(&shared.rows_full[i], 1);
    EmptyBarrier::init(&shared.q_empty[i], kWarps * Traits::kWarpgroups);
  }
  for (int i = 0; i < Traits::kTile.do_stages; ++i) {
    FullBarrier::init(&shared.do_full[i], 1);
    EmptyBarrier::init(&shared.do_empty[i], kWarps * Traits::kWarpgroups);
  }
  for (int wg = 0; wg < Traits::kWarpgroups; ++wg) {
    EmptyBarrier::init(&shared.dq_full[wg], kWarps);
    EmptyBarrier::init(&shared.dq_empty[wg], 1);
  }
  EmptyBarrier::init(&shared.p_full, kWarps);
  EmptyBarrier::init(&shared.p_empty, kWarps);
  for (int i = 0; i < Traits::kTile.ds_stages; ++i) {
    // Split: one warpgroup writes, both read. Else both write, and the one for dQ reads.
    EmptyBarrier::init(&shared.ds_full[i], kWarps * (Traits::kSplit ? 1 : Traits::kWarpgroups));
    EmptyBarrier::init(&shared.ds_empty[i], kWarps * (Traits::kSplit ? Traits::kWarpgroups : 1));
  }
  cutlass::arch::fence_barrier_init();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    backward_kernel(__grid_constant__ BackwardArguments const args) {
  // NOTE: the array itself and no rounded address, through which ordinary loads and stores would no longer be
  // known to be of shared memory.
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_bytes);
  // NOTE: through a shuffle, so that the compiler knows the warp's role is uniform.
  int const warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) {
    init_barriers<Traits>(shared);
    shared.tile = KeyTile::get(args, Traits::kBlockM, Traits::kBlockN);
    if constexpr (Traits::kQuantized)
      shared.key_factor =
          key_factor<Traits>(args.codes, shared.tile.n_block, shared.tile.head, shared.tile.batch);
  }
  __syncthreads();

  if (warp < 4) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kTile.producer_registers>();
    if (warp == 0) load_blocks<Traits>(args, shared);
    if (Traits::kQuantized && warp == 1) scale_rows_by_keys<Traits>(args, shared);
    if (warp >= 2 && elect_one_sync()) add_dq<Traits>(args, shared, warp - 2);
  } else if (Traits::kDqApart && warp >= 12) {
    if constexpr (Traits::kDqApart) {
      cutlass::arch::warpgroup_reg_dealloc<Traits::kTile.dq_registers>();
      DqMainloop<Traits>(shared).run(args);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kTile.consumer_registers>();
    using Mainloop = std::conditional_t<Traits::kSplit, SplitMainloop<Traits>, KeysMainloop<Traits>>;
    Mainloop(args, shared, warp / 4 - 1).run();
  }
}

}  // namespace hopper_fa
