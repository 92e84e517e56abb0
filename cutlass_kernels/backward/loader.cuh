// The loading side of a CTA: one warp has TMA copy K and V once, Q and dO block by block.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "backward/traits.cuh"

namespace hopper_fa {

// A block of `rows` rows, slab by slab.
template <class Traits>
__device__ __forceinline__ void load_block(CUtensorMap const& map, uint64_t& barrier,
                                           typename Traits::Element* smem, int rows, int row, int head,
                                           int batch, TMA::CacheHintSm90 hint) {
  CUTE_UNROLL
  for (int i = 0; i < Traits::kSlabs; ++i)
    SM90_TMA_LOAD_4D::copy(&map, &barrier, static_cast<uint64_t>(hint), smem + i * rows * 64, i * 64, row,
                           head, batch);
}

// K and V of the CTA. One whole warp, of which an elected lane issues; so below.
template <class Traits>
__device__ __forceinline__ void load_keys(BackwardArguments const& args,
                                          typename Traits::SharedStorage& shared) {
  KeyTile const& tile = shared.tile;
  auto const once = TMA::CacheHintSm90::EVICT_FIRST;
  int const first_key = tile.n_block * Traits::kBlockN;
  if (elect_one_sync()) {
    FullBarrier::arrive_and_expect_tx(&shared.k_full, sizeof(shared.k));
    load_block<Traits>(args.k, shared.k_full, shared.k, Traits::kBlockN, first_key, tile.head, tile.batch,
                       once);
    FullBarrier::arrive_and_expect_tx(&shared.v_full, sizeof(shared.v));
    load_block<Traits>(args.v, shared.v_full, shared.v, Traits::kBlockN, first_key, tile.head, tile.batch,
                       once);
  }
  __syncwarp();
}

// A query block of Q and dO, with its rows of bias and delta, when their slots are free.
template <class Traits, class QRing, class DoRing>
__device__ __forceinline__ void load_queries(BackwardArguments const& args,
                                             typename Traits::SharedStorage& shared, int head, int m_block,
                                             QRing& q_ring, DoRing& do_ring) {
  constexpr int kBlockM = Traits::kBlockM;
  constexpr uint32_t kBlockBytes = sizeof(shared.q[0]), kRowBytes = kBlockM * sizeof(float);
  constexpr bool kDeltaWithQ = Traits::kQuantized && !Traits::kSplit;
  KeyTile const& tile = shared.tile;
  auto const often = TMA::CacheHintSm90::EVICT_LAST;
  int64_t const rows =
      (static_cast<int64_t>(tile.batch * args.heads_q + head) * args.m_blocks + m_block) * kBlockM;
  EmptyBarrier::wait(&shared.q_empty[q_ring.slot], q_ring.phase);
  if (elect_one_sync()) {
    uint64_t& full = shared.q_full[q_ring.slot];
    FullBarrier::arrive_and_expect_tx(&full, kBlockBytes + kRowBytes);
    load_block<Traits>(args.q, full, shared.q[q_ring.slot], kBlockM, m_block * kBlockM, head, tile.batch,
                       often);
    SM90_BULK_COPY_G2S::copy(args.bias + rows, &full, shared.bias[q_ring.slot], kRowBytes);
    if constexpr (Traits::kQuantized) {
      uint64_t& rows_full = shared.rows_full[q_ring.slot];
      FullBarrier::arrive_and_expect_tx(&rows_full, (kDeltaWithQ ? 2 : 1) * kRowBytes);
      SM90_BULK_COPY_G2S::copy(args.factor + rows, &rows_full, shared.factor[q_ring.slot], kRowBytes);
      if constexpr (kDeltaWithQ)
        SM90_BULK_COPY_G2S::copy(args.delta + rows, &rows_full, shared.delta[q_ring.slot], kRowBytes);
    }
  }
  __syncwarp();
  q_ring.advance();
  EmptyBarrier::wait(&shared.do_empty[do_ring.slot], do_ring.phase);
  if (elect_one_sync()) {
    uint64_t& full = shared.do_full[do_ring.slot];
    FullBarrier::arrive_and_expect_tx(&full, kBlockBytes + (kDeltaWithQ ? 0 : kRowBytes));
    load_block<Traits>(args.dout, full, shared.dout[do_ring.slot], kBlockM, m_block * kBlockM, head,
                       tile.batch, often);
    if constexpr (!kDeltaWithQ)
      SM90_BULK_COPY_G2S::copy(args.delta + rows, &full, shared.delta[do_ring.slot], kRowBytes);
  }
  __syncwarp();
  do_ring.advance();
}

template <class Traits>
__device__ __forceinline__ void load_blocks(BackwardArguments const& args,
                                            typename Traits::SharedStorage& shared) {
  KeyTile const& tile = shared.tile;
  if (tile.walk.count == 0) return;
  RingCursor<Traits::kTile.q_stages> q_ring;
  RingCursor<Traits::kTile.do_stages> do_ring;
  q_ring.phase = do_ring.phase = 1;
  load_keys<Traits>(args, shared);
  tile.for_each_step(args, [&](int head, int m_block) {
    load_queries<Traits>(args, shared, head, m_block, q_ring, do_ring);
  });
}

}  // namespace hopper_fa
