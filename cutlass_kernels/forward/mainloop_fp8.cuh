// The computing side for 8-bit inputs: one warpgroup's 64 query rows against all their key blocks.
//
//   turn of block n:   T = P V of block n, part by part of its columns    (tensor cores)
//                      O = O alpha + T in FP32, a part while the next ones are multiplied
//                      S = Q K^T of block n - 1                           (tensor cores)
//   then:              P = softmax(S), beside the other warpgroups' turns
//
// Tiles with overlap have no T: O and S fill the registers, and P V of block n runs beside the softmax of
// block n - 1:
//
//   turn of block n:   S = Q K^T of block n - 1, O += P V of block n      (tensor cores)
//                      P' = softmax(S)
//                      O = O alpha where a maximum outgrew; every few blocks O moves to FP32 sums (flush.cuh)
//
// Tiles with key_vectors take S to S k_scale q_scale + key_bias in FP32 first, with a scale and a bias a key.
//
// The tensor core keeps 13 bits of what it adds up, so its sums must be short: T starts from zero in every
// block, O after every flush. Tiles with neither add up in the tensor core all the same.
#pragma once

#include "common/mask.cuh"
#include "common/quantized_softmax.cuh"
#include "forward/epilogue.cuh"
#include "forward/epilogue_tma.cuh"
#include "forward/flush.cuh"
#include "forward/operands.cuh"
#include "forward/traits.cuh"

namespace hopper_fa {

template <class Traits>
class Fp8Mainloop {
  using Shared = typename Traits::SharedStorage;
  static constexpr ForwardTile kTile = Traits::kTile;
  static constexpr int kBlockN = Traits::kBlockN;
  static constexpr bool kTemporary = kTile.pv_parts > 0;
  static constexpr bool kRowSumColumn = forward_row_sum_column(kTile);
  static constexpr int kParts = Traits::kParts;
  static constexpr int kPartSize = Traits::kHeadDim / kParts / 2;  // registers of a part, without the row sum
  static constexpr int kQKParts = kTile.qk_parts;
  static constexpr int kHalf = kBlockN / kQKParts;
  static constexpr int kInFlight = kTile.pv_in_flight;
  static constexpr bool kKeyVectors = kTile.key_vectors;
  static constexpr bool kTurns = kTile.ping_pong != PingPong::kNever;
  static constexpr bool kStoreFromQ = kTile.store == Store::kQStage;
  using Score = typename Traits::Score;
  using Softmax = QuantizedSoftmax<std::conditional_t<kKeyVectors, float, Score>, Traits::kLinearExp2>;
  using Scores = decltype(make_tensor<Score>(Int<kBlockN / 2>{}));
  using Sums = decltype(make_tensor<float>(Int<Traits::kOutputColumns / 2>{}));
  using P = decltype(make_tensor<typename Traits::ElementV>(typename Traits::LayoutP{}));  // 64 x kBlockN
  using RowSums = decltype(partition_fragment_C(typename Traits::MmaRowSum{}, Shape<_64, _8>{}));

  typename Traits::Arguments const& args_;
  Shared& shared_;
  int const warpgroup_;  // among the computing ones
  Baton const baton_;
  RingCursor<Traits::kStages> ring_;
  RingCursor<Traits::kQStages> q_ring_;
  RingCursor<Traits::kQStages + 1> affine_ring_;

  decltype(make_tensor<float>(Int<Traits::kHeadDim / 2>{})) output_;  // 64 x head_dim
  // The output column that V's row of ones makes; the quad's first lane has it. Or, where nothing is asked of
  // that row, the FP32 sum of the unrounded P in this thread's columns.
  float row_sum_[2];
  int k_scales_;          // where those of the tile's head start
  bool storing_ = false;  // TMA reads the output of the tile before from that tile's Q stage
  Softmax softmax_;

 public:
  __device__ Fp8Mainloop(typename Traits::Arguments const& args, Shared& shared, int warpgroup)
      : args_(args), shared_(shared), warpgroup_(warpgroup), baton_{warpgroup, args.turn_takers} {
    if constexpr (kTurns) baton_.start();
  }

  // All turns of a tile, and its output.
  template <class Refill>
  __device__ __forceinline__ void run(WarpgroupTile const& tile, Refill) {
    int const tile_end = tile.tile_end, row = tile.row;
    BlockRange const range = tile.range;
    // Blocks that only later rows of the tile see: pass them on unread, but keep taking turns.
    int const skipped = tile_end - range.end;
    if constexpr (kTile.overlap) {
      // NOTE: the ring has K, K, V, K, V, ... V: the last V of these follows the first K that is read.
      int const slots = 2 * skipped - (skipped > 0 && range.end > 0);
#pragma unroll 1
      for (int i = 0; i < slots; ++i) skip_block();
    } else {
#pragma unroll 1
      for (int i = 0; i < skipped; ++i) {
        skip_turn();
        skip_block();
        skip_block();
      }
    }
    if (tile_end > 0) wait_q();
    if (range.end == 0) {
      if (tile_end > 0) {
        release_output();
        release_q(false);
        affine_ring_.advance();
        if constexpr (!kTile.overlap) skip_turn();  // as often as below
      }
      store_empty<Traits>(args_, tile);
      return;
    }
    softmax_ = Softmax{};
    // NOTE: through a shuffle, so that the compiler knows that all lanes have the same.
    k_scales_ = __shfl_sync(~0u, shared_.k_scales[q_ring_.slot][warpgroup_], 0);
    clear(output_);
    row_sum_[0] = row_sum_[1] = 0;
    if constexpr (kTile.overlap)
      run_overlapped(range, row, skipped > 0);
    else
      run_in_order(range, row);
    finish_tile(tile);
  }

  // After the last tile.
  __device__ __forceinline__ void flush() {
    if constexpr (kStoreFromQ) tma_store_wait<0>();  // it reads shared memory
  }

 private:
  __device__ __forceinline__ void run_in_order(BlockRange const& range, int row) {
    take_turn();
#pragma unroll 1
    for (int n = range.end - 1; n >= 0; --n) {
      float const block_scale = kKeyVectors ? args_.scale_log2 : k_scale(n);
      read_q_scales();
      Scores s;
      int best[2];
      wait_block();
      // NOTE: else int8 keeps its counters in vector registers, and 100 bytes spill; at d128 it costs
      // registers.
      if constexpr (Traits::kHeadDim == 256) __syncwarp();
      issue_half<0>(s);
      if constexpr (kQKParts == 2) issue_half<1>(s);
      pass_turn();
      finish_half<0, kQKParts - 1>(s, best);
      if constexpr (kQKParts == 2) finish_half<1, 0>(s, best);
      if constexpr (kKeyVectors) __syncwarp();  // all lanes have read their keys' vectors
      release_slot(ring_.slot);
      ring_.advance();
      if (n == 0) release_q();
      bool const masked = n >= range.unmasked;
      if (masked || args_.negate_scores) prepare_scores(s, best, n, row, masked);
      float alpha[2];
      bool const rescaled = softmax_.template step<!kRowSumColumn, !kKeyVectors>(
          scores_of(s), best, floats_of(s), block_scale, args_.fp8.p_offset, args_.fp8.rescale_threshold,
          alpha, row_sum_);
      P p;
      round_probabilities<Traits>(floats_of(s), p);
      // NOTE: V is waited for before the baton because the wait is a loop: with the fence before it, nothing
      // of the softmax moves below the baton, under which it would hold everybody up.
      warpgroup_fence_operand(p);
      wait_block();
      take_turn();
      if constexpr (kTemporary) {
        add_product(p, alpha);
      } else {
        if (rescaled) scale_rows(output_, alpha);
        issue_product_into_output(p);
        wait_product<0>(output_);
      }
      release_slot(ring_.slot);
      ring_.advance();
    }
    pass_turn();
  }

  // passed_by: other rows of the tile see blocks that these do not.
  __device__ __forceinline__ void run_overlapped(BlockRange const& range, int row, bool passed_by) {
    std::conditional_t<kTile.flush, FlushedOutput<Traits>, NeverFlushed> flushed(args_, shared_, warpgroup_,
                                                                                 range.end);
    P p;
    {
      Scores s;
      float alpha[2];
      int const n = range.end - 1;
      float const block_scale = k_scale(n);
      read_q_scales();
      wait_block();
      issue_half<0>(s);
      release_output();
      follow_scores<0>(s, ring_.slot, n, range, row, block_scale, alpha);
      ring_.advance();
      if (passed_by) skip_block();
      round_probabilities<Traits>(floats_of(s), p);
    }
#pragma unroll 1
    for (int n = range.end - 2; n >= 0; --n) {
      Scores s;
      float alpha[2];
      float const block_scale = k_scale(n);
      read_q_scales();
      wait_block();
      __syncwarp();
      issue_half<0>(s);
      int const k_slot = ring_.slot;
      ring_.advance();
      wait_block();
      RowSums sums;
      issue_product_into_output(p);
      issue_row_sums(p, sums);
      bool const rescaled =
          follow_scores<kRowSumColumn ? 2 : 1>(s, k_slot, n, range, row, block_scale, alpha);
      // NOTE: P takes the place of the one in use only after the product.
      warpgroup_fence_operand(s);
      finish_products(sums, alpha);
      release_slot(ring_.slot);
      ring_.advance();
      if (rescaled) scale_rows(output_, alpha);
      round_probabilities<Traits>(floats_of(s), p);
      flushed.count_block(output_, softmax_.row_max);
    }
    RowSums sums;
    wait_block();
    issue_product_into_output(p);
    issue_row_sums(p, sums);
    constexpr float kSame[2] = {1.f, 1.f};
    finish_products(sums, kSame);
    release_slot(ring_.slot);
    ring_.advance();
    flushed.finish(output_, softmax_.row_max);
  }

  // Waits for S of block n with kPending later products in flight: P in its place, as floats. Returns whether
  // alpha is not 1 in a row of the warp.
  template <int kPending>
  __device__ __forceinline__ bool follow_scores(Scores& s, int k_slot, int n, BlockRange const& range,
                                                int row, float block_scale, float (&alpha)[2]) {
    int best[2];
    finish_half<0, kPending>(s, best);
    release_slot(k_slot);
    if (n == 0) release_q();
    bool const masked = n >= range.unmasked;
    if (masked || args_.negate_scores) prepare_scores(s, best, n, row, masked);
    return softmax_.template step<!kRowSumColumn, true>(scores_of(s), best, floats_of(s), block_scale,
                                                        args_.fp8.p_offset, args_.fp8.rescale_threshold,
                                                        alpha, row_sum_);
  }

  // O += P V of the block in the ring's slot, in the tensor core's accumulator.
  __device__ __forceinline__ void issue_product_into_output(P const& p) {
    auto output = part_of<0>(output_);
    issue_product(typename Traits::template MmaPV<0>{}, p, v_fragment<Traits, 0>(shared_.kv[ring_.slot]),
                  output, true);
  }
  // The sums of P's rows over the block, a product of their own.
  __device__ __forceinline__ void issue_row_sums(P const& p, RowSums& sums) {
    if constexpr (kRowSumColumn)
      issue_product(typename Traits::MmaRowSum{}, p, ones_fragment<Traits>(shared_.kv[ring_.slot]), sums,
                    false);
  }
  // Waits for the products in flight. The row sums become relative to the maxima that alpha leads to.
  __device__ __forceinline__ void finish_products(RowSums& sums, float const (&alpha)[2]) {
    wait_product<0>(output_);
    if constexpr (kRowSumColumn) {
      warpgroup_fence_operand(sums);
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) row_sum_[r] = (row_sum_[r] + sums(2 * r)) * alpha[r];
    }
  }

  // O = O alpha + P V, the product part by part of its columns, kInFlight parts in flight.
  __device__ __forceinline__ void add_product(P const& p, float const (&alpha)[2]) {
    Sums t;
    auto const issue = [&](auto part) {
      if constexpr (part < kParts) issue_part<part>(t, p);
    };
    for_each(make_int_sequence<kInFlight>{}, issue);
    for_each(make_int_sequence<kParts>{}, [&](auto part) {
      add_part<part, (part + kInFlight <= kParts ? kInFlight - 1 : kParts - 1 - part)>(t, alpha);
      issue(Int<part + kInFlight>{});
    });
  }

  template <int kPart>
  static constexpr int kSize = kPartSize + (kPart == kParts - 1 ? 4 : 0);

  // One part of the columns of P V of the block in v_slot.
  template <int kPart>
  __device__ __forceinline__ void issue_part(Sums& t, P const& p) {
    typename Traits::template MmaPV<kPart> mma;
    auto part = part_of<kPart>(t);
    issue_product(mma, p, v_fragment<Traits, kPart>(shared_.kv[ring_.slot]), part, false);
  }
  template <int kPart, class Sums>
  static __device__ __forceinline__ auto part_of(Sums& t) {
    using Fragment = decltype(partition_fragment_C(typename Traits::template MmaPV<kPart>{},
                                                   Shape<_64, Int<Traits::template kPartColumns<kPart>>>{}));
    return make_tensor(t.data() + kPart * kPartSize, Fragment{}.layout());
  }

  // Waits until at most kPending products are in flight, and adds the part to the output.
  template <int kPart, int kPending>
  __device__ __forceinline__ void add_part(Sums& t, float const (&alpha)[2]) {
    auto part = part_of<kPart>(t);
    wait_product<kPending>(part);
    CUTE_UNROLL
    for (int i = 0; i < kPartSize; ++i) {
      float& output = output_(kPart * kPartSize + i);
      output = fmaf(output, alpha[(i >> 1) & 1], part(i));
    }
    if constexpr (kPart == kParts - 1) {
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) row_sum_[r] = fmaf(row_sum_[r], alpha[r], part(kPartSize + 2 * r));
    }
  }

  // Scores of half a block's keys.
  template <int kIndex>
  static __device__ __forceinline__ auto half_of(Scores& s) {
    using Fragment = decltype(partition_fragment_C(typename Traits::MmaHalfQK{}, Shape<_64, Int<kHalf>>{}));
    return make_tensor(s.data() + kIndex * (kHalf / 2), Fragment{}.layout());
  }
  template <int kIndex>
  __device__ __forceinline__ void issue_half(Scores& s) {
    auto half = half_of<kIndex>(s);
    if constexpr (Softmax::kStart != 0) {
      static_assert(kQKParts == 1);  // no register may be written while a product is in flight
      CUTE_UNROLL
      for (int i = 0; i < size(half); ++i) half(i) = static_cast<int32_t>(Softmax::kStart);
    }
    issue_product(typename Traits::MmaHalfQK{}, q_fragment<Traits>(shared_.q[q_ring_.slot][warpgroup_]),
                  half_k_fragment<Traits, kIndex>(shared_.kv[ring_.slot]), half, Softmax::kStart != 0);
  }

  // Waits for it, and follows the maxima.
  template <int kIndex, int kPending>
  __device__ __forceinline__ void finish_half(Scores& s, int (&best)[2]) {
    auto half = half_of<kIndex>(s);
    wait_product<kPending>(half);
    if constexpr (kKeyVectors) scale_keys<kIndex * kHalf>(half);
    max_bits<kIndex == 0>(scores_of(half), best);
  }

  // S = S k_scale q_scale + key_bias in place, of the block's keys from kFirst on.
  template <int kFirst, class Keys>
  __device__ __forceinline__ void scale_keys(Keys& s) const {
    uint32_t const vectors =
        cast_smem_ptr_to_uint(shared_.kv[ring_.slot] + Traits::kKBytes) + threadIdx.x % 4 * 8;
    auto scaled = floats_of(s);
    CUTE_UNROLL
    for (int octet = 0; octet < decltype(size(s))::value / 4; ++octet) {
      uint32_t const keys = vectors + 4 * (kFirst + 8 * octet);
      float2 const scale = load_shared_pair(keys),
                   bias = load_shared_pair(keys + Traits::kKeyVectorBytes / 2);
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        int const i = 4 * octet + 2 * r;
        float const q_scale = softmax_.row_scale[r];
        scaled(i) = fmaf(static_cast<float>(s(i)) * scale.x, q_scale, bias.x);
        scaled(i + 1) = fmaf(static_cast<float>(s(i + 1)) * scale.y, q_scale, bias.y);
      }
    }
  }

  // What most blocks do without: a negative softmax scale, the mask.
  __device__ __forceinline__ void prepare_scores(Scores& products, int (&best)[2], int n, int first_row,
                                                 bool masked) const {
    auto&& s = scores_of(products);
    if (args_.negate_scores) {
      CUTE_UNROLL
      for (int i = 0; i < size(s); ++i) s(i) = Softmax::negated(s(i));
    }
    int const keys = args_.seqlen_k - n * kBlockN;
    int const diagonal =
        first_row + fresh_row_in_tile() + 1 + (args_.seqlen_k - args_.seqlen_q) - n * kBlockN;
    int const visible[2] = {args_.causal ? min(keys, diagonal) : keys,
                            args_.causal ? min(keys, diagonal + 8) : keys};
    if (masked) mask_scores(s, visible, Softmax::hidden());
    max_bits<true>(s, best);
  }

  // The registers of the products as floats: P, and with key_vectors the scores.
  template <class Keys>
  static __device__ __forceinline__ auto floats_of(Keys& s) {
    return make_tensor(reinterpret_cast<float*>(s.data()), s.layout());
  }
  template <class Keys>
  static __device__ __forceinline__ decltype(auto) scores_of(Keys& s) {
    if constexpr (kKeyVectors)
      return floats_of(s);
    else
      return (s);
  }

  __device__ __forceinline__ void finish_tile(WarpgroupTile const& tile) {
    float factor[2], lse[2], row_sum[2];
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r)
      row_sum[r] =
          kRowSumColumn ? __shfl_sync(~0u, row_sum_[r], threadIdx.x % 32 & ~3) : quad_sum(row_sum_[r]);
    softmax_.finish(row_sum, args_.fp8.p_offset, factor, lse);
    // NOTE: two ways to the same values; at d256 with one Q stage registers are scarce, and d128 spills with
    // the first.
    constexpr bool kOneStage = Traits::kQStages == 1;
    int const slot = kOneStage ? q_ring_.phase ^ 1 : affine_ring_.slot;
    auto const store = [&](auto element) {
      using Out = decltype(element);
      auto const& affine = shared_.v_affine[slot][warpgroup_];
      if constexpr (kTile.store != Store::kPlain)
        store_dequantised_tma<Traits, Out>(
            args_, tile, output_, factor, lse, affine,
            kStoreFromQ ? reinterpret_cast<uint8_t*>(shared_.q[q_ring_.slot ^ 1][warpgroup_])
                        : shared_.output[warpgroup_],
            warpgroup_);
      else
        store_dequantised<Traits, Out>(args_, tile, output_, factor, lse, affine);
    };
    if (args_.fp8.out_dtype == DType::kFP16)
      store(cutlass::half_t{});
    else
      store(cutlass::bfloat16_t{});
    affine_ring_.advance();
    storing_ = kStoreFromQ;
  }

  // Dequantisation factors of the rows of Q, times softmax_scale log2(e).
  // NOTE: read for every block, for want of registers to hold them in.
  __device__ __forceinline__ void read_q_scales() {
    uint32_t const scales =
        cast_smem_ptr_to_uint(shared_.q_scales[q_ring_.slot][warpgroup_]) + 4 * fresh_row_in_tile();
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r)
      asm volatile("ld.shared.f32 %0, [%1];" : "=f"(softmax_.row_scale[r]) : "r"(scales + 32 * r));
  }

  // Dequantisation factor of K block n. Loaded before a turn, needed after it.
  __device__ __forceinline__ float k_scale(int n) const {
    ScaleRef const& scales = args_.fp8.k_scale;
    float scale;
    // NOTE: volatile, or the compiler moves the load down to where it is needed, and its latency with it.
    asm volatile("ld.global.nc.f32 %0, [%1];"
                 : "=f"(scale)
                 : "l"(scales.data + k_scales_ + n * scales.group_stride));
    return scale;
  }

  // NOTE: four immediate numbers are an indirect branch, which costs less than a register only where P V has
  // parts.
  __device__ __forceinline__ void take_turn() const {
    if constexpr (kTurns) kParts == 1 ? baton_.take() : baton_.take_immediate();
  }
  __device__ __forceinline__ void pass_turn() const {
    if constexpr (kTurns) baton_.pass();
  }
  __device__ __forceinline__ void skip_turn() const {
    if constexpr (kTurns) baton_.take_immediate(), baton_.pass();
  }

  __device__ __forceinline__ void wait_block() const {
    FullBarrier::wait(&shared_.kv_full[ring_.slot], ring_.phase);
  }
  __device__ __forceinline__ void release_slot(int slot) const {
    if (cute::elect_one_sync()) EmptyBarrier::arrive(&shared_.kv_empty[slot]);
  }
  __device__ __forceinline__ void skip_block() {
    wait_block();
    release_slot(ring_.slot);
    ring_.advance();
  }
  __device__ __forceinline__ void wait_q() const {
    FullBarrier::wait(&shared_.q_full[q_ring_.slot][warpgroup_], q_ring_.phase);
  }
  // keep: the tile's output needs the place.
  __device__ __forceinline__ void release_q(bool keep = kStoreFromQ) {
    if (!keep && cute::elect_one_sync()) EmptyBarrier::arrive(&shared_.q_empty[q_ring_.slot][warpgroup_]);
    q_ring_.advance();
  }
  // Once TMA has read the output of the tile before.
  __device__ __forceinline__ void release_output() {
    if (!kStoreFromQ || !storing_) return;
    if (cute::elect_one_sync()) {
      tma_store_wait<0>();
      EmptyBarrier::arrive(&shared_.q_empty[q_ring_.slot ^ 1][warpgroup_]);
    }
    storing_ = false;
  }
};

}  // namespace hopper_fa
