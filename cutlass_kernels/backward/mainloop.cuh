// The computing side for head dims up to 128: one warpgroup's 64 keys against all query blocks.
//
//   S^T = K Q^T, dP^T = V dO^T       a row a key, so P^T and dS^T are the register operands of
//   dV += P^T dO, dK += dS^T Q
//   dQ = dS K                        needs dS of both warpgroups: through shared memory; each makes its chunks
//
//   step i of a warpgroup:   P from S          beside dP of step i
//                            issue dV; dS      beside dV
//                            issue dQ, dK, and S of step i + 1
//                            dQ to shared memory, from where another warp adds it up; issue dP of step i + 1
#pragma once

#include "backward/epilogue.cuh"
#include "backward/traits.cuh"
#include "common/exp2.cuh"
#include "common/fragment.cuh"
#include "common/mask.cuh"

namespace hopper_fa {

template <class Traits>
class BackwardMainloop {
  using Element = typename Traits::Element;
  using Shared = typename Traits::SharedStorage;
  static constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN, kHeadDim = Traits::kHeadDim;
  static constexpr int kBothBarrier = 1;  // named; 0 is __syncthreads
  using Scores =
      decltype(partition_fragment_C(typename Traits::MmaScores{}, Shape<_64, Int<kBlockM>>{}));
  using Part = decltype(partition_fragment_C(typename Traits::MmaPart{}, Shape<_64, _64>{}));
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
  uint32_t dq_phase_ = 1;

  Gradient dk_, dv_;
  Scores s_;

 public:
  __device__ BackwardMainloop(BackwardArguments const& args, Shared& shared, int warpgroup)
      : args_(args), shared_(shared), warpgroup_(warpgroup), tile_(KeyTile::get<Traits>(args)) {}

  __device__ __forceinline__ void run() {
    clear(dk_);
    clear(dv_);
    int const heads = args_.q_heads_per_kv, count = tile_.walk.count;
    if (count > 0) {
      FullBarrier::wait(&shared_.k_full, 0);
      issue_s();
      FullBarrier::wait(&shared_.v_full, 0);
      wait_product<0>(s_);
      int step = 0;
      for (int left = heads * count; left > 1; --left) {
        one_step<true>(tile_.walk.block(step));
        if (++step == count) step = 0;
      }
      one_step<false>(tile_.walk.block(count - 1));
    }
    int const first_key = tile_.n_block * kBlockN + 64 * warpgroup_;
    store_rows<Element>(args_.dv, tile_.batch, tile_.head, first_key, args_.seqlen_k, args_.head_dim, dv_, 1.f);
    store_rows<Element>(args_.dk, tile_.batch, tile_.head, first_key, args_.seqlen_k, args_.head_dim, dk_,
                        args_.softmax_scale);
  }

 private:
  // On entry S of query block m is there; on exit that of the next one, if there is one (kMore).
  // NOTE: nothing is in flight from one step to the next: ptxas would serialise all products.
  template <bool kMore>
  __device__ __forceinline__ void one_step(int m) {
    int const q_slot = q_ring_.slot, do_slot = do_ring_.slot;
    FullBarrier::wait(&shared_.do_full[do_slot], do_ring_.phase);
    half_step<0>(m, q_slot, do_slot);
    if constexpr (Traits::kParts == 2) half_step<1>(m, q_slot, do_slot);
    warpgroup_wait<1>();  // dV
    release(shared_.do_empty[do_slot]);
    q_ring_.advance();
    do_ring_.advance();
    if constexpr (kMore && Traits::kTile.early_scores) issue_s();
    asm volatile("bar.sync %0, 256;" ::"n"(kBothBarrier) : "memory");
    Chunk dq;
    if constexpr (Traits::kTile.early_scores) {
      wait_product<0>(s_);
      release(shared_.q_empty[q_slot]);
      issue_dq(dq, 0);
      wait_product<0>(dq);
      leave_dq(dq);
    } else {
      issue_dq(dq, 0);
      warpgroup_wait<1>();  // dK
      release(shared_.q_empty[q_slot]);
      wait_product<0>(dq);
      if constexpr (kMore) issue_s();
      leave_dq(dq);
      wait_product<0>(s_);
    }
    ds_ring_.advance();
    if constexpr (!kMore) {
      warpgroup_fence_operand(dk_);
      warpgroup_fence_operand(dv_);
    }
  }

  template <int kPart>
  __device__ __forceinline__ void half_step(int m, int q_slot, int do_slot) {
    Part dp;
    issue_dp(dp, kPart);
    probabilities<kPart>(m, shared_.bias[q_slot]);
    Operand p, ds;
    CUTE_UNROLL
    for (int i = 0; i < 32; i += 2)
      recast<uint32_t>(p)(i / 2) = round_pair<Element>(s_(32 * kPart + i), s_(32 * kPart + i + 1));
    issue_product(typename Traits::MmaKeys{}, p, columns(shared_.dout[do_slot], kPart), dv_, true);
    wait_product<1>(dp);
    score_gradients(dp, kPart, shared_.delta[do_slot], ds);
    write_ds(ds, kPart);
    tma_store_fence();
    issue_product(typename Traits::MmaKeys{}, ds, columns(shared_.q[q_slot], kPart), dk_, true);
  }

  __device__ __forceinline__ void issue_s() {
    FullBarrier::wait(&shared_.q_full[q_ring_.slot], q_ring_.phase);
    issue_product(typename Traits::MmaScores{}, keys(shared_.k), rows(shared_.q[q_ring_.slot]), s_, false);
  }
  __device__ __forceinline__ void issue_dp(Part& dp, int part) {
    Tensor all = make_tensor(make_smem_ptr(shared_.dout[do_ring_.slot] + part * 64 * 64),
                             typename Traits::template LayoutRows<kBlockM>{});
    Tensor mine = local_tile(all, Shape<_64, Int<kHeadDim>>{}, make_coord(_0{}, _0{}));
    auto thread = typename Traits::MmaPart{}.get_slice(0);
    issue_product(typename Traits::MmaPart{}, keys(shared_.v), thread.make_fragment_B(thread.partition_B(mine)),
                  dp, false);
  }

  // Chunk i of the warpgroup's share of dQ = dS K.
  __device__ __forceinline__ void issue_dq(Chunk& dq, int i) {
    using Layout = typename Traits::template LayoutColumns<64, kBlockN>;
    int const chunk = warpgroup_ * Traits::kWarpgroupChunks + i;
    int const row_group = chunk / Traits::kSlabs, slab = chunk % Traits::kSlabs;
    auto thread = typename Traits::MmaQueries{}.get_slice(0);
    Tensor ds = make_tensor(make_smem_ptr(shared_.ds[ds_ring_.slot] + row_group * 64 * kBlockN), Layout{});
    Tensor k = make_tensor(make_smem_ptr(shared_.k + slab * 64 * kBlockN), Layout{});
    issue_product(typename Traits::MmaQueries{}, thread.make_fragment_A(thread.partition_A(ds)),
                  thread.make_fragment_B(thread.partition_B(k)), dq, false);
  }

  // A operand: the warpgroup's 64 rows of K or V.
  __device__ __forceinline__ auto keys(Element const* block) const {
    Tensor all = make_tensor(make_smem_ptr(block + warpgroup_ * 64 * 64),
                             typename Traits::template LayoutRows<kBlockN>{});
    Tensor mine = local_tile(all, Shape<_64, Int<kHeadDim>>{}, make_coord(_0{}, _0{}));
    auto thread = typename Traits::MmaScores{}.get_slice(0);
    return thread.make_fragment_A(thread.partition_A(mine));
  }
  // B operand: a block of Q or dO as it lies.
  __device__ __forceinline__ auto rows(Element const* block) const {
    Tensor t = make_tensor(make_smem_ptr(block), typename Traits::template LayoutRows<kBlockM>{});
    auto thread = typename Traits::MmaScores{}.get_slice(0);
    return thread.make_fragment_B(thread.partition_B(t));
  }
  // B operand: the same block, transposed.
  __device__ __forceinline__ auto columns(Element const* block, int part) const {
    Tensor all = make_tensor(make_smem_ptr(block + part * 64 * 64),
                             typename Traits::template LayoutColumns<kHeadDim, kBlockM>{});
    Tensor mine = local_tile(all, Shape<Int<kHeadDim>, _64>{}, make_coord(_0{}, _0{}));
    auto thread = typename Traits::MmaKeys{}.get_slice(0);
    return thread.make_fragment_B(thread.partition_B(mine));
  }

  // S to P in place, one part.
  template <int kPart>
  __device__ __forceinline__ void probabilities(int m, float const* bias) {
    auto part = make_tensor(s_.data() + 32 * kPart, Layout<_32>{});
    int const column = 2 * (threadIdx.x % 4) + 64 * kPart;
    CUTE_UNROLL
    for (int octet = 0; octet < 8; ++octet) {
      float2 const b = *reinterpret_cast<float2 const*>(bias + 8 * octet + column);
      CUTE_UNROLL
      for (int i = 4 * octet; i < 4 * octet + 4; ++i) part(i) = fmaf(part(i), args_.scale_log2, i % 2 ? b.y : b.x);
    }
    int const first_key = tile_.n_block * kBlockN + 64 * warpgroup_;
    int const first_row = m * kBlockM + 64 * kPart;
    int const shift = args_.seqlen_k - args_.seqlen_q;
    // NOTE: keys past the end are masked although they are zeros: exp2(0 - bias) may be infinite.
    if (first_key + 63 >= args_.seqlen_k || (args_.causal && first_key + 63 > first_row + shift)) {
      int hidden[2];
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        int const key = first_key + row_in_tile() + 8 * r;
        hidden[r] = args_.causal ? key - shift - first_row : 0;
        if (key >= args_.seqlen_k) hidden[r] = 64;
      }
      mask_transposed(part, hidden);
    }
    CUTE_UNROLL
    for (int i = 0; i < size(part); ++i) part(i) = exp2_sfu(part(i));
  }

  // dS = P (dP - delta), rounded.
  __device__ __forceinline__ void score_gradients(Part const& dp, int part, float const* delta, Operand& ds) {
    int const column = 64 * part + 2 * (threadIdx.x % 4);
    CUTE_UNROLL
    for (int octet = 0; octet < 8; ++octet) {
      float2 const d = *reinterpret_cast<float2 const*>(delta + 8 * octet + column);
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        int const i = 4 * octet + 2 * r, j = 32 * part + i;
        recast<uint32_t>(ds)(i / 2) =
            round_pair<Element>(s_(j) * (dp(i) - d.x), s_(j + 1) * (dp(i + 1) - d.y));
      }
    }
  }

  // Four 8 x 8 matrices at a time: 16 keys by two octets of queries. Lane i has the address of row i % 8 of
  // matrix i / 8, in WGMMA's 128-byte swizzle.
  __device__ __forceinline__ void write_ds(Operand const& ds, int part) {
    int const lane = threadIdx.x % 32;
    int const key = 64 * warpgroup_ + threadIdx.x % 128 / 32 * 16 + lane % 16;
    Element* const row = shared_.ds[ds_ring_.slot] + (part * kBlockN + key) * 64;
    auto words = recast<uint32_t>(ds);
    CUTE_UNROLL
    for (int octet = 0; octet < 8; octet += 2) {
      int const swizzled = (octet + lane / 16) ^ (lane % 8);
      Element* const to = row + swizzled * 8;
      SM90_U32x4_STSM_N::copy(words(2 * octet), words(2 * octet + 1), words(2 * octet + 2),
                              words(2 * octet + 3), *reinterpret_cast<uint128_t*>(to));
    }
  }

  // Gives a chunk of dQ to the adding warp, in fragment order.
  __device__ __forceinline__ void leave_dq(Chunk const& dq) {
    EmptyBarrier::wait(&shared_.dq_empty[warpgroup_], dq_phase_);
    dq_phase_ ^= 1;
    float4* const to = reinterpret_cast<float4*>(shared_.dq[warpgroup_]) + threadIdx.x % 128;
    CUTE_UNROLL
    for (int octet = 0; octet < 8; ++octet)
      to[octet * 128] =
          make_float4(dq(4 * octet), dq(4 * octet + 1), dq(4 * octet + 2), dq(4 * octet + 3));
    tma_store_fence();
    release(shared_.dq_full[warpgroup_]);
  }

  // A warp is done with something.
  static __device__ __forceinline__ void release(uint64_t& barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) EmptyBarrier::arrive(&barrier);
  }
};

}  // namespace hopper_fa
