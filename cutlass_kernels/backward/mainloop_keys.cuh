// The computing side for head dims up to 128: one warpgroup's 64 keys against all query blocks.
//
//   S^T = K Q^T, dP^T = V dO^T       a row a key, so P^T and dS^T are the register operands of
//   dV += P^T dO, dK += dS^T Q
//   dQ = dS K                        needs dS of both warpgroups: through shared memory; each makes its
//   chunks
//
//   step i of a warpgroup:   issue dP; P from S                   beside dP
//                            issue dV; dS                         beside dV
//                            issue dK and S of step i + 1; dS to shared memory, and meet the other warpgroup
//                            issue dQ; leave it in shared memory, from where another warp adds it up
//
// With a warpgroup for dQ (mainloop_dq.cuh) a step ends once dS is in shared memory; nobody meets.
#pragma once

#include "backward/epilogue.cuh"
#include "backward/scores.cuh"

namespace hopper_fa {

template <class Traits>
class KeysMainloop {
  using Element = typename Traits::Element;
  using Shared = typename Traits::SharedStorage;
  static constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN, kHeadDim = Traits::kHeadDim;
  using Scores = decltype(partition_fragment_C(typename Traits::template MmaScores<kBlockM>{},
                                               Shape<_64, Int<kBlockM>>{}));
  static constexpr int kPartQueries = Traits::kPartQueries;
  static constexpr int kPartSize = kPartQueries / 2;  // elements of a thread
  using Part = decltype(partition_fragment_C(typename Traits::template MmaScores<kPartQueries>{},
                                             Shape<_64, Int<kPartQueries>>{}));
  using Gradient = decltype(partition_fragment_C(typename Traits::MmaKeys{}, Shape<_64, Int<kHeadDim>>{}));
  using Operand = decltype(make_tensor<Element>(typename Traits::LayoutP{}));
  using Chunk = decltype(partition_fragment_C(typename Traits::MmaQueries{}, Shape<_64, _64>{}));

  BackwardArguments const& args_;
  Shared& shared_;
  int const warpgroup_;
  KeyTile const& tile_;
  RingCursor<Traits::kTile.q_stages> q_ring_;
  RingCursor<Traits::kTile.do_stages> do_ring_;
  RingCursor<Traits::kTile.ds_stages> ds_ring_;
  uint32_t dq_phase_ = 1;

  Gradient dk_, dv_;
  Scores s_;

 public:
  __device__ KeysMainloop(BackwardArguments const& args, Shared& shared, int warpgroup)
      : args_(args), shared_(shared), warpgroup_(warpgroup), tile_(shared.tile) {}

  __device__ __forceinline__ void run() {
    clear(dk_);
    clear(dv_);
    int const heads = args_.q_heads_per_kv, count = tile_.walk.count;
    if (count > 0) {
      FullBarrier::wait(&shared_.k_full, 0);
      issue_s();
      FullBarrier::wait(&shared_.v_full, 0);
      wait_product<0>(s_);
      if constexpr (Traits::kDqApart) {
        int m = tile_.walk.block(0);  // NOTE: a walk ends where it began, so one counter is enough
        for (int left = heads * count; left > 1; --left) {
          one_step<true>(m);
          if (++m == tile_.walk.first + tile_.walk.count) m = tile_.walk.first;
        }
        one_step<false>(m);
      } else {
        int step = 0;
        for (int left = heads * count; left > 1; --left) {
          one_step<true>(tile_.walk.block(step));
          if (++step == count) step = 0;
        }
        one_step<false>(tile_.walk.block(count - 1));
      }
    }
    int const first_key = tile_.n_block * kBlockN + 64 * warpgroup_;
    store_key_gradient<Traits, false>(args_, shared_, first_key, dv_);
    store_key_gradient<Traits, true>(args_, shared_, first_key, dk_);
  }

 private:
  // On entry S of query block m is there; on exit that of the next one, if there is one (kMore).
  // NOTE: nothing is in flight from one step to the next: ptxas would serialise all products.
  template <bool kMore>
  __device__ __forceinline__ void one_step(int m) {
    int const q_slot = q_ring_.slot, do_slot = do_ring_.slot;
    FullBarrier::wait(&shared_.do_full[do_slot], do_ring_.phase);
    half_step<0, kMore>(m, q_slot, do_slot);
    if constexpr (Traits::kParts == 2) half_step<1, kMore>(m, q_slot, do_slot);
    if constexpr (Traits::kDqApart) return finish_step<kMore>(q_slot, do_slot);
    tma_store_fence();
    warpgroup_wait<1>();  // dV
    arrive_warp(shared_.do_empty[do_slot]);
    q_ring_.advance();
    do_ring_.advance();
    if constexpr (kMore) issue_s();
    meet();
    wait_product<0>(s_);  // and dK
    arrive_warp(shared_.q_empty[q_slot]);
    Chunk dq;
    issue_dq<Traits>(shared_.ds[ds_ring_.slot], shared_.k, warpgroup_, dq);
    wait_product<0>(dq);
    leave_dq(dq);
    ds_ring_.advance();
    if constexpr (!kMore) {
      warpgroup_fence_operand(dk_);
      warpgroup_fence_operand(dv_);
    }
  }

  // A step's end where another warpgroup makes dQ. In flight: dV, dK, and S of the next step.
  template <bool kMore>
  __device__ __forceinline__ void finish_step(int q_slot, int do_slot) {
    tma_store_fence();
    arrive_warp(shared_.ds_full[ds_ring_.slot]);
    ds_ring_.advance();
    warpgroup_wait<kMore ? 2 : 1>();  // dV
    arrive_warp(shared_.do_empty[do_slot]);
    do_ring_.advance();
    warpgroup_wait<kMore ? 1 : 0>();  // dK
    arrive_warp(shared_.q_empty[q_slot]);
    if constexpr (kMore) {
      wait_product<0>(s_);
    } else {
      q_ring_.advance();
      warpgroup_fence_operand(dk_);
      warpgroup_fence_operand(dv_);
    }
  }

  // A part of the step's queries.
  template <int kPart, bool kMore>
  __device__ __forceinline__ void half_step(int m, int q_slot, int do_slot) {
    Part dp;
    issue_product(typename Traits::template MmaScores<kPartQueries>{},
                  key_rows<Traits>(shared_.v, 64 * warpgroup_),
                  query_rows<Traits, kPartQueries>(shared_.dout[do_slot], kPartQueries * kPart), dp, false);
    make_probabilities<kPart>(m, q_slot);
    Operand p, ds;
    CUTE_UNROLL
    for (int i = 0; i < kPartSize; i += 2)
      recast<uint32_t>(p)(i / 2) =
          round_pair<Element>(s_(kPartSize * kPart + i), s_(kPartSize * kPart + i + 1));
    issue_product(typename Traits::MmaKeys{}, p,
                  query_columns<Traits>(shared_.dout[do_slot], kPartQueries * kPart), dv_, true);
    wait_product<1>(dp);
    int const column = kPartQueries * kPart + 2 * (threadIdx.x % 4);
    float const* const delta = shared_.delta[Traits::kQuantized ? q_slot : do_slot] + column;
    auto const each_pair = [&](auto gradients) {
      CUTE_UNROLL
      for (int i = 0; i < kPartSize; i += 2)
        recast<uint32_t>(ds)(i / 2) =
            gradients(s_(kPartSize * kPart + i), s_(kPartSize * kPart + i + 1), dp(i), dp(i + 1),
                      *reinterpret_cast<float2 const*>(delta + i / 4 * 8), i / 4 * 8);
    };
    if constexpr (Traits::kQuantized) {
      float const f = shared_.factor[q_slot][kPartQueries * kPart];
      each_pair([&](float p0, float p1, float dp0, float dp1, float2 d, int query) {
        float2 factor = make_float2(f, f);
        if constexpr (Traits::kRowFactors)
          factor = *reinterpret_cast<float2 const*>(shared_.factor[q_slot] + column + query);
        return score_gradients<Element>(p0, p1, dp0, dp1, d, factor);
      });
    } else {
      each_pair([&](float p0, float p1, float dp0, float dp1, float2 d, int) {
        return score_gradients<Element>(p0, p1, dp0, dp1, d);
      });
    }
    issue_product(typename Traits::MmaKeys{}, ds,
                  query_columns<Traits>(shared_.q[q_slot], kPartQueries * kPart), dk_, true);
    if constexpr (Traits::kDqApart) {
      if constexpr (kPart == Traits::kParts - 1 && kMore) {
        q_ring_.advance();
        issue_s();
      }
      if constexpr (kPart == 0) EmptyBarrier::wait(&shared_.ds_empty[ds_ring_.slot], ds_ring_.phase ^ 1);
    }
    write_ds(ds, shared_.ds[ds_ring_.slot] + (kPart * kBlockN + 64 * warpgroup_) * 64,
             Traits::kDqApart ? fresh_thread() : threadIdx.x);
  }

  // Both warpgroups have written dS.
  static __device__ __forceinline__ void meet() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

  // Part of S to P in place.
  template <int kPart>
  __device__ __forceinline__ void make_probabilities(int m, int q_slot) {
    auto part = make_tensor(s_.data() + kPartSize * kPart, Layout<Int<kPartSize>>{});
    probabilities<Traits>(args_, shared_, tile_.n_block * kBlockN + 64 * warpgroup_, m, kPartQueries * kPart,
                          q_slot, part);
  }

  __device__ __forceinline__ void issue_s() {
    FullBarrier::wait(&shared_.q_full[q_ring_.slot], q_ring_.phase);
    issue_product(typename Traits::template MmaScores<kBlockM>{},
                  key_rows<Traits>(shared_.k, 64 * warpgroup_),
                  query_rows<Traits, kBlockM>(shared_.q[q_ring_.slot], 0), s_, false);
  }

  // Gives a chunk of dQ to the adding warp.
  __device__ __forceinline__ void leave_dq(Chunk const& dq) {
    EmptyBarrier::wait(&shared_.dq_empty[warpgroup_], dq_phase_);
    dq_phase_ ^= 1;
    put_chunk(dq, shared_.dq[warpgroup_]);
    tma_store_fence();
    arrive_warp(shared_.dq_full[warpgroup_]);
  }
};

}  // namespace hopper_fa
