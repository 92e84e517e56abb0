// How the threads that round V share a chunk of 128 tokens of one head.
#pragma once

#include "quantize/layout.h"
#include "quantize/numerics.cuh"

namespace hopper_fa {

// A thread holds 4 channels of 4 tokens in every 16 (a row of them at a time): those whose codes are a word
// of V's layout (key_at). As many threads a chunk as a tile has channels; a warp has 32 channels of 16
// tokens, as rows and columns of a product's operand.
template <int kColumns>
struct ChunkPart {
  static constexpr int kChunks = kVThreads / kColumns;  // a CTA's

  int chunk, quad, word;  // chunk among the CTA's, channels 4 quad ..., tokens key_at(4 word ...) of 16

  __device__ __forceinline__ ChunkPart() {
    int const index = threadIdx.x, thread = index % kColumns;
    chunk = index / kColumns, quad = thread / 4, word = thread % 4;
  }

  // Of this thread's four tokens among 16.
  __device__ __forceinline__ int token(int i) const { return 2 * word + (i & 1) + 8 * (i >> 1); }
};

// The 8 groups of 16 tokens of a chunk on their way to a thread, kAhead groups (1 or 3) ahead of the
// arithmetic.
template <int kAhead, class Part>
class GroupLoads {
  static_assert(kAhead % 2 && kStatsChunk / kKeyGroup % (kAhead + 1) == 0);

 public:
  // `rows` is this thread's first token, of which `tokens` exist in the chunk (none if negative). Starts
  // loading.
  __device__ __forceinline__ GroupLoads(uint16_t const* rows, int64_t stride, int tokens, Part const& part)
      : rows_(rows), stride_(stride), tokens_(tokens), part_(part) {
#pragma unroll
    for (int g = 0; g < kAhead; ++g) load<false>(raw_[g], g);
  }

  // Calls f(raw, g, g % 2) for the groups in order: row i of raw is token(i), or 0 where that does not exist.
  // kFull: all do.
  template <bool kFull, class F>
  __device__ __forceinline__ void for_each(F&& f) {
    constexpr int kGroups = kStatsChunk / kKeyGroup;
#pragma unroll 1
    for (int first = 0; first < kGroups; first += kAhead + 1)
#pragma unroll
      for (int i = 0; i <= kAhead; ++i) {
        int const g = first + i;
        if (g + kAhead < kGroups) load<kFull>(raw_[(i + kAhead) % (kAhead + 1)], g + kAhead);
        f(raw_[i], g, i % 2);  // a number to the compiler, which g is not
      }
  }

 private:
  template <bool kFull>
  __device__ __forceinline__ void load(uint2 (&raw)[4], int g) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      raw[i] = make_uint2(0, 0);
      int64_t const at = (i % 2 + 8 * (i / 2)) * stride_;
      if (kFull || g * kKeyGroup + part_.token(i) < tokens_)
        raw[i] = __ldg(reinterpret_cast<uint2 const*>(rows_ + at));
    }
    rows_ += kKeyGroup * stride_;
  }

  uint2 raw_[kAhead + 1][4];
  uint16_t const* rows_;
  int64_t stride_;
  int tokens_;
  Part const& part_;
};

}  // namespace hopper_fa
