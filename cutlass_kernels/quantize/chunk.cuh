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

// Calls f(raw, g, g % 2) for the 8 groups of 16 tokens of a chunk, in order: row i of raw is token(i), or 0
// where that is not among the first `tokens`. `rows` is this thread's first one. NOTE: the loads of kAhead
// groups, 1 or 3, are under way during the arithmetic of one.
template <bool kFull, int kAhead, class Part, class F>
__device__ __forceinline__ void for_each_group(uint16_t const* rows, int64_t stride, int tokens,
                                               Part const& part, F&& f) {
  auto const load = [&](uint2(&raw)[4], int g) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      raw[i] = make_uint2(0, 0);
      int64_t const at = (i % 2 + 8 * (i / 2)) * stride;
      if (kFull || g * kKeyGroup + part.token(i) < tokens)
        raw[i] = __ldg(reinterpret_cast<uint2 const*>(rows + at));
    }
    rows += kKeyGroup * stride;
  };
  constexpr int kGroups = kStatsChunk / kKeyGroup;
  uint2 raw[kAhead + 1][4];
#pragma unroll
  for (int g = 0; g < kAhead; ++g) load(raw[g], g);
#pragma unroll 1
  for (int first = 0; first < kGroups; first += kAhead + 1)
#pragma unroll
    for (int i = 0; i <= kAhead; ++i) {
      int const g = first + i;
      if (g + kAhead < kGroups) load(raw[(i + kAhead) % (kAhead + 1)], g + kAhead);
      f(raw[i], g, i % 2);  // a number to the compiler, which g is not
    }
}

}  // namespace hopper_fa
