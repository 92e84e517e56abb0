// What the matrix products read: Q, K and V in shared memory, P in registers.
#pragma once

#include "forward/traits.cuh"

namespace hopper_fa {

// A operand of QK: a warpgroup's Q in its stage.
template <class Traits>
__device__ __forceinline__ auto q_fragment(typename Traits::Element const* stage) {
  Tensor q = make_tensor(make_smem_ptr(stage), typename Traits::LayoutQ{});
  auto thread = typename Traits::MmaQK{}.get_slice(0);
  return thread.make_fragment_A(thread.partition_A(q));
}

// B operand of QK: the K block in a slot of the ring.
template <class Traits>
__device__ __forceinline__ auto k_fragment(uint8_t const* slot) {
  using Element = typename Traits::Element;
  Tensor k = make_tensor(make_smem_ptr(reinterpret_cast<Element const*>(slot)), typename Traits::LayoutK{});
  auto thread = typename Traits::MmaQK{}.get_slice(0);
  return thread.make_fragment_B(thread.partition_B(k));
}

// The same of half the block's keys.
template <class Traits, int kHalf>
__device__ __forceinline__ auto half_k_fragment(uint8_t const* slot) {
  using Element = typename Traits::Element;
  Tensor k = make_tensor(make_smem_ptr(reinterpret_cast<Element const*>(slot)), typename Traits::LayoutK{});
  Tensor half = local_tile(k, Shape<Int<Traits::kBlockN / Traits::kTile.qk_parts>, Int<Traits::kHeadDim>>{},
                           make_coord(Int<kHalf>{}, _0{}));
  auto thread = typename Traits::MmaHalfQK{}.get_slice(0);
  return thread.make_fragment_B(thread.partition_B(half));
}

// B operand of P V: the V block in a slot, or a part of its columns.
template <class Traits, int kPart>
__device__ __forceinline__ auto v_fragment(uint8_t const* slot) {
  using Element = typename Traits::ElementV;
  constexpr int kFirst = kPart * (Traits::kHeadDim / Traits::kParts) * Traits::kBlockN;
  Tensor v = make_tensor(make_smem_ptr(reinterpret_cast<Element const*>(slot) + kFirst),
                         decltype(Traits::template layout_vt<kPart>()){});
  auto thread = typename Traits::template MmaPV<kPart>{}.get_slice(0);
  return thread.make_fragment_B(thread.partition_B(v));
}

// B operand of the row sums: the 8 rows behind V's channels.
template <class Traits>
__device__ __forceinline__ auto ones_fragment(uint8_t const* slot) {
  using Element = typename Traits::ElementV;
  Tensor ones =
      make_tensor(make_smem_ptr(reinterpret_cast<Element const*>(slot) + Traits::kHeadDim * Traits::kBlockN),
                  typename Traits::LayoutOnes{});
  auto thread = typename Traits::MmaRowSum{}.get_slice(0);
  return thread.make_fragment_B(thread.partition_B(ones));
}

// Two e4m3 codes, each in a byte of its own half, from what is to be rounded to them (exp2_linear.h). What is
// below 0 is 0, and NaN is 0xff.
// NOTE: half precision has integers from 1024 on, with the code in the low byte.
__device__ __forceinline__ uint32_t round_codes(float low, float high) {
  uint32_t halves;
  asm("{\n"
      ".reg .b32 t;\n"
      "cvt.rn.relu.f16x2.f32 t, %2, %1;\n"
      "add.rn.f16x2 %0, t, %3;\n"
      "}"
      : "=r"(halves)
      : "f"(low), "f"(high), "r"(0x64006400u));
  return halves;
}

// A operand of P V: P rounded, from where the accumulator of S has it, or the number that its code is
// rounded from.
// NOTE: the FP32 accumulator of S and the 16-bit A operand of P V hold the same elements in the same threads
// in the same order, so P never leaves its registers. The 8-bit A operand wants four neighbouring keys of a
// row where the accumulator has two and, 8 keys on, two more: it takes them as they are, and V's keys are
// permuted to match (Fp8Params).
template <class Traits, class Scores, class Probabilities>
__device__ __forceinline__ void round_probabilities(Scores const& s, Probabilities& p) {
  using Element = typename Traits::ElementV;
  static_assert(decltype(size(s))::value == decltype(size(p))::value);
  constexpr int kWidth = 4 / sizeof(Element);  // elements of a register
  cutlass::NumericArrayConverter<Element, float, kWidth> round;
  CUTE_UNROLL
  for (int i = 0; i < size(s); i += kWidth) {
    cutlass::Array<float, kWidth> values;
    // Register i / 4 of an 8-bit operand: row (i / 4) % 2 of score octets 2 (i / 8) and 2 (i / 8) + 1.
    CUTE_UNROLL
    for (int j = 0; j < kWidth; ++j)
      values[j] = s(Traits::kFp8 ? i / 8 * 8 + j / 2 * 4 + i / 4 % 2 * 2 + j % 2 : i + j);
    if constexpr (Traits::kLinearExp2)
      recast<uint32_t>(p)(i / kWidth) =
          __byte_perm(round_codes(values[0], values[1]), round_codes(values[2], values[3]), 0x6420);
    else
      recast<cutlass::Array<Element, kWidth>>(p)(i / kWidth) = round(values);
  }
}

template <class Output>
__device__ __forceinline__ void scale_rows(Output& output, float const (&factor)[2]) {
  CUTE_UNROLL
  for (int i = 0; i < size(output); ++i) output(i) *= factor[(i >> 1) & 1];
}

}  // namespace hopper_fa
