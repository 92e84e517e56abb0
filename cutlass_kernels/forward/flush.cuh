// The second level where registers have no room for it: after every few blocks of keys a warpgroup moves its
// output from the tensor core's accumulator to FP32 sums in global memory, which the L2 cache holds.
//
// Sums are relative to a maximum of their row that stays as it was at the first move, so what comes later is
// added without reading: nobody waits. Every thread has its own sums.
#pragma once

#include "common/fragment.cuh"
#include "common/quantized_softmax.cuh"
#include "forward/operands.cuh"
#include "forward/traits.cuh"

namespace hopper_fa {

// Of tiles whose sums stay where they are.
struct NeverFlushed {
  template <class... Args>
  __device__ __forceinline__ NeverFlushed(Args const&...) {}
  template <class Output>
  __device__ __forceinline__ void count_block(Output&, float const (&)[2]) const {}
  template <class Output>
  __device__ __forceinline__ void finish(Output&, float const (&)[2]) const {}
};

template <class Traits>
class FlushedOutput {
  static constexpr int kVectors = Traits::kHeadDim / 8;  // of 4 registers, two columns of two rows
  // A row's maximum may leave the reference so far behind, in log2; then its sums are scaled.
  static constexpr float kRange = 64.f;

  typename Traits::Arguments const& args_;
  typename Traits::SharedStorage& shared_;
  int const warpgroup_;
  int blocks_left_;  // until the next move, which comes after a block whose index the interval divides
  bool empty_ = true;

 public:
  // blocks: how many the output will be the sum of.
  __device__ __forceinline__ FlushedOutput(typename Traits::Arguments const& args,
                                           typename Traits::SharedStorage& shared, int warpgroup, int blocks)
      : args_(args),
        shared_(shared),
        warpgroup_(warpgroup),
        blocks_left_((blocks - 1) % args.fp8.flush_interval + 1) {}

  // The output, which is relative to row_max, has taken up one more block: moves it if that was the last.
  template <class Output>
  __device__ __forceinline__ void count_block(Output& output, float const (&row_max)[2]) {
    if (--blocks_left_ > 0) return;
    blocks_left_ = args_.fp8.flush_interval;
    float* const sums = this->sums();
    if (empty_) {
      set_reference(row_max);
      CUTE_UNROLL
      for (int i = 0; i < kVectors; ++i)
        asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(sums + 512 * i),
                     "f"(output(4 * i)), "f"(output(4 * i + 1)), "f"(output(4 * i + 2)),
                     "f"(output(4 * i + 3))
                     : "memory");
      empty_ = false;
    } else {
      float2 const reference = this->reference();
      float factor[2];
      factor[0] = row_max[0] == kNoMaximum ? 0.f : exp2_sfu(row_max[0] - reference.x);
      factor[1] = row_max[1] == kNoMaximum ? 0.f : exp2_sfu(row_max[1] - reference.y);
      if (__any_sync(~0u, is_far(row_max[0], reference.x) || is_far(row_max[1], reference.y))) {
        rescale(row_max);
        factor[0] = factor[1] = 1.f;
      }
      CUTE_UNROLL
      for (int i = 0; i < kVectors; ++i)
        asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(sums + 512 * i),
                     "f"(output(4 * i) * factor[0]), "f"(output(4 * i + 1) * factor[0]),
                     "f"(output(4 * i + 2) * factor[1]), "f"(output(4 * i + 3) * factor[1])
                     : "memory");
    }
    clear(output);
  }

  // Adds the sums to the output, which is relative to row_max.
  template <class Output>
  __device__ __forceinline__ void finish(Output& output, float const (&row_max)[2]) const {
    if (empty_) return;
    float factor[2];
    factors_to(row_max, factor);
    float* const sums = this->sums();
    CUTE_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      if (i == kVectors / 2) __threadfence_block();  // NOTE: else all loads come first, and spill
      float4 const sum = load(sums + 512 * i);
      output(4 * i) = fmaf(sum.x, factor[0], output(4 * i));
      output(4 * i + 1) = fmaf(sum.y, factor[0], output(4 * i + 1));
      output(4 * i + 2) = fmaf(sum.z, factor[1], output(4 * i + 2));
      output(4 * i + 3) = fmaf(sum.w, factor[1], output(4 * i + 3));
    }
  }

 private:
  static __device__ __forceinline__ bool is_far(float row_max, float reference) {
    return row_max != kNoMaximum && !(fabsf(row_max - reference) <= kRange);
  }
  // NOTE: rows without a key so far have nothing to add, whatever their reference is.
  static __device__ __forceinline__ float reference_of(float row_max) {
    return row_max == kNoMaximum ? 0.f : row_max;
  }
  __device__ __forceinline__ void set_reference(float const (&row_max)[2]) const {
    reference() = make_float2(reference_of(row_max[0]), reference_of(row_max[1]));
  }

  // From relative to the reference to relative to row_max, which is no less unless the sums are 0.
  __device__ __forceinline__ void factors_to(float const (&row_max)[2], float (&factor)[2]) const {
    float2 const reference = this->reference();
    factor[0] = exp2_sfu(fminf(reference.x - reference_of(row_max[0]), 0.f));
    factor[1] = exp2_sfu(fminf(reference.y - reference_of(row_max[1]), 0.f));
  }

  // Makes row_max the reference. Rare, so it is small and not fast.
  __device__ __forceinline__ void rescale(float const (&row_max)[2]) const {
    float factor[2];
    factors_to(row_max, factor);
    set_reference(row_max);
    float* sums = this->sums();
#pragma unroll 1
    for (int i = 0; i < kVectors; ++i, sums += 512) {
      float4 const sum = load(sums);
      store(sums, make_float4(sum.x * factor[0], sum.y * factor[0], sum.z * factor[1], sum.w * factor[1]));
    }
  }

  // This thread's.
  // NOTE: addresses made anew, for want of registers to hold them in.
  __device__ __forceinline__ float* sums() const {
    return args_.fp8.flush + (blockIdx.x * Traits::kWarpgroups + warpgroup_) * (64 * Traits::kHeadDim) +
           4 * (fresh_thread() % 128);
  }
  __device__ __forceinline__ float2& reference() const {
    return shared_.flush_reference[warpgroup_][fresh_thread() % 128];
  }

  static __device__ __forceinline__ float4 load(float const* address) {
    float4 sum;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(sum.x), "=f"(sum.y), "=f"(sum.z), "=f"(sum.w)
                 : "l"(address)
                 : "memory");
    return sum;
  }
  static __device__ __forceinline__ void store(float* address, float4 const& sum) {
    asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(sum.x),
                 "f"(sum.y), "f"(sum.z), "f"(sum.w)
                 : "memory");
  }
};

}  // namespace hopper_fa
