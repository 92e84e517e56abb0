// The computing side for head dim 256: both warpgroups work on the same 64 keys, because dK and dV of more
// have no room in registers.
//
//   warpgroup 0      S^T = K Q^T, P^T, dV += P^T dO; gives P to warpgroup 1 through shared memory
//   warpgroup 1      dP^T = V dO^T, dS^T, dK += dS^T Q; gives dS to both through shared memory
//   both             half of the chunks of dQ = dS K each
//
// Warpgroup 0 runs ahead by up to a step, so one's exponentials lie beside the other's products.
#pragma once

#include "backward/epilogue.cuh"
#include "backward/scores.cuh"

namespace hopper_fa {

template <class Traits>
class SplitMainloop {
  using Element = typename Traits::Element;
  using Shared = typename Traits::SharedStorage;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr bool kStaged = Traits::kStaged;
  static_assert(Traits::kBlockM == 64 && Traits::kBlockN == 64);
  using Scores = decltype(partition_fragment_C(typename Traits::template MmaScores<64>{}, Shape<_64, _64>{}));
  using Gradient = decltype(partition_fragment_C(typename Traits::MmaKeys{}, Shape<_64, Int<kHeadDim>>{}));
  using Operand = decltype(make_tensor<Element>(typename Traits::LayoutP{}));
  using Chunk = decltype(partition_fragment_C(typename Traits::MmaQueries{}, Shape<_64, _64>{}));

  BackwardArguments const& args_;
  Shared& shared_;
  int const warpgroup_;
  KeyTile const tile_;
  RingCursor<Traits::kTile.q_stages> q_ring_;
  RingCursor<Traits::kTile.do_stages> do_ring_;
  RingCursor<Traits::kTile.ds_stages> ds_ring_;
  uint32_t p_phase_ = 0;
  uint32_t dq_phase_ = 1;

 public:
  __device__ SplitMainloop(BackwardArguments const& args, Shared& shared, int warpgroup)
      : args_(args), shared_(shared), warpgroup_(warpgroup), tile_(KeyTile::get<Traits>(args)) {}

  __device__ __forceinline__ void run() {
    if (warpgroup_ == 0)
      walk<0>();
    else
      walk<1>();
  }

 private:
  template <int kWarpgroup>
  __device__ __forceinline__ void walk() {
    Gradient sum;  // dV or dK, 64 keys by head dim
    clear(sum);
    int const count = tile_.walk.count;
    if (count > 0) {
      Scores scores;
      FullBarrier::wait(kWarpgroup == 0 ? &shared_.k_full : &shared_.v_full, 0);
      issue_scores<kWarpgroup>(scores);
      if constexpr (kWarpgroup == 1) FullBarrier::wait(&shared_.k_full, 0);
      wait_product<0>(scores);
      int head = tile_.head * args_.q_heads_per_kv, step = 0;
      for (int left = args_.q_heads_per_kv * count; left > 1; --left) {
        one_step<kWarpgroup, true>(head, tile_.walk.block(step), scores, sum);
        if (++step == count) step = 0, ++head;
      }
      one_step<kWarpgroup, false>(head, tile_.walk.block(step), scores, sum);
      warpgroup_fence_operand(sum);
    }
    store_rows<Element>(kWarpgroup == 0 ? args_.dv : args_.dk, tile_.batch, tile_.head,
                        tile_.n_block * Traits::kBlockN, args_.seqlen_k, args_.head_dim, sum,
                        kWarpgroup == 0 ? 1.f : args_.softmax_scale);
  }

  // On entry the scores of the query block are there, on exit those of the next one, if there is one (kMore).
  template <int kWarpgroup, bool kMore>
  __device__ __forceinline__ void one_step(int head, int m, Scores& scores, Gradient& sum) {
    int const q_slot = q_ring_.slot, do_slot = do_ring_.slot;
    Operand operand;
    if constexpr (kWarpgroup == 0) {
      probabilities(args_, tile_.n_block * Traits::kBlockN, m * Traits::kBlockM, shared_.bias[q_slot],
                    scores);
      arrive_warp(shared_.q_empty[q_slot]);
      EmptyBarrier::wait(&shared_.p_empty, p_phase_ ^ 1);
      put_chunk(scores, shared_.p);
      arrive_warp(shared_.p_full);
      CUTE_UNROLL
      for (int i = 0; i < 32; i += 2)
        recast<uint32_t>(operand)(i / 2) = round_pair<Element>(scores(i), scores(i + 1));
      FullBarrier::wait(&shared_.do_full[do_slot], do_ring_.phase);
      issue_product(typename Traits::MmaKeys{}, operand, query_columns<Traits>(shared_.dout[do_slot], 0), sum,
                    true);
    } else {
      EmptyBarrier::wait(&shared_.p_full, p_phase_);
      float const* const delta = shared_.delta[do_slot] + 2 * (threadIdx.x % 4);
      CUTE_UNROLL
      for (int octet = 0; octet < 8; ++octet) {
        float4 const p = reinterpret_cast<float4 const*>(shared_.p)[octet * 128 + threadIdx.x % 128];
        float2 const d = *reinterpret_cast<float2 const*>(delta + 8 * octet);
        int const i = 4 * octet;
        recast<uint32_t>(operand)(i / 2) = score_gradients<Element>(p.x, p.y, scores(i), scores(i + 1), d);
        recast<uint32_t>(operand)(i / 2 + 1) =
            score_gradients<Element>(p.z, p.w, scores(i + 2), scores(i + 3), d);
      }
      arrive_warp(shared_.p_empty);
      arrive_warp(shared_.do_empty[do_slot]);
      FullBarrier::wait(&shared_.q_full[q_slot], q_ring_.phase);
      issue_product(typename Traits::MmaKeys{}, operand, query_columns<Traits>(shared_.q[q_slot], 0), sum,
                    true);
      EmptyBarrier::wait(&shared_.ds_empty[ds_ring_.slot], ds_ring_.phase ^ 1);
      write_ds(operand, shared_.ds[ds_ring_.slot]);
      tma_store_fence();
      arrive_warp(shared_.ds_full[ds_ring_.slot]);
    }
    p_phase_ ^= 1;
    q_ring_.advance();
    do_ring_.advance();
    // NOTE: with one stage of dO the next block comes only once this one's dV is done, so dP is issued last.
    // Before the first chunk there would be no registers for it.
    constexpr bool kEarly = kWarpgroup == 0 || Traits::kTile.do_stages > 1;
    EmptyBarrier::wait(&shared_.ds_full[ds_ring_.slot], ds_ring_.phase);
    Element const* const ds = shared_.ds[ds_ring_.slot];
    // NOTE: one chunk after the other: two have no room beside the scores.
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      Chunk dq;
      issue_dq<Traits>(ds, shared_.k, 2 * kWarpgroup + i, dq);
      wait_product<0>(dq);
      if (i == 0) arrive_warp(kWarpgroup == 0 ? shared_.do_empty[do_slot] : shared_.q_empty[q_slot]);
      if (i == 1) arrive_warp(shared_.ds_empty[ds_ring_.slot]);
      add_dq_chunk(head, m, 2 * kWarpgroup + i, dq);
      if constexpr (kMore && kEarly) {
        if (i == 0) issue_scores<kWarpgroup>(scores);
      }
    }
    ds_ring_.advance();
    if constexpr (kMore && !kEarly) issue_scores<kWarpgroup>(scores);
    wait_product<0>(scores);
  }

  // S^T of the block at q_ring_, or dP^T of the one at do_ring_.
  template <int kWarpgroup>
  __device__ __forceinline__ void issue_scores(Scores& scores) {
    if constexpr (kWarpgroup == 0) {
      FullBarrier::wait(&shared_.q_full[q_ring_.slot], q_ring_.phase);
      issue_product(typename Traits::template MmaScores<64>{}, key_rows<Traits>(shared_.k, 0),
                    query_rows<Traits, 64>(shared_.q[q_ring_.slot], 0), scores, false);
    } else {
      FullBarrier::wait(&shared_.do_full[do_ring_.slot], do_ring_.phase);
      issue_product(typename Traits::template MmaScores<64>{}, key_rows<Traits>(shared_.v, 0),
                    query_rows<Traits, 64>(shared_.dout[do_ring_.slot], 0), scores, false);
    }
  }

  // NOTE: straight to global memory, because a stage of dO or a place for dQ is all that shared memory holds.
  // Deterministic mode cannot, since it must wait for its turn.
  __device__ __forceinline__ void add_dq_chunk(int head, int m, int chunk, Chunk const& dq) {
    if constexpr (kStaged) {
      EmptyBarrier::wait(&shared_.dq_empty[warpgroup_], dq_phase_);
      dq_phase_ ^= 1;
      put_chunk(dq, shared_.dq[warpgroup_]);
      tma_store_fence();
      arrive_warp(shared_.dq_full[warpgroup_]);
    } else {
      int64_t const block = static_cast<int64_t>(tile_.batch * args_.heads_q + head) * args_.m_blocks + m;
      add_chunk(dq, args_.dq_sum + (block * Traits::kChunks + chunk) * kChunk);
    }
  }
};

}  // namespace hopper_fa
