// What one backward instance is made of: its row of the tile table turned into types.
#pragma once

#include <cuda.h>

#include "common/element.cuh"
#include "common/pipeline.cuh"
#include "common/query_walk.h"
#include "common/tile_scheduler.h"
#include "common/tile_table.h"
#include "common/wgmma.cuh"
#include "hopper_fa/backward.h"

namespace hopper_fa {

using namespace cute;

// One gradient or input behind a TensorRef.
struct Strided {
  void* data;
  int64_t batch_stride, row_stride, head_stride;

  Strided() = default;
  Strided(TensorRef const& t)
      : data(t.data), batch_stride(t.batch_stride), row_stride(t.row_stride), head_stride(t.head_stride) {}

  __device__ __forceinline__ uint16_t* row(int batch, int head, int row) const {
    return static_cast<uint16_t*>(data) + batch * batch_stride + head * head_stride + row * row_stride;
  }
};

struct BackwardArguments {
  CUtensorMap q, k, v, dout;
  Strided out, dout_rows, dq, dk, dv;
  float const *lse, *dlse;
  float *bias, *delta;  // of every query row, padded to whole blocks: see rows.cuh
  float* dq_sum;        // (batch, heads_q, m_blocks, chunks), chunks of kChunk floats in fragment order
  int* turns;           // (batch, heads_q, m_blocks, warpgroups); null: not deterministic
  int seqlen_q, seqlen_k, head_dim, heads_q, q_heads_per_kv;
  int m_blocks, n_blocks;
  int group_size;  // of query_walk
  float scale_log2, softmax_scale;
  bool causal;
  TileScheduler scheduler;  // of key blocks
  // Of turns' shape: 0 while a part of dQ's sum holds nothing; the first key block to come stores and the
  // others add. Deterministic: turns. Null: the sum was cleared.
  int* stored;
  // Only if the tile is quantized: of every query row, as bias; and q, k and v of 16 bits, to be written.
  float* factor;
  Strided wide_q, wide_k, wide_v;
  BackwardCodes codes;
};

// The key block a CTA works on, and the query blocks it walks over: for every query head of the group, one
// after the other.
struct KeyTile {
  int n_block, head, batch;  // head of K and V
  QueryWalk walk;

  static __device__ __forceinline__ KeyTile get(BackwardArguments const& args, int block_m, int block_n) {
    Tile const tile = args.scheduler.get(blockIdx.x);
    KeyTile t;
    // The scheduler's longest tiles are the last; here they are the first ones, except that deterministic
    // mode must begin with the last.
    t.n_block = args.causal && !args.turns ? args.n_blocks - 1 - tile.m_block : tile.m_block;
    t.head = tile.head;
    t.batch = tile.batch;
    t.walk = query_walk(t.n_block, args.n_blocks, args.m_blocks, args.seqlen_q, args.seqlen_k, block_m,
                        block_n, args.causal, args.group_size);
    return t;
  }

  // Calls visit(query head, query block) for every step.
  template <class Visit>
  __device__ __forceinline__ void for_each_step(BackwardArguments const& args, Visit visit) const {
    for (int member = 0; member < args.q_heads_per_kv; ++member)
      for (int step = 0; step < walk.count; ++step)
        visit(head * args.q_heads_per_kv + member, walk.block(step));
  }
};

// dQ leaves a warpgroup as fragments of 64 x 64.
constexpr int kChunk = 64 * 64;

template <DType kDType, int kTileIndex>
struct BackwardTraits {
  using Element = typename ElementOf<kDType>::type;
  static constexpr BackwardTile kTile = kBackwardTiles[kTileIndex];
  static constexpr int kHeadDim = kTile.head_dim;
  static constexpr int kBlockM = kTile.block_m;
  static constexpr int kBlockN = kTile.block_n;
  static constexpr int kWarpgroups = 2;
  static constexpr int kThreads = backward_threads(kTile);
  static constexpr bool kSplit = kTile.split;
  static constexpr bool kQuantized = kTile.factors != Factors::kNone;
  static constexpr bool kRowFactors = kTile.factors == Factors::kRow;
  static constexpr bool kDqApart = kTile.dq_registers > 0;  // a warpgroup for dQ
  static_assert(!kSplit || !kDqApart);
  static_assert(kBlockN == (kSplit ? 64 : 128));
  static constexpr int kSlabs = kHeadDim / 64;           // slabs of 64 columns, 128 bytes a row, swizzled
  static constexpr int kChunks = kBlockM / 64 * kSlabs;  // of dQ in a step
  // NOTE: P and dP of a whole block have no room in registers together: dP comes in parts.
  static constexpr int kPartQueries = 64;
  static constexpr int kParts = kBlockM / kPartQueries;
  static_assert(kBlockM % kPartQueries == 0 && kParts <= 2);
  static constexpr int kWarpgroupChunks = kChunks / kWarpgroups;
  static_assert(kChunks % kWarpgroups == 0 && kBlockM % 64 == 0 && kHeadDim % 64 == 0);

  // Blocks of Q, K, V and dO as TMA writes them: rows by head dim; and the same bytes transposed.
  using AtomRows = GMMA::Layout_K_SW128_Atom<Element>;
  using AtomColumns = GMMA::Layout_MN_SW128_Atom<Element>;
  template <int kRows>
  using LayoutRows = decltype(tile_to_shape(AtomRows{}, Shape<Int<kRows>, Int<kHeadDim>>{}));
  template <int kColumns, int kRows>
  using LayoutColumns =
      decltype(tile_to_shape(AtomColumns{}, Shape<Int<kColumns>, Int<kRows>>{}, Step<_2, _1>{}));

  // S^T or dP^T, 64 keys by 128 or 64 queries.
  template <int kQueries>
  using MmaScores = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, Shape<_64, Int<kQueries>, Int<kHeadDim>>>()));
  // dV and dK, 64 keys by head dim: a part's probabilities and score gradients, transposed, are in registers.
  using MmaKeys = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float, Shape<_64, Int<kHeadDim>, Int<kPartQueries>>,
                           GMMA::Major::K, GMMA::Major::MN>()));
  using LayoutP = Layout<Shape<Shape<_2, _2, _2>, _1, Int<kPartQueries / 16>>>;
  // A chunk of dQ.
  using MmaQueries =
      decltype(make_tiled_mma(GMMA::ss_op_selector<Element, Element, float, Shape<_64, _64, Int<kBlockN>>,
                                                   GMMA::Major::MN, GMMA::Major::MN>()));

  struct SharedStorage {
    alignas(1024) Element k[kBlockN * kHeadDim];
    alignas(1024) Element v[kBlockN * kHeadDim];
    alignas(1024) Element q[kTile.q_stages][kBlockM * kHeadDim];
    alignas(1024) Element dout[kTile.do_stages][kBlockM * kHeadDim];
    alignas(1024) Element ds[kTile.ds_stages][kBlockM * kBlockN];  // transposed: a row a key
    alignas(1024) float dq[kWarpgroups][kChunk];
    alignas(1024) float p[kSplit ? kChunk : 0];  // of warpgroup 0 for warpgroup 1, in fragment order
    alignas(16) float bias[kTile.q_stages][kBlockM], delta[kTile.do_stages][kBlockM];
    alignas(16) float factor[kQuantized ? kTile.q_stages : 0][kBlockM];
    float key_factor;  // kQuantized: what the codes of the CTA's keys still lack (backward/codes.cuh)
    KeyTile tile;      // NOTE: read where needed: the copying warps have 24 registers
    uint64_t k_full, v_full;
    uint64_t q_full[kTile.q_stages], q_empty[kTile.q_stages];
    uint64_t
        rows_full[kTile.q_stages];  // kQuantized: factors, and delta unless kSplit, before warp 1 scales them
    uint64_t do_full[kTile.do_stages], do_empty[kTile.do_stages];
    uint64_t dq_full[kWarpgroups], dq_empty[kWarpgroups];
    uint64_t p_full, p_empty, ds_full[kTile.ds_stages], ds_empty[kTile.ds_stages];  // kSplit, kDqApart
  };
  // Quantized, delta comes with Q.
  static_assert(!kQuantized || kSplit || kTile.q_stages <= kTile.do_stages);
  static constexpr int kSharedBytes = backward_shared_memory(kTile);
  // 1023: the most that aligning the base can cost.
  static_assert(offsetof(SharedStorage, ds_empty) + sizeof(SharedStorage::ds_empty) + 1023 <= kSharedBytes);
  static_assert(kSharedBytes <= 227 * 1024);
};

}  // namespace hopper_fa
