// The computing side for 16-bit inputs: one warpgroup's 64 query rows against all their key blocks, tile
// after tile.
//
//   turn i of a warpgroup:   issue S = Q K^T of block i          (tensor cores)
//                            issue O += P V of block i - 1       (tensor cores)
//                            P = softmax(S) of block i           beside that O += P V, and the other
//                            warpgroups' products
//
// Block i - 1 may belong to the tile before: its output is finished and stored in the next tile's first turn,
// so the tensor cores do not run dry between tiles.
#pragma once

#include "common/mask.cuh"
#include "common/softmax.cuh"
#include "forward/epilogue.cuh"
#include "forward/epilogue_tma.cuh"
#include "forward/operands.cuh"
#include "forward/traits.cuh"

namespace hopper_fa {

template <class Traits>
class Mainloop {
  using Shared = typename Traits::SharedStorage;
  static constexpr ForwardTile kTile = Traits::kTile;
  static constexpr bool kTmaStore = kTile.store == Store::kQStage;
  static constexpr int kBlockN = Traits::kBlockN;
  // Whether P of a block is rounded while P of the one before is still being multiplied; else its registers
  // are waited for. NOTE: two turns in the loop's body, as registers have no index. d64 has no room for it,
  // and d256 nothing from it; without turns ptxas serialises the products.
  static constexpr bool kTwoPs =
      Traits::kHeadDim == 128 && kBlockN == 128 && kTile.ping_pong == PingPong::kAfterPV;
  // NOTE: with 64 keys a block (d256) integer maxima are 2% slower.
  using Softmax = OnlineSoftmax<kTile.fma_exp2_octets, kBlockN >= 128, kTile.peak_bits>;
  using Output = decltype(partition_fragment_C(typename Traits::template MmaPV<0>{},
                                               Shape<_64, Int<Traits::kHeadDim>>{}));
  using Probabilities = decltype(make_tensor<typename Traits::ElementV>(typename Traits::LayoutP{}));

  typename Traits::Arguments const& args_;
  Shared& shared_;
  int const warpgroup_;  // among the computing ones
  Baton const baton_;
  RingCursor<Traits::kStages> ring_;
  RingCursor<Traits::kQStages> q_ring_;

  Output output_;            // 64 x head_dim, FP32
  Probabilities p_;          // 64 x kBlockN, of the last block whose QK is done
  Probabilities other_p_;    // with kTwoPs: every second block's, between two turns of a tile
  Softmax softmax_;          // of the tile that p_ belongs to
  WarpgroupTile tile_;       // that tile
  int q_slot_;               // where its Q was, and its output will be (Store::kQStage)
  bool pending_ = false;     // p_ still waits for its V
  bool accumulate_ = false;  // output_ holds something of tile_ already
  bool started_ = false;     // the CTA has read a K block: a V block follows the next one

 public:
  __device__ Mainloop(typename Traits::Arguments const& args, Shared& shared, int warpgroup)
      : args_(args),
        shared_(shared),
        warpgroup_(warpgroup),
        baton_{warpgroup, kTile.ping_pong == PingPong::kNever ? 1 : args.warpgroups},
        softmax_(make_softmax()) {
    baton_.start();
  }

  // All turns of a tile; what it leaves pending, the next run() or flush() completes. refill(turn) comes at
  // the start of every turn: without a loading warp, that is where the loads are issued.
  template <class Refill>
  __device__ __forceinline__ void run(WarpgroupTile const& tile, Refill refill) {
    int const tile_end = tile.tile_end;
    BlockRange const range = tile.range;
    // Blocks that only later rows of the tile see: pass them on unread, but keep taking turns.
    int const skipped = tile_end - range.end;
    for (int turn = 0; turn < skipped; ++turn) {
      refill(turn);
      skip_turn();
    }
    if (tile_end > 0) wait_q();
    if (range.end == 0) {
      if (tile_end > 0) {
        release_q(false);
        if (!kTile.overlap) baton_.take(), baton_.pass();  // as often as in run_in_order
      }
      store_empty<Traits>(args_, tile);
      return;
    }
    if constexpr (kTile.overlap) {
      refill(skipped);
      // NOTE: two copies of the turn, because a branch that chooses what joins a product in flight makes
      // ptxas serialise all of them.
      if (pending_)
        first_turn<true>(tile, range);
      else
        first_turn<false>(tile, range);
      int n = range.end - 2;
      if constexpr (kTwoPs) {
#pragma unroll 1
        for (; n > 0; n -= 2) {
          refill(range.end - 1 - n + skipped);
          next_turn(n, range, p_, other_p_);
          refill(range.end - n + skipped);
          next_turn(n - 1, range, other_p_, p_);
        }
        if (n == 0) {
          refill(range.end - 1 + skipped);
          next_turn(0, range, p_, other_p_);
          copy(other_p_, p_);
        }
      } else {
        for (; n >= 0; --n) {
          refill(range.end - 1 - n + skipped);
          next_turn(n, range, p_, p_);
        }
      }
    } else {
      run_in_order(tile, range, skipped, refill);
    }
  }

  // After the last tile.
  __device__ __forceinline__ void flush() {
    if (pending_) {
      issue_pv(p_);
      finish_pending();
      release_output();
    }
  }

 private:
  // QK of a tile's first block, beside PV of the last block of the tile before if that is pending.
  template <bool kPending>
  __device__ __forceinline__ void first_turn(WarpgroupTile const& tile, BlockRange range) {
    float alpha[2];
    int const n = range.end - 1, q_slot = q_ring_.slot;
    Softmax fresh = make_softmax();
    Tensor s = make_scores();
    wait_block();
    baton_.take();
    issue_product(typename Traits::MmaQK{}, q_operand(), k_operand(), s, false);
    int const k_slot = ring_.slot;
    ring_.advance();
    if constexpr (kPending) issue_pv(p_);
    baton_.pass();
    wait_product<kPending ? 1 : 0>(s);
    if (!kPending && started_) skip_blocks(1);
    release_slot(k_slot);
    if (n == 0) release_q(keeps_q());
    prepare_scores(s, n, range, tile.row);
    fresh.template step<true>(s, alpha);  // nothing to rescale yet
    if constexpr (kPending) finish_pending();
    round_probabilities<Traits>(s, p_);
    softmax_ = fresh;
    tile_ = tile;
    pending_ = started_ = true;
    accumulate_ = false;
    if (n > 0) wait_block();
    if constexpr (kPending) release_output();
    // NOTE: through a shuffle; else ptxas computes the descriptors of Q in vector registers, 19 R2UR a turn.
    if constexpr (kTmaStore) q_slot_ = __shfl_sync(~0u, q_slot, 0);
  }

  // The hot loop: P of block n + 1 is multiplied, that of block n is `next`, which may be the same. On entry
  // the slot at ring_, K of block n, has landed.
  __device__ __forceinline__ void next_turn(int n, BlockRange range, Probabilities& p, Probabilities& next) {
    float alpha[2];
    Tensor s = make_scores();
    baton_.take();
    issue_product(typename Traits::MmaQK{}, q_operand(), k_operand(), s, false);
    int const k_slot = ring_.slot;
    ring_.advance();
    if (kTile.ping_pong == PingPong::kAfterQK) baton_.pass();
    issue_pv(p);
    if (kTile.ping_pong == PingPong::kAfterPV) baton_.pass();
    wait_product<1>(s);
    release_slot(k_slot);
    if (n == 0) release_q(keeps_q());
    prepare_scores(s, n, range, tile_.row);
    bool const rescale = softmax_.template step<false>(s, alpha);
    // NOTE: the next turn's block is waited for here because the wait is a loop: with the fence before it,
    // nvcc moves no exponential across. Without the two, all of them end up below wait_product, and PV runs
    // beside nothing.
    if constexpr (kTwoPs) {
      round_probabilities<Traits>(s, next);
      warpgroup_fence_operand(next);
    } else {
      warpgroup_fence_operand(s);
    }
    if (n > 0) wait_block_after();
    wait_product<0>(output_);
    release_block();
    if constexpr (kTwoPs)
      warpgroup_fence_operand(p);  // it was in use until here
    else
      round_probabilities<Traits>(s, next);
    if (rescale) scale_rows(output_, alpha);
  }

  // A turn in which this warpgroup has no scores to compute.
  __device__ __forceinline__ void skip_turn() {
    baton_.take();
    baton_.pass();
    skip_blocks(1);
    if (pending_) {
      issue_pv(p_);
      finish_pending();
      release_output();
    } else if (started_ || !kTile.overlap) {
      skip_blocks(1);
    }
    started_ = true;
  }

  // kWait: the V block may not have landed yet.
  template <bool kWait = true>
  __device__ __forceinline__ void issue_pv(Probabilities const& p) {
    if constexpr (kWait) wait_block();
    issue_product(typename Traits::template MmaPV<0>{}, p, v_operand(), output_, accumulate_);
    accumulate_ = true;
  }

  __device__ __forceinline__ void finish_pending() {
    wait_product<0>(output_);
    release_block();
    finish_tile();
    pending_ = false;
  }

  __device__ __forceinline__ void finish_tile() {
    float factor[2], lse[2];
    softmax_.finish(factor, lse);
    if constexpr (kTmaStore) {
      if (keeps_q()) {
        store_output_tma<Traits>(args_, tile_, output_, factor, lse, shared_.q[q_slot_][warpgroup_],
                                 warpgroup_);
        return;
      }
    }
    store_output<Traits>(args_, tile_, output_, factor, lse);
  }

  // Without overlap: QK, softmax and PV of a block one after the other, PV in one turn with QK of the next
  // block.
  template <class Refill>
  __device__ __forceinline__ void run_in_order(WarpgroupTile const& tile, BlockRange range, int skipped,
                                               Refill& refill) {
    float alpha[2];
    softmax_ = make_softmax();
    tile_ = tile;
    accumulate_ = false;
    baton_.take();
    for (int n = range.end - 1; n >= 0; --n) {
      Tensor s = make_scores();
      refill(range.end - 1 - n + skipped);
      wait_block();
      issue_product(typename Traits::MmaQK{}, q_operand(), k_operand(), s, false);
      baton_.pass();
      wait_product<0>(s);
      release_block();
      if (n == 0) release_q(keeps_q());
      prepare_scores(s, n, range, tile.row);
      bool const rescale = softmax_.template step<false>(s, alpha);
      round_probabilities<Traits>(s, p_);
      if (rescale && accumulate_) scale_rows(output_, alpha);
      // NOTE: V is waited for before the baton because the wait is a loop: with the fence before it, nothing
      // of the softmax moves below the baton, under which it would hold everybody up.
      warpgroup_fence_operand(p_);
      wait_block();
      baton_.take();
      issue_pv<false>(p_);
      wait_product<0>(output_);
      release_block();
    }
    baton_.pass();
    finish_tile();
  }

  // A tile's softmax before its first block.
  __device__ __forceinline__ Softmax make_softmax() const {
    return Softmax(args_.scale_log2, kTile.rescale_threshold);
  }

  static __device__ __forceinline__ auto make_scores() {  // 64 x kBlockN, FP32
    return partition_fragment_C(typename Traits::MmaQK{}, Shape<_64, Int<kBlockN>>{});
  }

  __device__ __forceinline__ auto q_operand() const {
    return q_fragment<Traits>(shared_.q[q_ring_.slot][warpgroup_]);
  }
  __device__ __forceinline__ auto k_operand() const { return k_fragment<Traits>(shared_.kv[ring_.slot]); }
  __device__ __forceinline__ auto v_operand() const { return v_fragment<Traits, 0>(shared_.kv[ring_.slot]); }

  // Negates and masks as need be.
  template <class Scores>
  __device__ __forceinline__ void prepare_scores(Scores& s, int n, BlockRange range, int first_row) const {
    if (args_.negate_scores) {
      CUTE_UNROLL
      for (int i = 0; i < size(s); ++i) s(i) = -s(i);
    }
    if (n >= range.unmasked) {
      int const row = first_row + fresh_row_in_tile();
      int const keys = args_.seqlen_k - n * kBlockN;
      int const diagonal = row + 1 + (args_.seqlen_k - args_.seqlen_q) - n * kBlockN;
      int const visible[2] = {args_.causal ? min(keys, diagonal) : keys,
                              args_.causal ? min(keys, diagonal + 8) : keys};
      mask_scores(s, visible);
    }
  }

  __device__ __forceinline__ void wait_block() const {
    FullBarrier::wait(&shared_.kv_full[ring_.slot], ring_.phase);
  }
  __device__ __forceinline__ void wait_block_after() const {
    auto after = ring_;
    after.advance();
    FullBarrier::wait(&shared_.kv_full[after.slot], after.phase);
  }
  __device__ __forceinline__ void release_slot(int slot) const {
    if (threadIdx.x % 32 == 0) EmptyBarrier::arrive(&shared_.kv_empty[slot]);
  }
  __device__ __forceinline__ void release_block() {
    release_slot(ring_.slot);
    ring_.advance();
  }
  __device__ __forceinline__ void wait_q() const {
    FullBarrier::wait(&shared_.q_full[q_ring_.slot][warpgroup_], q_ring_.phase);
  }
  // Whether a tile's output takes the place of its Q.
  __device__ __forceinline__ bool keeps_q() const { return kTmaStore && !args_.plain_store; }
  __device__ __forceinline__ void release_q(bool keep) {
    if (!keep && threadIdx.x % 32 == 0) EmptyBarrier::arrive(&shared_.q_empty[q_ring_.slot][warpgroup_]);
    q_ring_.advance();
  }
  // Once TMA has read the output of tile_.
  __device__ __forceinline__ void release_output() const {
    if (keeps_q() && threadIdx.x % 32 == 0) {
      tma_store_wait<0>();
      EmptyBarrier::arrive(&shared_.q_empty[q_slot_][warpgroup_]);
    }
  }
  __device__ __forceinline__ void skip_blocks(int count) {
    for (int i = 0; i < count; ++i) {
      wait_block();
      release_block();
    }
  }
};

}  // namespace hopper_fa
