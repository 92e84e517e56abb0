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
  static_assert(Traits::kBlockM == 64 && Traits::kBlockN == 64);
  // What flips once a step has one phase bit: phase_.
  static_assert(Traits::kTile.do_stages == 1 && Traits::kTile.ds_stages == 1 &&
                Traits::kWarpgroupChunks == 2);
  using Scores = decltype(partition_fragment_C(typename Traits::template MmaScores<64>{}, Shape<_64, _64>{}));
  using Gradient = decltype(partition_fragment_C(typename Traits::MmaKeys{}, Shape<_64, Int<kHeadDim>>{}));
  using Operand = decltype(make_tensor<Element>(typename Traits::LayoutP{}));
  using Chunk = decltype(partition_fragment_C(typename Traits::MmaQueries{}, Shape<_64, _64>{}));

  BackwardArguments const& args_;
  Shared& shared_;
  int const warpgroup_;
  KeyTile const& tile_;
  RingCursor<Traits::kTile.q_stages> q_ring_;
  uint32_t phase_ = 0;

 public:
  __device__ SplitMainloop(BackwardArguments const& args, Shared& shared, int warpgroup)
      : args_(args), shared_(shared), warpgroup_(warpgroup), tile_(shared.tile) {}

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
      int step = 0;
      for (int left = args_.q_heads_per_kv * count; left > 1; --left) {
        one_step<kWarpgroup, true>(tile_.walk.block(step), scores, sum);
        if (++step == count) step = 0;
      }
      one_step<kWarpgroup, false>(tile_.walk.block(count - 1), scores, sum);
      warpgroup_fence_operand(sum);
    }
    store_key_gradient<Traits, kWarpgroup == 1>(args_, shared_, tile_.n_block * Traits::kBlockN, sum);
  }

  // On entry the scores of query block m are there, on exit those of the next one, if there is one (kMore).
  template <int kWarpgroup, bool kMore>
  __device__ __forceinline__ void one_step(int m, Scores& scores, Gradient& sum) {
    int const q_slot = q_ring_.slot;
    Operand operand;
    if constexpr (kWarpgroup == 0) {
      probabilities<Traits>(args_, shared_, tile_.n_block * Traits::kBlockN, m, 0, q_slot, scores);
      if constexpr (!Traits::kQuantized) arrive_warp(shared_.q_empty[q_slot]);
      EmptyBarrier::wait(&shared_.p_empty, phase_ ^ 1);
      if constexpr (Traits::kQuantized) {
        // NOTE: the rows' factors of dS by way of P, because the other warpgroup has no registers left for
        // them.
        put_scaled_chunk<Traits::kRowFactors>(scores, shared_.factor[q_slot], shared_.p);
        arrive_warp(shared_.q_empty[q_slot]);
      } else {
        put_chunk(scores, shared_.p);
      }
      arrive_warp(shared_.p_full);
      CUTE_UNROLL
      for (int i = 0; i < 32; i += 2)
        recast<uint32_t>(operand)(i / 2) = round_pair<Element>(scores(i), scores(i + 1));
      FullBarrier::wait(&shared_.do_full[0], phase_);
      issue_product(typename Traits::MmaKeys{}, operand, query_columns<Traits>(shared_.dout[0], 0), sum,
                    true);
    } else {
      EmptyBarrier::wait(&shared_.p_full, phase_);
      float const* const delta = shared_.delta[0] + 2 * (threadIdx.x % 4);
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
      arrive_warp(shared_.do_empty[0]);
      FullBarrier::wait(&shared_.q_full[q_slot], q_ring_.phase);
      issue_product(typename Traits::MmaKeys{}, operand, query_columns<Traits>(shared_.q[q_slot], 0), sum,
                    true);
      EmptyBarrier::wait(&shared_.ds_empty[0], phase_ ^ 1);
      write_ds(operand, shared_.ds[0], threadIdx.x);
      tma_store_fence();
      arrive_warp(shared_.ds_full[0]);
    }
    q_ring_.advance();
    EmptyBarrier::wait(&shared_.ds_full[0], phase_);
    // NOTE: one chunk after the other, and the next scores not before the first of them: there are no
    // registers for more. dP is last, because its dO comes only when this step's dV is done.
    add_dq<kWarpgroup, 0>(kWarpgroup == 0 ? shared_.do_empty[0] : shared_.q_empty[q_slot]);
    if constexpr (kMore && kWarpgroup == 0) issue_scores<0>(scores);
    add_dq<kWarpgroup, 1>(shared_.ds_empty[0]);
    phase_ ^= 1;
    if constexpr (kMore && kWarpgroup == 1) issue_scores<1>(scores);
    wait_product<0>(scores);
  }

  // S^T of the query block at q_ring_, or dP^T of the next one of dO.
  template <int kWarpgroup>
  __device__ __forceinline__ void issue_scores(Scores& scores) {
    Element const* const queries = kWarpgroup == 0 ? shared_.q[q_ring_.slot] : shared_.dout[0];
    if constexpr (kWarpgroup == 0)
      FullBarrier::wait(&shared_.q_full[q_ring_.slot], q_ring_.phase);
    else
      FullBarrier::wait(&shared_.do_full[0], phase_);
    issue_product(typename Traits::template MmaScores<64>{},
                  key_rows<Traits>(kWarpgroup == 0 ? shared_.k : shared_.v, 0),
                  query_rows<Traits, 64>(queries, 0), scores, false);
  }

  // Chunk kIndex of the warpgroup's two of dQ. Once it is there, the product before it is done too: `done` is
  // what either has read.
  template <int kWarpgroup, int kIndex>
  __device__ __forceinline__ void add_dq(uint64_t& done) {
    Chunk dq;
    issue_dq<Traits>(shared_.ds[0], shared_.k, 2 * kWarpgroup + kIndex, dq);
    wait_product<0>(dq);
    arrive_warp(done);
    EmptyBarrier::wait(&shared_.dq_empty[kWarpgroup], kIndex ^ 1);
    put_chunk(dq, shared_.dq[kWarpgroup]);
    tma_store_fence();
    arrive_warp(shared_.dq_full[kWarpgroup]);
  }
};

}  // namespace hopper_fa
