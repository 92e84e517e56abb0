// The loading side: one warp walks the tiles of its CTA and has TMA copy Q and, block by block, K and V into
// the ring.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "forward/traits.cuh"

namespace hopper_fa {

// NOTE: the whole warp runs this, and one elected lane issues. So loop counters and addresses stay in uniform
// registers, where TMA wants them; run by a lone thread the same loop took about three times the
// instructions.
template <class Traits>
class Loader {
  using Shared = typename Traits::SharedStorage;

  typename Traits::Arguments const& args_;
  Shared& shared_;
  RingCursor<Traits::kStages> ring_;
  RingCursor<Traits::kQStages> q_ring_;
  RingCursor<Traits::kQStages + 1> affine_ring_;

  struct Block {
    int index, head, batch;  // head of K and V
  };
  WarpgroupTile tile_;  // the first warpgroup's part
  Block first_;         // of the tile's blocks, which are loaded last to first
  Block v_ = {-1};      // 16 bit: V block that follows the next K block; index -1: none

 public:
  __device__ Loader(typename Traits::Arguments const& args, Shared& shared) : args_(args), shared_(shared) {
    ring_.phase = q_ring_.phase = 1;
  }

  // Returns how many turns of K and V blocks the tile has. tile: the first warpgroup's part.
  __device__ __forceinline__ int start_tile(WarpgroupTile const& tile) {
    tile_ = tile;
    first_ = {tile.tile_end - 1, tile.head / args_.q_heads_per_kv, tile.batch};
    return tile.tile_end;
  }

  // What the warpgroups read in their turn-th turn of the tile: a K block and its V block, with overlap that
  // of the turn before, which may be the tile before's (16 bit); in the first turn Q too.
  // NOTE: K first, because Q's scales (8 bit) are waited for. With one stage Q comes last: it waits until the
  // tile before is done with its own, and nothing else may wait for that.
  __device__ __forceinline__ void load_turn(int turn) {
    Block const block = {first_.index - turn, first_.head, first_.batch};
    load_k(block);
    if (Traits::kQStages > 1 && turn == 0) load_q();
    if constexpr (Traits::kTile.overlap) {
      if constexpr (Traits::kFp8) {  // a tile's last V does not wait for the next tile's K
        if (turn > 0) load_v({block.index + 1, block.head, block.batch});
        if (block.index == 0) load_v(block);
      } else {
        if (v_.index >= 0) load_v(v_);
        v_ = block;
      }
    } else {
      load_v(block);
    }
    if (Traits::kQStages == 1 && turn == 0) load_q();
  }

  // After the last tile: the V block that is still due.
  __device__ __forceinline__ void flush() {
    if (v_.index >= 0) load_v(v_);
  }

 private:
  using Element = typename Traits::Element;

  // Q of every warpgroup in use, and what it dequantises scores with.
  __device__ __forceinline__ void load_q() {
    // NOTE: before Q's place is waited for, so that nobody waits for these loads.
    float2 next = load_scales(0);
    CUTE_UNROLL
    for (int wg = 0; wg < Traits::kWarpgroups; ++wg) {
      if (wg >= args_.warpgroups) break;
      float2 const scales = next;
      if (wg + 1 < Traits::kWarpgroups) next = load_scales(wg + 1);
      uint64_t& full = shared_.q_full[q_ring_.slot][wg];
      EmptyBarrier::wait(&shared_.q_empty[q_ring_.slot][wg], q_ring_.phase);
      if constexpr (Traits::kFp8) store_scales(scales, wg);
      if (elect_one_sync()) {
        uint32_t const affine_bytes = Traits::kFp8 ? args_.head_dim * sizeof(float) : 0;
        FullBarrier::arrive_and_expect_tx(&full, sizeof(shared_.q[0][0]) + 2 * affine_bytes);
        copy_slabs(args_.q, full, shared_.q[q_ring_.slot][wg], 64, tile_.row + 64 * wg, tile_.head,
                   tile_.batch, TMA::CacheHintSm90::EVICT_FIRST);
        if constexpr (Traits::kFp8) {
          int64_t const channels = (int64_t(tile_.batch) * args_.heads_kv + first_.head) * args_.head_dim;
          auto& affine = shared_.v_affine[affine_ring_.slot][wg];
          SM90_BULK_COPY_G2S::copy(args_.fp8.v_scale + channels, &full, affine[0], affine_bytes);
          SM90_BULK_COPY_G2S::copy(args_.fp8.v_mean + channels, &full, affine[1], affine_bytes);
        }
      }
      __syncwarp();
    }
    q_ring_.advance();
    affine_ring_.advance();
  }

  // Dequantisation of two of a warpgroup's rows, a lane.
  __device__ __forceinline__ float2 load_scales(int wg) const {
    if constexpr (!Traits::kFp8) return {};
    ScaleRef const& q_scale = args_.fp8.q_scale;
    float const* const of_head =
        q_scale.data + (tile_.batch * q_scale.batch_stride + tile_.head * q_scale.head_stride);
    auto const of_row = [&](int row) {
      return __ldg(of_head + (min(row, args_.seqlen_q - 1) >> args_.q_group_shift) * q_scale.group_stride);
    };
    int const row = tile_.row + 64 * wg + threadIdx.x % 32;
    return {of_row(row), of_row(row + 32)};
  }
  __device__ __forceinline__ void store_scales(float2 scales, int wg) {
    ScaleRef const& k_scale = args_.fp8.k_scale;
    float const scale_log2 = Traits::kTile.key_vectors ? 1.f : args_.scale_log2;
    float* const of_rows = shared_.q_scales[q_ring_.slot][wg] + threadIdx.x % 32;
    of_rows[0] = scales.x * scale_log2;
    of_rows[32] = scales.y * scale_log2;
    shared_.k_scales[q_ring_.slot][wg] =
        tile_.batch * k_scale.batch_stride + first_.head * k_scale.head_stride;
    __syncwarp();  // the lane that arrives speaks for all
  }

  __device__ __forceinline__ void load_k(Block const& block) {
    fill_slot(Traits::kKBytes + Traits::kKeyVectorBytes, [&](uint64_t& full, uint8_t* slot) {
      copy_slabs(args_.k, full, reinterpret_cast<Element*>(slot), Traits::kBlockN,
                 block.index * Traits::kBlockN, block.head, block.batch, TMA::CacheHintSm90::EVICT_LAST);
      if constexpr (Traits::kTile.key_vectors) {
        constexpr int kBytes = Traits::kKeyVectorBytes / 2;
        SM90_BULK_COPY_G2S::copy(key_vector(args_.fp8.k_scale, block, block.head), &full,
                                 slot + Traits::kKBytes, kBytes);
        SM90_BULK_COPY_G2S::copy(key_vector(args_.key_bias, block, tile_.head), &full,
                                 slot + Traits::kKBytes + kBytes, kBytes);
      }
    });
  }

  static __device__ __forceinline__ float const* key_vector(ScaleRef const& of_blocks, Block const& block,
                                                            int head) {
    return of_blocks.data + (block.batch * of_blocks.batch_stride + head * of_blocks.head_stride +
                             block.index * of_blocks.group_stride);
  }

  __device__ __forceinline__ void load_v(Block const& block) {
    fill_slot(sizeof(shared_.kv[0]), [&](uint64_t& full, uint8_t* slot) {
      if constexpr (Traits::kFp8) {  // rows of keys
        CUTE_UNROLL
        for (int row = 0; row < Traits::kVRows; row += Traits::kVBoxRows)
          SM90_TMA_LOAD_4D::copy(&args_.v, &full, static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_LAST),
                                 slot + row * Traits::kBlockN, block.index * Traits::kBlockN, row, block.head,
                                 block.batch);
      } else {
        copy_slabs(args_.v, full, reinterpret_cast<Element*>(slot), Traits::kBlockN,
                   block.index * Traits::kBlockN, block.head, block.batch, TMA::CacheHintSm90::EVICT_LAST);
      }
    });
  }

  // Has copy(barrier, slot) load `bytes` into the next slot of the ring once that is free.
  template <class Copy>
  __device__ __forceinline__ void fill_slot(uint32_t bytes, Copy copy) {
    uint64_t& full = shared_.kv_full[ring_.slot];
    EmptyBarrier::wait(&shared_.kv_empty[ring_.slot], ring_.phase);
    if (elect_one_sync()) {
      FullBarrier::arrive_and_expect_tx(&full, bytes);
      copy(full, shared_.kv[ring_.slot]);
    }
    __syncwarp();
    ring_.advance();
  }

  __device__ __forceinline__ void copy_slabs(CUtensorMap const& map, uint64_t& barrier, Element* smem,
                                             int rows, int row, int head, int batch,
                                             TMA::CacheHintSm90 hint) {
    constexpr int kColumns = Traits::kSlabColumns;
    CUTE_UNROLL
    for (int i = 0; i < Traits::kSlabs; ++i)
      SM90_TMA_LOAD_4D::copy(&map, &barrier, static_cast<uint64_t>(hint), smem + i * rows * kColumns,
                             i * kColumns, row, head, batch);
  }
};

}  // namespace hopper_fa
