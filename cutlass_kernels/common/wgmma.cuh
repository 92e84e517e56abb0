// One warpgroup's matrix products, issued asynchronously.
#pragma once

#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

namespace hopper_fa {

// C = A B, or C += A B if accumulate. Returns with the product in flight: cute::warpgroup_wait before
// touching C, and before touching A if it is in registers.
template <class Mma, class A, class B, class C>
__device__ __forceinline__ void issue_product(Mma mma, A const& a, B const& b, C& c, bool accumulate) {
  constexpr bool kAInRegisters = !cute::is_base_of_v<cute::GMMA::DescriptorIterator, typename Mma::FrgTypeA>;
  // NOTE: the fences keep the compiler from moving register traffic of A and C across the asynchronous
  // instructions.
  if constexpr (kAInRegisters) cute::warpgroup_fence_operand(const_cast<A&>(a));
  cute::warpgroup_fence_operand(c);
  cute::warpgroup_arrive();
  mma.accumulate_ = accumulate ? cute::GMMA::ScaleOut::One : cute::GMMA::ScaleOut::Zero;
  CUTE_UNROLL
  for (int k = 0; k < cute::size<2>(a); ++k) {
    cute::gemm(mma, a(cute::_, cute::_, k), b(cute::_, cute::_, k), c);
    mma.accumulate_ = cute::GMMA::ScaleOut::One;
  }
  cute::warpgroup_commit_batch();
  cute::warpgroup_fence_operand(c);
  if constexpr (kAInRegisters) cute::warpgroup_fence_operand(const_cast<A&>(a));
}

// Waits until at most kPending products are in flight; c is the result that is now complete.
template <int kPending, class C>
__device__ __forceinline__ void wait_product(C& c) {
  cute::warpgroup_wait<kPending>();
  cute::warpgroup_fence_operand(c);
}

}  // namespace hopper_fa
