// The e4m3 products of 40, 72 and 136 columns, with A in registers.
// NOTE: CUTLASS has them too, in headers of 7 MB: with those a unit took 37.6 s of CPU to compile,
// without 13.4.
#pragma once

#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

namespace hopper_fa {

// D (64 x kColumns, FP32) = or += A (64 x 32, in registers) B (kColumns x 32, K-major in shared memory):
// CuTe's "MMA operation" of one WGMMA. PTX ISA, wgmma.mma_async, shape m64nNk32.
template <int kColumns>
struct WgmmaE4m3 {
  using ARegisters = uint32_t[4];
  using BRegisters = uint64_t[1];          // a matrix descriptor
  using CRegisters = float[kColumns / 2];  // of each thread
};

template <int kColumns>
inline constexpr bool kIsOwnE4m3Shape = kColumns == 40 || kColumns == 72 || kColumns == 136;

// clang-format off
#define HOPPER_FA_OPERANDS_0_TO_19 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19"
#define HOPPER_FA_OPERANDS_20_TO_35 \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35"
#define HOPPER_FA_OPERANDS_36_TO_67 \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67"
#define HOPPER_FA_FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define HOPPER_FA_SIXTEEN(i) \
  HOPPER_FA_FOUR(i), HOPPER_FA_FOUR(i + 4), HOPPER_FA_FOUR(i + 8), HOPPER_FA_FOUR(i + 12)
// The operands after D's: A's four registers, B's descriptor, whether D is added to; both signs are plus.
#define HOPPER_FA_WGMMA(columns, d_operands, a0, a1, a2, a3, b, add, ...)                        \
  asm volatile(                                                                                  \
      "{\n"                                                                                      \
      ".reg .pred accumulate;\n"                                                                 \
      "setp.ne.b32 accumulate, " add ", 0;\n"                                                    \
      "wgmma.mma_async.sync.aligned.m64n" columns "k32.f32.e4m3.e4m3 {" d_operands "}, "         \
      "{" a0 ", " a1 ", " a2 ", " a3 "}, " b ", accumulate, 1, 1;\n"                             \
      "}"                                                                                        \
      : __VA_ARGS__                                                                              \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor), "r"(accumulate))

template <int kColumns>
__device__ __forceinline__ void wgmma_e4m3(float* d, uint32_t const (&a)[4], uint64_t descriptor,
                                           int accumulate) {
  static_assert(kIsOwnE4m3Shape<kColumns>);
  if constexpr (kColumns == 40)
    HOPPER_FA_WGMMA("40", HOPPER_FA_OPERANDS_0_TO_19, "%20", "%21", "%22", "%23", "%24", "%25",
                    HOPPER_FA_SIXTEEN(0), HOPPER_FA_FOUR(16));
  else if constexpr (kColumns == 72)
    HOPPER_FA_WGMMA("72", HOPPER_FA_OPERANDS_0_TO_19 ", " HOPPER_FA_OPERANDS_20_TO_35,
                    "%36", "%37", "%38", "%39", "%40", "%41",
                    HOPPER_FA_SIXTEEN(0), HOPPER_FA_SIXTEEN(16), HOPPER_FA_FOUR(32));
  else
    HOPPER_FA_WGMMA("136",
                    HOPPER_FA_OPERANDS_0_TO_19 ", " HOPPER_FA_OPERANDS_20_TO_35 ", " HOPPER_FA_OPERANDS_36_TO_67,
                    "%68", "%69", "%70", "%71", "%72", "%73",
                    HOPPER_FA_SIXTEEN(0), HOPPER_FA_SIXTEEN(16), HOPPER_FA_SIXTEEN(32), HOPPER_FA_SIXTEEN(48),
                    HOPPER_FA_FOUR(64));
}
#undef HOPPER_FA_WGMMA
#undef HOPPER_FA_SIXTEEN
#undef HOPPER_FA_FOUR
#undef HOPPER_FA_OPERANDS_36_TO_67
#undef HOPPER_FA_OPERANDS_20_TO_35
#undef HOPPER_FA_OPERANDS_0_TO_19
// clang-format on

// How CuTe issues the operation on its tensors; found by argument-dependent lookup.
template <int kColumns, class TD, class LayoutD, class TA, class LayoutA, class TB, class LayoutB, class TC,
          class LayoutC>
__device__ __forceinline__ void mma_unpack(cute::MMA_Traits<WgmmaE4m3<kColumns>> const& traits,
                                           cute::Tensor<TD, LayoutD>& d, cute::Tensor<TA, LayoutA> const& a,
                                           cute::Tensor<TB, LayoutB> const& b,
                                           cute::Tensor<TC, LayoutC> const&) {
  using namespace cute;
  static_assert(is_same_v<typename TD::value_type, float> && is_same_v<LayoutD, LayoutC>);
  static_assert(is_same_v<decltype(coalesce(LayoutD{})), Layout<Int<kColumns / 2>, _1>>);
  Tensor registers = recast<uint32_t>(a);    // (4)
  Tensor descriptors = recast<uint64_t>(b);  // (1)
  static_assert(decltype(size(registers))::value == 4 && decltype(size(descriptors))::value == 1);
  uint32_t const a_registers[4] = {registers(0), registers(1), registers(2), registers(3)};
  wgmma_e4m3<kColumns>(raw_pointer_cast(d.data()), a_registers, descriptors(0),
                       static_cast<int>(traits.accumulate_));
}

}  // namespace hopper_fa

// Which elements each thread holds, as for every WGMMA of 8-bit operands.
template <int kColumns>
struct cute::MMA_Traits<hopper_fa::WgmmaE4m3<kColumns>> {
  using ValTypeD = float;
  using ValTypeA = float_e4m3_t;
  using ValTypeB = float_e4m3_t;
  using ValTypeC = float;
  using FrgTypeB = GMMA::smem_desc<GMMA::Major::K>;
  using Shape_MNK = Shape<_64, Int<kColumns>, _32>;
  using ThrID = Layout<_128>;
  using ALayout = GMMA::ALayout_64x32;
  using BLayout = GMMA::ABLayout<kColumns, 32>;
  using CLayout = GMMA::CLayout_64xN<kColumns>;
  GMMA::ScaleOut accumulate_ = GMMA::ScaleOut::One;
};
