// Rounding and scales of the quantisation kernels, in the order of operations of hopper_fa/quantization.py.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "common/quad.cuh"
#include "hopper_fa/types.h"
#include "quantize/layout.h"

namespace hopper_fa {

constexpr float kE4M3Max = 448.f, kInt8Max = 127.f;
constexpr float kSmallestAmax = 0x1p-100f;  // below it a group counts as zeros
constexpr float kHeadroom = 32.f;           // that V's scale leaves above the maximum of a sample
constexpr float kSaturates = 432.f;         // from here on all is rounded to 448

// Where `here`, until the launches before this one in the stream are done. Every kernel calls it at the place
// that its launch's Overlap says; those that may run beside others do so last, so that their end means the
// end of all before them.
__device__ __forceinline__ void wait_for_launches(bool here) {
  if (here) asm volatile("griddepcontrol.wait;" ::: "memory");
}
// The next launch's CTAs may begin when all of this one's are under way.
__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;"); }

// 16 bytes to shared memory, zeros in place of what does not exist; to be waited for by the same thread.
// NOTE: the whole line of 128 bytes comes to L2: V's warps take half a line each.
__device__ __forceinline__ void copy_async(uint4* to, void const* from, bool exists) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(exists ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Copies in groups: the calls since the last commit are one. Waits for all groups but the last kPending.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_for_copy_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Two 16-bit elements that lie in one word.
template <DType kDType>
__device__ __forceinline__ float2 unpack(uint32_t word) {
  if constexpr (kDType == DType::kBF16) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
  } else {
    static_assert(kDType == DType::kFP16);
    return __half22float2(reinterpret_cast<__half2 const&>(word));
  }
}

// The bits of the nearest 16-bit element, in the low half.
template <DType kDType>
__device__ __forceinline__ uint32_t nearest_16bit(float x) {
  if constexpr (kDType == DType::kBF16)
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
  else
    return __half_as_ushort(__float2half_rn(x));
}

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < INFINITY; }

// Smaller and larger of each half; a NaN gives way to a number.
template <DType kDType>
__device__ __forceinline__ uint32_t min_halves(uint32_t a, uint32_t b) {
  uint32_t r;
  if constexpr (kDType == DType::kBF16)
    asm("min.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  else
    asm("min.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
template <DType kDType>
__device__ __forceinline__ uint32_t max_halves(uint32_t a, uint32_t b) {
  uint32_t r;
  if constexpr (kDType == DType::kBF16)
    asm("max.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  else
    asm("max.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// Infinity in both halves.
template <DType kDType>
constexpr uint32_t kInfinities = kDType == DType::kBF16 ? 0x7f807f80u : 0x7c007c00u;

// Scale of elements up to amax whose codes go up to limit, and what multiplies them. norm: a factor that the
// elements still lack.
__device__ __forceinline__ float scale_of(float amax, float limit, float norm = 1.f) {
  return amax < kSmallestAmax ? 1.f : __fdiv_rn(__fmul_rn(amax, norm), limit);
}
__device__ __forceinline__ float inverse_scale_of(float amax, float limit) {
  return amax < kSmallestAmax ? 1.f : __fdiv_rn(limit, amax);
}

// To the nearest e4m3, saturating; NaN to 0x7f. The first value is the lowest byte.
__device__ __forceinline__ uint32_t to_e4m3(float a, float b) {
  return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
}
__device__ __forceinline__ uint32_t to_e4m3(float a, float b, float c, float d) {
  return to_e4m3(a, b) | to_e4m3(c, d) << 16;
}

// Two codes as two halves in a word.
__device__ __forceinline__ uint32_t halves_of_e4m3(uint32_t codes) {
  __half2_raw const halves = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes), __NV_E4M3);
  return halves.x | uint32_t(halves.y) << 16;
}

// The row of ones at a group of 16 keys, of which `keys` exist.
__device__ __forceinline__ uint4 ones_of(int keys) {
  constexpr uint32_t kOnes = 0x38383838;
  return make_uint4(kOnes & key_mask(0, keys), kOnes & key_mask(1, keys), kOnes & key_mask(2, keys),
                    kOnes & key_mask(3, keys));
}

// Four values times a factor, of magnitude at most 127.4, to the nearest integers, ties to even.
__device__ __forceinline__ uint32_t to_int8(float const (&x)[4], float factor) {
  // NOTE: adding 1.5 * 2^23 rounds the exact product and leaves the integer in the low byte; a conversion
  // instruction has a quarter of the rate.
  auto const rounded = [factor](float x) { return __float_as_uint(__fmaf_rn(x, factor, 12582912.f)); };
  uint32_t const low = __byte_perm(rounded(x[0]), rounded(x[1]), 0x0040);
  uint32_t const high = __byte_perm(rounded(x[2]), rounded(x[3]), 0x0040);
  return __byte_perm(low, high, 0x5410);
}

}  // namespace hopper_fa
