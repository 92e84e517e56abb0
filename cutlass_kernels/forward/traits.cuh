// What one forward instance is made of: its row of the tile table turned into types.
#pragma once

#include <cuda.h>
#include <cutlass/numeric_conversion.h>

#include "common/element.cuh"
#include "common/pipeline.cuh"
#include "common/tile_scheduler.h"
#include "common/tile_table.h"
#include "common/wgmma.cuh"
#include "common/wgmma_e4m3.cuh"
#include "forward/tile_queue.cuh"
#include "hopper_fa/forward.h"

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
  int warpgroups;    // computing warpgroups in use; a tile has 64 rows for each
  bool plain_store;  // 16-bit inputs with Store::kQStage: the output leaves as with Store::kPlain
  TileScheduler scheduler;
  Fp8Params fp8;        // 8-bit inputs only
  float softmax_scale;  // 8-bit inputs only
  int q_group_shift;    // 8-bit inputs only: log2 of the rows that share a scale of Q; 31: all
  int heads_kv;         // 8-bit inputs only
  int turn_takers;      // 8-bit inputs only: warpgroups that take turns on the tensor cores; 1: nobody does
};

struct TmaStoreArguments : ForwardArguments {
  CUtensorMap out_map;
};

struct KeyVectorArguments : ForwardArguments {
  ScaleRef key_bias;
};

// Keys or columns of a swizzle atom that a block of `bytes` contiguous bytes a row is cut into.
template <class Element, int kBytes>
using KMajorAtom = std::conditional_t<kBytes % 128 == 0, GMMA::Layout_K_SW128_Atom<Element>,
                                      GMMA::Layout_K_SW64_Atom<Element>>;

template <DType kDType_, int kTileIndex>
struct ForwardTraits {
  static constexpr DType kDType = kDType_;
  static constexpr bool kFp8 = is_8bit(kDType);
  using Element = typename ElementOf<kDType>::type;                           // of Q and K
  using ElementV = std::conditional_t<kFp8, cutlass::float_e4m3_t, Element>;  // of V and P
  static constexpr ForwardTile kTile = kForwardTiles[kTileIndex];
  using Arguments =
      std::conditional_t<kTile.store != Store::kPlain, TmaStoreArguments,
                         std::conditional_t<kTile.key_vectors, KeyVectorArguments, ForwardArguments>>;
  static constexpr int kHeadDim = kTile.head_dim;
  static constexpr int kBlockN = kTile.block_n;
  static constexpr int kQStages = kTile.q_stages;
  static constexpr int kStages = kTile.kv_stages;
  static constexpr int kWarpgroups = kTile.block_m / 64;
  static constexpr bool kSpecialised = kTile.producer_registers > 0;
  static constexpr bool kLinearExp2 = kFp8 && kTile.fma_exp2_octets == 8;  // P by its code
  static constexpr int kThreads = 128 * (kWarpgroups + (kSpecialised ? 1 : 0));

  static_assert(kTile.element_bytes == sizeof(Element));
  static_assert(kTile.block_m % 64 == 0 && kBlockN % 16 == 0 && kHeadDim % 64 == 0);
  static_assert(kStages >= 3);             // K of the next block, V of this one, and one to load
  static_assert(!kFp8 || kBlockN == 128);  // a row of transposed V is one swizzle atom wide
  static_assert(kFp8 || kTile.pv_parts == 0);
  static_assert(!kFp8 || kLinearExp2 || kTile.fma_exp2_octets == 0);
  static_assert(!kLinearExp2 || kTile.pv_parts > 0);  // row sums of the rounded P
  static_assert(!kTile.overlap || kTile.pv_parts <= 1);
  static_assert(!kTile.key_vectors || kTile.pv_parts > 0);
  static_assert(!kFp8 || !kTile.overlap || (kTile.pv_parts == 0 && kTile.qk_parts == 1));
  static_assert(!kTile.flush || (kFp8 && kTile.overlap));
  // What setmaxnreg hands out is what the CTA was launched with: 65536 registers, in eights a thread.
  static_assert(128 * (kWarpgroups * kTile.consumer_registers + kTile.producer_registers) <=
                kThreads * (65536 / kThreads / 8 * 8));
  // The next tile's Q lies beside this one's output.
  static_assert(kTile.store != Store::kQStage || (kTile.overlap && kQStages == 2));
  static_assert(kTile.store != Store::kPlace || kFp8);

  // TMA boxes of Q and K: slabs of at most 128 bytes a row.
  static constexpr int kSlabColumns = kHeadDim * sizeof(Element) < 128 ? kHeadDim : 128 / sizeof(Element);
  static constexpr int kSlabs = kHeadDim / kSlabColumns;
  // TMA boxes of V: as K, or for 8-bit V boxes of whole rows of at most 256.
  static constexpr int kVRows = forward_v_rows(kTile);
  static constexpr int kVBoxRows = kFp8 && kVRows > 256 ? kVRows / 3 : kVRows;
  static_assert(kVRows % kVBoxRows == 0);

  // Slabs of rows of 128 bytes (64 for 8-bit head dim 64), swizzled: what a TMA box writes and WGMMA reads.
  using AtomQK = KMajorAtom<Element, kHeadDim * sizeof(Element)>;
  using LayoutQ = decltype(tile_to_shape(AtomQK{}, Shape<_64, Int<kHeadDim>>{}));
  using LayoutK = decltype(tile_to_shape(AtomQK{}, Shape<Int<kBlockN>, Int<kHeadDim>>{}));

  // A slot with K: the block, then the vectors of its keys, scales before biases.
  static constexpr int kKBytes = kBlockN * kHeadDim * sizeof(Element);
  static constexpr int kKeyVectorBytes = forward_key_vector_bytes(kTile);
  static_assert(kKBytes + kKeyVectorBytes <= forward_slot_bytes(kTile));

  using Score = std::conditional_t<kDType == DType::kInt8, int32_t, float>;
  using MmaQK = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, Score, Shape<_64, Int<kBlockN>, Int<kHeadDim>>>()));

  using MmaHalfQK = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, Score,
                           Shape<_64, Int<kBlockN / kTile.qk_parts>, Int<kHeadDim>>>()));

  // The B operand (head dim, keys) of P V. 16 bit: the same bytes as LayoutK, seen transposed. 8 bit: V is
  // transposed in global memory, and the first of the 8 rows after the channels is ones, so that the row sum
  // of P is one more column of the output, or a product of its own.
  static constexpr int kOutputColumns = kHeadDim + (kTile.pv_parts > 0 ? 8 : 0);
  static constexpr int kParts = kTile.pv_parts > 1 ? kTile.pv_parts : 1;
  template <int kPart>  // columns of O that one product makes: all, or a part
  static constexpr int kPartColumns =
      kHeadDim / kParts + (kPart == kParts - 1 ? kOutputColumns - kHeadDim : 0);
  template <int kPart>
  static constexpr auto layout_vt() {
    if constexpr (kFp8)
      return tile_to_shape(GMMA::Layout_K_SW128_Atom<ElementV>{},
                           Shape<Int<kPartColumns<kPart>>, Int<kBlockN>>{});
    else
      return tile_to_shape(GMMA::Layout_MN_SW128_Atom<ElementV>{}, Shape<Int<kHeadDim>, Int<kBlockN>>{},
                           Step<_2, _1>{});
  }
  template <int kPart>
  static constexpr auto pv_operation() {
    if constexpr (kFp8 && kIsOwnE4m3Shape<kPartColumns<kPart>>)
      return WgmmaE4m3<kPartColumns<kPart>>{};
    else
      return GMMA::rs_op_selector<ElementV, ElementV, float,
                                  Shape<_64, Int<kPartColumns<kPart>>, Int<kBlockN>>, GMMA::Major::K,
                                  kFp8 ? GMMA::Major::K : GMMA::Major::MN>();
  }
  template <int kPart>
  using MmaPV = decltype(make_tiled_mma(pv_operation<kPart>()));

  // 8 bit: the product that makes row sums alone.
  using MmaRowSum =
      decltype(make_tiled_mma(GMMA::rs_op_selector<ElementV, ElementV, float, Shape<_64, _8, _128>>()));
  using LayoutOnes = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<ElementV>{}, Shape<_8, _128>{}));

  // P as the A operand of P V, in registers: (MMA, 1, kBlockN / elements of 32 bytes).
  using LayoutP = std::conditional_t<kFp8, Layout<Shape<Shape<_4, _2, _2>, _1, Int<kBlockN / 32>>>,
                                     Layout<Shape<Shape<_2, _2, _2>, _1, Int<kBlockN / 16>>>>;

  struct SharedStorage {
    alignas(1024) Element q[kQStages][kWarpgroups][64 * kHeadDim];
    alignas(1024) uint8_t kv[kStages][forward_slot_bytes(kTile)];
    alignas(1024) uint8_t output[kTile.store == Store::kPlace ? kWarpgroups : 0][64 * kHeadDim * 2];
    // 8 bit: v_scale and v_mean of a tile's head, for each warpgroup.
    // NOTE: one slot more than Q has, because most kernels release Q before the epilogue reads them.
    alignas(16) float v_affine[kFp8 ? kQStages + 1 : 1][kFp8 ? kWarpgroups : 1][2][kFp8 ? kHeadDim : 2];
    uint64_t q_full[kQStages][kWarpgroups], q_empty[kQStages][kWarpgroups];
    uint64_t kv_full[kStages], kv_empty[kStages];
    TileQueueStorage<kWarpgroups> tiles;
    // 8 bit: scales of the tile's rows, and where K's of its head start.
    float q_scales[kFp8 ? kQStages : 0][kWarpgroups][64];
    int k_scales[kFp8 ? kQStages : 0][kWarpgroups];
    float2 flush_reference[kTile.flush ? kWarpgroups : 0][128];
  };
  // 1023: the most that aligning the base can cost.
  static_assert(offsetof(SharedStorage, flush_reference) + sizeof(SharedStorage::flush_reference) + 1023 <=
                forward_shared_memory(kTile));
};

}  // namespace hopper_fa
