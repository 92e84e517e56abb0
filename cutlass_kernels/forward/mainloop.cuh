// The computing side: one warpgroup's 64 query rows against all their key blocks, tile after tile.
//
//   turn i of a warpgroup:   issue S = Q K^T of block i          (tensor cores)
//                            issue O += P V of block i - 1       (tensor cores)
//                            P = softmax(S) of block i           beside that O += P V, and the other
//                            warpgroups' products
//
// Block i - 1 may belong to the tile before: its output is finished and stored in the next tile's first turn,
// so the tensor cores do not run dry between tiles.
//
// 8-bit inputs: P V of a block goes into a temporary of its own, T, and O = O alpha + T in FP32. The tensor
// core keeps 13 bits of what it adds up, so its sums must be short.
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
  static constexpr bool kFp8 = Traits::kFp8;
  static constexpr int kBlockN = Traits::kBlockN;
  using Softmax =
      std::conditional_t<kFp8, QuantizedSoftmax<kTile.fma_exp2_octets>, OnlineSoftmax<kTile.fma_exp2_octets>>;
  template <int kPart>
  using PartOfOutput = decltype(partition_fragment_C(
      typename Traits::template MmaPV<kPart>{}, Shape<_64, Int<Traits::template kPartColumns<kPart>>>{}));
  using Output =
      std::conditional_t<kFp8, decltype(make_tensor<float>(Int<Traits::kHeadDim / 2>{})), PartOfOutput<0>>;
  struct Nothing {};  // NOTE: an array that is not used changes the code of the d256 kernel all the same
  // The widest part is the last: it has the row sum.
  using Temporary = std::conditional_t<kFp8, PartOfOutput<Traits::kParts - 1>, Nothing>;
  using Probabilities = decltype(make_tensor<typename Traits::ElementV>(typename Traits::LayoutP{}));

  typename Traits::Arguments const& args_;
  Shared& shared_;
  int const warpgroup_;  // among the computing ones
  Baton const baton_;
  RingCursor<Traits::kStages> ring_;
  RingCursor<Traits::kQStages> q_ring_;

  Output output_;         // 64 x head_dim, FP32
  float row_sum_[2];      // 8 bit: the output column that V's row of ones makes; the quad's first lane has it
  float alpha_[2];        // 8 bit: what O must be multiplied by before the product of p_ joins it
  int k_scales_;          // 8 bit: where those of the head start whose scores come next
  Probabilities p_;       // 64 x kBlockN, of the last block whose QK is done
  Softmax softmax_;       // of the tile that p_ belongs to
  Tile tile_;             // that tile
  int q_slot_;            // where its Q was, and its output will be (tma_store)
  bool pending_ = false;  // p_ still waits for its V
  bool accumulate_ = false;  // output_ holds something of tile_ already
  bool started_ = false;     // the CTA has read a K block: a V block follows the next one

 public:
  __device__ Mainloop(typename Traits::Arguments const& args, Shared& shared, int warpgroup)
      : args_(args),
        shared_(shared),
        warpgroup_(warpgroup),
        baton_{warpgroup, kTile.ping_pong == PingPong::kNever ? 1 : args.warpgroups},
        softmax_(make_softmax({0, 0, 0})) {
    baton_.start();
  }

  // All turns of a tile; what it leaves pending, the next run() or flush() completes. refill(turn) comes at
  // the start of every turn: without a loading warp, that is where the loads are issued.
  template <class Refill>
  __device__ __forceinline__ void run(Tile const& tile, Refill refill) {
    int const tile_rows = 64 * args_.warpgroups;
    int const tile_end = block_range(tile.m_block * tile_rows, tile_rows, args_.seqlen_q, args_.seqlen_k,
                                     args_.causal, kBlockN)
                             .end;
    BlockRange const range =
        block_range(first_row(tile), 64, args_.seqlen_q, args_.seqlen_k, args_.causal, kBlockN);
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
      store_empty<Traits>(args_, tile, first_row(tile));
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
      for (int n = range.end - 2; n >= 0; --n) {
        refill(range.end - 1 - n + skipped);
        next_turn(n, range);
      }
    } else {
      run_in_order(tile, range, skipped, refill);
    }
  }

  // After the last tile.
  __device__ __forceinline__ void flush() {
    if (pending_) {
      Temporary t;
      issue_pv(t);
      finish_pending(t);
      release_output();
    }
  }

 private:
  // QK of a tile's first block, beside PV of the last block of the tile before if that is pending.
  template <bool kPending>
  __device__ __forceinline__ void first_turn(Tile const& tile, BlockRange range) {
    float alpha[2];
    int const n = range.end - 1, q_slot = q_ring_.slot;
    Softmax fresh = make_softmax(tile);
    float const block_scale = k_scale(n);
    Tensor s = make_scores();
    Temporary t;
    wait_block();
    baton_.take();
    issue_product(typename Traits::MmaQK{}, q_operand(), k_operand(), s, false);
    int const k_slot = ring_.slot;
    ring_.advance();
    if constexpr (kPending) issue_pv(t);
    baton_.pass();
    wait_product<kPending ? 1 : 0>(s);
    if (!kPending && started_) skip_blocks(1);
    release_slot(k_slot);
    if (n == 0) release_q();
    Tensor p = prepare_scores(s, n, range, first_row(tile));
    step(fresh, p, block_scale, alpha);  // nothing to rescale yet
    if constexpr (kPending && !kFp8) finish_pending(t);
    if constexpr (kPending && kFp8) finish_pv(t), release_block();
    accept(p, alpha);
    // NOTE: P is rounded before the epilogue, which would spill beside 64 scores a thread.
    if constexpr (kPending && kFp8) finish_tile();
    softmax_ = fresh;
    clear_output();
    tile_ = tile;
    pending_ = started_ = true;
    accumulate_ = false;
    if (n > 0) wait_block();
    if constexpr (kPending) release_output();
    // NOTE: through a shuffle; else ptxas computes the descriptors of Q in vector registers, 19 R2UR a turn.
    if constexpr (kTile.tma_store) q_slot_ = __shfl_sync(~0u, q_slot, 0);
  }

  // The hot loop. On entry the slot at ring_, K of block n, has landed.
  __device__ __forceinline__ void next_turn(int n, BlockRange range) {
    float alpha[2];
    float const block_scale = k_scale(n);
    Tensor s = make_scores();
    Temporary t;
    baton_.take();
    issue_product(typename Traits::MmaQK{}, q_operand(), k_operand(), s, false);
    int const k_slot = ring_.slot;
    ring_.advance();
    if (kTile.ping_pong == PingPong::kAfterQK) baton_.pass();
    issue_pv(t);
    if (kTile.ping_pong == PingPong::kAfterPV) baton_.pass();
    wait_product<1>(s);
    release_slot(k_slot);
    if (n == 0) release_q();
    Tensor p = prepare_scores(s, n, range, first_row(tile_));
    bool const rescale = step(softmax_, p, block_scale, alpha);
    // NOTE: the next turn's block is waited for here because the wait is a loop: with the fence before it,
    // nvcc moves no exponential across. Without the two, all of them end up below wait_product, and PV runs
    // beside nothing.
    warpgroup_fence_operand(p);
    if (n > 0) wait_block_after();
    finish_pv(t);
    release_block();
    accept(p, alpha);
    if (!kFp8 && rescale) scale_rows(output_, alpha);
  }

  // A turn in which this warpgroup has no scores to compute.
  __device__ __forceinline__ void skip_turn() {
    baton_.take();
    baton_.pass();
    skip_blocks(1);
    if (pending_) {
      Temporary t;
      issue_pv(t);
      finish_pending(t);
      release_output();
    } else if (started_ || !kTile.overlap) {
      skip_blocks(1);
    }
    started_ = true;
  }

  // t: 8 bit: gets the product of one block, or a part of its columns. A fresh one for every product, so that
  // it needs no registers before. kWait: the V block may not have landed yet.
  template <int kPart = 0, bool kWait = kPart == 0>
  __device__ __forceinline__ void issue_pv(Temporary& t) {
    if constexpr (kWait) wait_block();
    typename Traits::template MmaPV<kPart> mma;
    if constexpr (kFp8) {
      auto part = make_tensor(t.data(), PartOfOutput<kPart>{}.layout());
      issue_product(mma, p_, v_operand<kPart>(), part, false);
    } else {
      issue_product(mma, p_, v_operand<kPart>(), output_, accumulate_);
      accumulate_ = true;
    }
  }

  // Waits for the product that issue_pv issued, and adds it to the output.
  template <int kPart = 0>
  __device__ __forceinline__ void finish_pv(Temporary& t) {
    if constexpr (kFp8) {
      constexpr int kSize = Traits::kHeadDim / Traits::kParts / 2;
      wait_product<0>(t);
      CUTE_UNROLL
      for (int i = 0; i < kSize; ++i) {
        float& output = output_(kPart * kSize + i);
        output = fmaf(output, alpha_[(i >> 1) & 1], t(i));
      }
      if constexpr (kPart == Traits::kParts - 1) {
        CUTE_UNROLL
        for (int r = 0; r < 2; ++r) row_sum_[r] = fmaf(row_sum_[r], alpha_[r], t(kSize + 2 * r));
      }
    } else {
      wait_product<0>(output_);
    }
  }

  __device__ __forceinline__ void finish_pending(Temporary& t) {
    finish_pv(t);
    release_block();
    finish_tile();
    pending_ = false;
  }

  __device__ __forceinline__ void finish_tile() {
    float factor[2], lse[2];
    if constexpr (kFp8) {
      float row_sum[2];
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) row_sum[r] = __shfl_sync(~0u, row_sum_[r], threadIdx.x % 32 & ~3);
      softmax_.finish(row_sum, args_.fp8.p_offset, factor, lse);
      store_output<Traits>(args_, tile_, first_row(tile_), output_, factor, lse);
    } else {
      softmax_.finish(factor, lse);
      if constexpr (kTile.tma_store)
        store_output_tma<Traits>(args_, tile_, first_row(tile_), output_, factor, lse,
                                 shared_.q[q_slot_][warpgroup_], warpgroup_);
      else
        store_output<Traits>(args_, tile_, first_row(tile_), output_, factor, lse);
    }
  }

  // Without overlap: QK, softmax and PV of a block one after the other, PV in one turn with QK of the next
  // block. Scores and temporary are never alive together, so they share registers.
  template <class Refill>
  __device__ __forceinline__ void run_in_order(Tile const& tile, BlockRange range, int skipped,
                                               Refill& refill) {
    float alpha[2];
    softmax_ = make_softmax(tile);
    tile_ = tile;
    accumulate_ = false;
    clear_output();
    baton_.take();
    for (int n = range.end - 1; n >= 0; --n) {
      float const block_scale = k_scale(n);
      Tensor s = make_scores();
      refill(range.end - 1 - n + skipped);
      wait_block();
      issue_product(typename Traits::MmaQK{}, q_operand(), k_operand(), s, false);
      baton_.pass();
      wait_product<0>(s);
      release_block();
      if (n == 0) release_q();
      Tensor p = prepare_scores(s, n, range, first_row(tile));
      bool const rescale = step(softmax_, p, block_scale, alpha);
      accept(p, alpha);
      if (!kFp8 && rescale && accumulate_) scale_rows(output_, alpha);
      // NOTE: V is waited for before the baton because the wait is a loop: with the fence before it, nothing
      // of the softmax moves below the baton, under which it would hold everybody up.
      warpgroup_fence_operand(p_);
      wait_block();
      baton_.take();
      Temporary t;
      issue_pv<0, false>(t);
      finish_pv(t);
      if constexpr (Traits::kParts == 2) {
        Temporary last;
        issue_pv<1>(last);
        finish_pv<1>(last);
      }
      release_block();
    }
    baton_.pass();
    finish_tile();
  }

  // A tile's softmax before its first block. 8 bit: starts the loads of its dequantisation factors.
  __device__ __forceinline__ Softmax make_softmax(Tile const& tile) {
    if constexpr (kFp8) {
      Fp8Params const& fp8 = args_.fp8;
      int const row = first_row(tile) + row_in_tile();
      float const* const q_scale =
          fp8.q_scale.data + tile.batch * fp8.q_scale.batch_stride + tile.head * fp8.q_scale.head_stride;
      Softmax softmax;
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        int const group = min(row + 8 * r, args_.seqlen_q - 1) / fp8.q_group_rows;
        softmax.row_scale[r] = __ldg(q_scale + group * fp8.q_scale.group_stride) * args_.scale_log2;
      }
      k_scales_ =
          tile.batch * fp8.k_scale.batch_stride + tile.head / args_.q_heads_per_kv * fp8.k_scale.head_stride;
      return softmax;
    } else {
      return Softmax(args_.scale_log2, kTile.rescale_threshold);
    }
  }

  // 8 bit: dequantisation factor of K block n. Loaded at the start of a turn, needed after QK.
  __device__ __forceinline__ float k_scale(int n) const {
    if constexpr (kFp8) {
      ScaleRef const& scales = args_.fp8.k_scale;
      float scale;
      // NOTE: volatile, or the compiler moves the load down to where it is needed, and its latency with it.
      asm volatile("ld.global.nc.f32 %0, [%1];"
                   : "=f"(scale)
                   : "l"(scales.data + k_scales_ + n * scales.group_stride));
      return scale;
    } else {
      return 1;
    }
  }

  // Scores to P, unrounded; whether and by what the output must be rescaled.
  template <class Scores>
  __device__ __forceinline__ bool step(Softmax& softmax, Scores& s, float k_scale, float (&alpha)[2]) {
    if constexpr (kFp8) {
      softmax.step(s, k_scale, args_.fp8.p_offset, alpha);
      return true;
    } else {
      return softmax.step(s, alpha);
    }
  }

  // Makes P the A operand of the next P V, rounded.
  template <class Scores>
  __device__ __forceinline__ void accept(Scores const& p, float const (&alpha)[2]) {
    round_probabilities<Traits>(p, p_);
    if constexpr (kFp8) alpha_[0] = alpha[0], alpha_[1] = alpha[1];
  }

  __device__ __forceinline__ void clear_output() {
    if constexpr (kFp8) {
      clear(output_);
      row_sum_[0] = row_sum_[1] = 0;
    }
  }

  __device__ __forceinline__ int first_row(Tile const& tile) const {
    return 64 * (tile.m_block * args_.warpgroups + warpgroup_);
  }

  static __device__ __forceinline__ auto make_scores() {  // 64 x kBlockN, FP32 (int8: int32)
    return partition_fragment_C(typename Traits::MmaQK{}, Shape<_64, Int<kBlockN>>{});
  }

  __device__ __forceinline__ auto q_operand() const {
    return q_fragment<Traits>(shared_.q[q_ring_.slot][warpgroup_]);
  }
  __device__ __forceinline__ auto k_operand() const { return k_fragment<Traits>(shared_.kv[ring_.slot]); }
  template <int kPart>
  __device__ __forceinline__ auto v_operand() const {
    return v_fragment<Traits, kPart>(shared_.kv[ring_.slot]);
  }

  // The scores in FP32, negated and masked as need be.
  template <class Scores>
  __device__ __forceinline__ auto prepare_scores(Scores const& products, int n, BlockRange range,
                                                 int first_row) const {
    Tensor s = make_tensor<float>(products.layout());
    CUTE_UNROLL
    for (int i = 0; i < size(s); ++i) s(i) = static_cast<float>(products(i));
    if (args_.negate_scores) {
      CUTE_UNROLL
      for (int i = 0; i < size(s); ++i) s(i) = -s(i);
    }
    if (n >= range.unmasked) {
      int const row = first_row + row_in_tile();
      int const keys = args_.seqlen_k - n * kBlockN;
      int const diagonal = row + 1 + (args_.seqlen_k - args_.seqlen_q) - n * kBlockN;
      int const visible[2] = {args_.causal ? min(keys, diagonal) : keys,
                              args_.causal ? min(keys, diagonal + 8) : keys};
      mask_scores(s, visible);
    }
    return s;
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
  // keep: the tile's output needs the place.
  __device__ __forceinline__ void release_q(bool keep = kTile.tma_store) {
    if (!keep && threadIdx.x % 32 == 0) EmptyBarrier::arrive(&shared_.q_empty[q_ring_.slot][warpgroup_]);
    q_ring_.advance();
  }
  // Once TMA has read the output of tile_.
  __device__ __forceinline__ void release_output() const {
    if (kTile.tma_store && threadIdx.x % 32 == 0) {
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
