// Hands tiles to the warpgroups of a CTA: one warp draws them from a counter in global memory, all the others
// read them from shared memory, one tile ahead.
#pragma once

#include "common/pipeline.cuh"
#include "common/tile_scheduler.h"

namespace hopper_fa {

// What a computing warpgroup does of a tile.
struct WarpgroupTile {
  int row;           // its first query row; negative: there are no more tiles
  int head, batch;   // of Q
  BlockRange range;  // of its 64 rows
  int tile_end;      // key blocks [0, tile_end) come into shared memory
};

template <int kWarpgroups>
struct TileQueueStorage {
  static constexpr int kWords = 8;  // of which a WarpgroupTile takes 6
  static_assert(sizeof(WarpgroupTile) <= 4 * kWords);

  uint64_t full[2], empty[2];
  int words[2][kWarpgroups][kWords];
};

template <int kWarpgroups>
__device__ __forceinline__ void init_tile_queue(TileQueueStorage<kWarpgroups>& storage, int reader_warps) {
  for (int i = 0; i < 2; ++i) {
    EmptyBarrier::init(&storage.full[i], 1);
    EmptyBarrier::init(&storage.empty[i], reader_warps);
  }
}

// One whole warp of the CTA. workspace: [0] tiles drawn beyond each CTA's first, [1] CTAs that have run out.
template <int kWarpgroups>
class TileWriter {
  TileQueueStorage<kWarpgroups>& storage_;
  TileScheduler const& scheduler_;
  int* const workspace_;
  uint32_t published_ = 0;  // tiles. NOTE: not a RingCursor, which is a register more

 public:
  __device__ TileWriter(TileQueueStorage<kWarpgroups>& storage, TileScheduler const& scheduler,
                        int* workspace)
      : storage_(storage), scheduler_(scheduler), workspace_(workspace) {}

  __device__ __forceinline__ int first() const { return blockIdx.x; }  // a launch has no more CTAs than tiles

  // Draws the next tile, which everyone() then tells. Start it well before the tile is needed: the atomic
  // takes about a microsecond.
  __device__ __forceinline__ int draw() const {
    return threadIdx.x % 32 == 0 ? atomicAdd(&workspace_[0], 1) : 0;
  }
  // -1: there is none.
  __device__ __forceinline__ int everyone(int drawn) const {
    int const index = gridDim.x + __shfl_sync(~0u, drawn, 0);
    return index < scheduler_.num_tiles ? index : -1;
  }

  // The readers get their parts of a tile; index -1 ends their work. Returns the first one's, but for its
  // range. range(row, rows): BlockRange of some rows. tile_rows: of a tile. NOTE: worked out here, because it
  // takes half a microsecond, which nobody waits for on this side.
  template <class Range>
  __device__ __forceinline__ WarpgroupTile publish(int index, int tile_rows, Range range) {
    WarpgroupTile part = {-64 * kWarpgroups};
    if (index >= 0) {
      Tile const tile = scheduler_.get(index);
      int const row = tile.m_block * tile_rows;
      part = {row, tile.head, tile.batch, {}, range(row, tile_rows).end};
    }
    uint32_t const slot = published_ % 2;
    EmptyBarrier::wait(&storage_.empty[slot], ~published_ / 2 % 2);
    int const lane = threadIdx.x % 32;
    if (lane < kWarpgroups)
      *reinterpret_cast<WarpgroupTile*>(storage_.words[slot][lane]) = {
          part.row + 64 * lane, part.head, part.batch, range(part.row + 64 * lane, 64), part.tile_end};
    __syncwarp();  // the lane that arrives speaks for all
    if (lane == 0) EmptyBarrier::arrive(&storage_.full[slot]);
    ++published_;
    return part;
  }

  // After this CTA's last draw. The last CTA to come here leaves the workspace as it was found: zero.
  __device__ __forceinline__ void finish() const {
    if (threadIdx.x % 32 != 0) return;
    __threadfence();
    if (atomicAdd(&workspace_[1], 1) == gridDim.x - 1) workspace_[0] = 0, workspace_[1] = 0;
  }
};

// All threads of the computing warps.
template <int kWarpgroups>
class TileReader {
  TileQueueStorage<kWarpgroups>& storage_;
  int const warpgroup_;
  uint32_t read_ = 0;  // tiles

 public:
  __device__ TileReader(TileQueueStorage<kWarpgroups>& storage, int warpgroup)
      : storage_(storage), warpgroup_(warpgroup) {}

  // False when there are no more.
  __device__ __forceinline__ bool next(WarpgroupTile& tile) {
    uint32_t const slot = read_ % 2;
    EmptyBarrier::wait(&storage_.full[slot], read_ / 2 % 2);
    int const word = storage_.words[slot][warpgroup_][threadIdx.x % TileQueueStorage<kWarpgroups>::kWords];
    __syncwarp();
    if (threadIdx.x % 32 == 0) EmptyBarrier::arrive(&storage_.empty[slot]);
    ++read_;
    // Through shuffles, so that the compiler knows that all lanes have the same.
    auto const field = [&](int i) { return __shfl_sync(~0u, word, i); };
    tile = {field(0), field(1), field(2), {field(3), field(4)}, field(5)};
    return tile.row >= 0;
  }
};

}  // namespace hopper_fa
