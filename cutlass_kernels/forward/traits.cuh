// What one forward instance is made of: its row of the tile table turned into types.
#pragma once

#include <cuda.h>
#include <cutlass/numeric_conversion.h>
#include <cutlass/numeric_types.h>

#include "common/pipeline.cuh"
#include "common/tile_queue.cuh"
#include "common/tile_scheduler.h"
#include "common/tile_table.h"
#include "common/wgmma.cuh"

namespace hopper_fa {

using namespace cute;

struct ForwardArguments {
  CUtensorMap q, k, v;
  void* out;
  int64_t out_batch_stride, out_row_stride, out_head_stride;
  float* lse;
  int* workspace;
  int seqlen_q, seqlen_k, head_dim, q_heads_per_kv;
  float scale_log2;    // |softmax_scale| * log2(e)
  bool negate_scores;  // softmax_scale was negative
  bool causal;
  int warpgroups;  // computing warpgroups in use; a tile has 64 rows for each
  TileScheduler scheduler;
};

struct TmaStoreArguments : ForwardArguments {
  CUtensorMap out_map;
};

template <class Element_, int kTileIndex>
struct ForwardTraits {
  using Element = Element_;
  static constexpr ForwardTile kTile = kForwardTiles[kTileIndex];
  using Arguments = std::conditional_t<kTile.tma_store, TmaStoreArguments, ForwardArguments>;
  static constexpr int kHeadDim = kTile.head_dim;
  static constexpr int kBlockN = kTile.block_n;
  static constexpr int kQStages = kTile.q_stages;
  static constexpr int kStages = kTile.kv_stages;
  static constexpr int kWarpgroups = kTile.block_m / 64;
  static constexpr bool kSpecialised = kTile.producer_registers > 0;
  static constexpr int kThreads = 128 * (kWarpgroups + (kSpecialised ? 1 : 0));
  static constexpr int kSlabs = kHeadDim / 64;    // TMA boxes a block: 64 columns each
  static constexpr int kCluster = kTile.cluster;  // each CTA loads kSlabs / kCluster of them for all

  static_assert(kTile.block_m % 64 == 0 && kBlockN % 16 == 0 && kHeadDim % 64 == 0);
  static_assert(kStages >= 3);  // K of the next block, V of this one, and one to load
  static_assert(!kTile.tma_store ||
                (kTile.overlap && kQStages >= 2));           // the next tile's Q beside this one's output
  static_assert(!kTile.tma_store || !kTile.q_in_registers);  // one of them can have the Q stage
  static_assert(kSpecialised || !kTile.dependent_launch);
  static_assert(kCluster == 1 || (kSlabs % kCluster == 0 && kSpecialised && kTile.overlap));

  // 64-column slabs of 128-byte rows, swizzled: what a TMA box writes and WGMMA reads.
  using LayoutQ = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{}, Shape<_64, Int<kHeadDim>>{}));
  using LayoutK =
      decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{}, Shape<Int<kBlockN>, Int<kHeadDim>>{}));
  // The same bytes as LayoutK, seen as the transposed B operand (head dim, keys) of P V.
  using LayoutVt = decltype(tile_to_shape(GMMA::Layout_MN_SW128_Atom<Element>{},
                                          Shape<Int<kHeadDim>, Int<kBlockN>>{}, Step<_2, _1>{}));

  template <bool kQInRegisters>
  static constexpr auto qk_atom() {
    using Sizes = Shape<_64, Int<kBlockN>, Int<kHeadDim>>;
    if constexpr (kQInRegisters)
      return GMMA::rs_op_selector<Element, Element, float, Sizes>();
    else
      return GMMA::ss_op_selector<Element, Element, float, Sizes>();
  }
  using MmaQK = decltype(make_tiled_mma(qk_atom<kTile.q_in_registers>()));
  using MmaPV = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float, Shape<_64, Int<kHeadDim>, Int<kBlockN>>, GMMA::Major::K,
                           GMMA::Major::MN>()));

  // P as the A operand of P V, in registers: (MMA, 1, kBlockN / 16).
  using LayoutP = Layout<Shape<Shape<_2, _2, _2>, _1, Int<kBlockN / 16>>>;
  // The same for Q, where it is in registers: (MMA, 1, kHeadDim / 16).
  using LayoutQRegisters = Layout<Shape<Shape<_2, _2, _2>, _1, Int<kHeadDim / 16>>>;

  struct SharedStorage {
    alignas(1024) Element q[kQStages][kWarpgroups][64 * kHeadDim];
    alignas(1024) Element kv[kStages][kBlockN * kHeadDim];
    uint64_t q_full[kQStages][kWarpgroups], q_empty[kQStages][kWarpgroups];
    uint64_t kv_full[kStages], kv_empty[kStages];
    TileQueueStorage tiles;
  };
  // 1023: the most that aligning the base can cost.
  static_assert(offsetof(SharedStorage, tiles) + sizeof(TileQueueStorage) + 1023 <=
                forward_shared_memory(kTile));
};

}  // namespace hopper_fa
