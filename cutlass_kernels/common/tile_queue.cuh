// Hands tiles to the warpgroups of a CTA: one warp draws them from a counter in global memory, all the others
// read them from shared memory, one tile ahead.
#pragma once

#include "common/pipeline.cuh"
#include "common/tile_scheduler.h"

namespace hopper_fa {

struct TileQueueStorage {
  uint64_t full[2], empty[2];
  Tile tile[2];  // m_block -1: no more tiles
};

__device__ __forceinline__ void init_tile_queue(TileQueueStorage& storage, int reader_warps) {
  for (int i = 0; i < 2; ++i) {
    EmptyBarrier::init(&storage.full[i], 1);
    EmptyBarrier::init(&storage.empty[i], reader_warps);
  }
}

// One whole warp of the CTA. workspace: [0] tiles drawn beyond each CTA's first, [1] CTAs that have run out.
class TileWriter {
  TileQueueStorage& storage_;
  TileScheduler const& scheduler_;
  int* const workspace_;
  RingCursor<2> cursor_;

 public:
  __device__ TileWriter(TileQueueStorage& storage, TileScheduler const& scheduler, int* workspace)
      : storage_(storage), scheduler_(scheduler), workspace_(workspace) {
    cursor_.phase = 1;
  }

  __device__ __forceinline__ int first() const { return blockIdx.x; }  // a launch has no more CTAs than tiles

  // The next tile, -1 if there is none: known to lane 0 until everyone() has it. Start it well before the
  // tile is needed: the atomic takes about a microsecond.
  __device__ __forceinline__ int draw() const {
    int const index = threadIdx.x % 32 == 0 ? gridDim.x + atomicAdd(&workspace_[0], 1) : 0;
    return index < scheduler_.num_tiles ? index : -1;
  }
  static __device__ __forceinline__ int everyone(int drawn) { return __shfl_sync(~0u, drawn, 0); }

  // Returns the tile that the readers get; index -1 ends their work.
  // NOTE: decoded here, because the divisions take half a microsecond, which nobody waits for on this side.
  __device__ __forceinline__ Tile publish(int index) {
    Tile const tile = index >= 0 ? scheduler_.get(index) : Tile{-1, 0, 0};
    EmptyBarrier::wait(&storage_.empty[cursor_.slot], cursor_.phase);
    if (threadIdx.x % 32 == 0) {
      storage_.tile[cursor_.slot] = tile;
      EmptyBarrier::arrive(&storage_.full[cursor_.slot]);
    }
    __syncwarp();
    cursor_.advance();
    return tile;
  }

  // After this CTA's last draw. The last CTA to come here leaves the workspace as it was found: zero.
  __device__ __forceinline__ void finish() const {
    if (threadIdx.x % 32 != 0) return;
    __threadfence();
    if (atomicAdd(&workspace_[1], 1) == gridDim.x - 1) workspace_[0] = 0, workspace_[1] = 0;
  }
};

// All threads of the computing warps.
class TileReader {
  TileQueueStorage& storage_;
  uint32_t read_ = 0;  // tiles. NOTE: not a RingCursor, which is a register more

 public:
  __device__ explicit TileReader(TileQueueStorage& storage) : storage_(storage) {}

  // False when there are no more.
  __device__ __forceinline__ bool next(Tile& tile) {
    uint32_t const slot = read_ % 2;
    EmptyBarrier::wait(&storage_.full[slot], read_ / 2 % 2);
    tile = storage_.tile[slot];
    __syncwarp();
    if (threadIdx.x % 32 == 0) EmptyBarrier::arrive(&storage_.empty[slot]);
    ++read_;
    // Through shuffles, so that the compiler knows that all lanes have the same.
    tile = {__shfl_sync(~0u, tile.m_block, 0), __shfl_sync(~0u, tile.head, 0),
            __shfl_sync(~0u, tile.batch, 0)};
    return tile.m_block >= 0;
  }
};

}  // namespace hopper_fa
