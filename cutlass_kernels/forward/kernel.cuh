// The forward kernel: warp roles and barriers. loader.cuh, mainloop.cuh and epilogue.cuh are its three parts.
//
//   warpgroup 0, one warp      TMA: Q, and K/V blocks into a ring, for every tile of the CTA
//   warpgroups 1..             64 query rows each: QK, softmax, PV; then O and LSE to global memory
//
// CTAs are persistent: each draws tiles until none is left (tile_queue.cuh), and loads the next one's while
// this one finishes.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "forward/loader.cuh"
#include "forward/mainloop.cuh"
#include "forward/mainloop_fp8.cuh"

namespace hopper_fa {

template <class Traits>
__device__ __forceinline__ void init_barriers(typename Traits::SharedStorage& shared, int warpgroups) {
  constexpr int kWarps = 4;
  for (int i = 0; i < Traits::kQStages; ++i)
    for (int wg = 0; wg < Traits::kWarpgroups; ++wg) {
      FullBarrier::init(&shared.q_full[i][wg], 1);
      EmptyBarrier::init(&shared.q_empty[i][wg], kWarps);
    }
  for (int i = 0; i < Traits::kStages; ++i) {
    FullBarrier::init(&shared.kv_full[i], 1);
    EmptyBarrier::init(&shared.kv_empty[i], kWarps * warpgroups);
  }
  init_tile_queue(shared.tiles, kWarps * warpgroups);
  cutlass::arch::fence_barrier_init();
}

template <class Traits, class StartTile, class Refill, class LastLoads>
__device__ __forceinline__ void compute_tiles(typename Traits::Arguments const& args,
                                              typename Traits::SharedStorage& shared, int warpgroup,
                                              StartTile start_tile, Refill refill, LastLoads last_loads) {
  std::conditional_t<Traits::kFp8, Fp8Mainloop<Traits>, Mainloop<Traits>> mainloop(args, shared, warpgroup);
  TileReader<Traits::kWarpgroups> reader(shared.tiles, warpgroup);
  for (WarpgroupTile tile;;) {
    bool const more = reader.next(tile);
    // NOTE: the last tile's store too must have read shared memory. In every tile, because ptxas keeps the
    // tile in vector registers, and spills, if this stands behind the loop or a branch.
    if constexpr (Traits::kTile.store == Store::kPlace) tma_store_wait<0>();
    if (!more) break;
    start_tile(tile);
    mainloop.run(tile, refill);
  }
  last_loads();
  mainloop.flush();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    forward_kernel(__grid_constant__ typename Traits::Arguments const args) {
  // NOTE: the array itself and no rounded address, through which ordinary loads and stores would no longer be
  // known to be of shared memory, and which is made anew in every block.
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_bytes);
  using Writer = TileWriter<Traits::kWarpgroups>;
  auto const publish = [&](Writer& writer, int index) {
    return writer.publish(index, 64 * args.warpgroups, [&](int row, int rows) {
      return block_range(row, rows, args.seqlen_q, args.seqlen_k, args.causal, Traits::kBlockN);
    });
  };
  // NOTE: through a shuffle, so that the compiler knows the warp's role is uniform.
  int const warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) init_barriers<Traits>(shared, args.warpgroups);
  if (threadIdx.x == 32 && args.seqlen_k > 0) {  // without keys there are no maps of K and V
    prefetch_tma_descriptor(&args.q);
    prefetch_tma_descriptor(&args.k);
    prefetch_tma_descriptor(&args.v);
  }
  __syncthreads();

  if constexpr (Traits::kSpecialised) {
    if (warp < 4) {
      cutlass::arch::warpgroup_reg_dealloc<Traits::kTile.producer_registers>();
      if (warp == 0) {
        Loader<Traits> loader(args, shared);
        Writer writer(shared.tiles, args.scheduler, args.workspace);
        for (int index = writer.first(); index >= 0;) {
          int const drawn = writer.draw();
          int const turns = loader.start_tile(publish(writer, index));
          for (int turn = 0; turn < turns; ++turn) loader.load_turn(turn);
          index = writer.everyone(drawn);
        }
        publish(writer, -1);
        loader.flush();
        writer.finish();
      }
    } else {
      cutlass::arch::warpgroup_reg_alloc<Traits::kTile.consumer_registers>();
      int const warpgroup = warp / 4 - 1;
      if (warpgroup < args.warpgroups)
        compute_tiles<Traits>(args, shared, warpgroup, [](WarpgroupTile const&) {}, [](int) {}, [] {});
    }
  } else {
    // The ablation: warp 0 computes like the others and issues the loads between its turns.
    int const warpgroup = warp / 4;
    if (warpgroup >= args.warpgroups) return;
    constexpr int kAhead = Traits::kStages / 2;  // turns the ring holds
    Loader<Traits> loader(args, shared);
    Writer writer(shared.tiles, args.scheduler, args.workspace);
    int turns = 0;
    if (warp == 0) publish(writer, writer.first());
    auto const start_tile = [&](WarpgroupTile const& tile) {
      if (warp != 0) return;
      turns = loader.start_tile(tile);
      for (int turn = 0; turn < min(kAhead, turns); ++turn) loader.load_turn(turn);
      publish(writer, writer.everyone(writer.draw()));
    };
    // By turn t every warpgroup can finish turn t - 1 unaided, so the slots that one used come free.
    auto const refill = [&](int turn) {
      int const next = turn - 1 + kAhead;
      if (warp == 0 && turn > 0 && next < turns) loader.load_turn(next);
    };
    auto const last_loads = [&] {
      if (warp == 0) loader.flush();
    };
    compute_tiles<Traits>(args, shared, warpgroup, start_tile, refill, last_loads);
    if (warp == 0) writer.finish();
  }
}

}  // namespace hopper_fa
