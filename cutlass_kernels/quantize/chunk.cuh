// How a warp gets 128 tokens of 32 channels of one head.
#pragma once

#include "quantize/layout.h"
#include "quantize/numerics.cuh"

namespace hopper_fa {

constexpr int kChunkGroups = kStatsChunk / kKeyGroup;

// A thread holds 4 channels of 4 tokens in every 16 (a row of them at a time): those whose codes are a word
// of V's layout (key_at). A warp has 32 channels of 16 tokens, as rows and columns of a product's operand.
struct ChunkPart {
  int quad, word;  // channels 4 quad ... of the warp's, tokens key_at(4 word ...) of 16

  __device__ __forceinline__ ChunkPart() : quad(threadIdx.x % 32 / 4), word(threadIdx.x % 4) {}

  // Of this thread's four tokens among 16.
  __device__ __forceinline__ int token(int i) const { return 2 * word + (i & 1) + 8 * (i >> 1); }
};

// The 8 groups of 16 tokens of a chunk on their way to a thread, kAhead groups (1 or 3) ahead of the
// arithmetic.
template <int kAhead>
class GroupLoads {
  static_assert(kAhead % 2 && kChunkGroups % (kAhead + 1) == 0);

 public:
  // `rows` is token 0 at this thread's first channel; `tokens` exist in the chunk (none if negative). Starts
  // loading.
  __device__ __forceinline__ GroupLoads(uint16_t const* rows, int64_t stride, int tokens)
      : rows_(rows + 2 * part_.word * stride), stride_(stride), tokens_(tokens) {
#pragma unroll
    for (int g = 0; g < kAhead; ++g) load<false>(raw_[g], g);
  }

  // Calls f(raw, g, g % 2) for the groups in order: row i of raw is token(i), or 0 where that does not exist.
  // kFull: all do.
  template <bool kFull, class F>
  __device__ __forceinline__ void for_each(F&& f) {
#pragma unroll 1
    for (int first = 0; first < kChunkGroups; first += kAhead + 1)
#pragma unroll
      for (int i = 0; i <= kAhead; ++i) {
        int const g = first + i;
        if (g + kAhead < kChunkGroups) load<kFull>(raw_[(i + kAhead) % (kAhead + 1)], g + kAhead);
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

  ChunkPart part_;
  uint2 raw_[kAhead + 1][4];
  uint16_t const* rows_;
  int64_t stride_;
  int tokens_;
};

// The same through shared memory, for one chunk after the other: a group of the next chunk takes the place of
// this one's as soon as that is in registers, so 7 or 8 of them are on their way at any time.
class ChunkStage {
 public:
  struct alignas(128) Memory {
    uint4 raw[kChunkGroups][kGroupSlots];  // token_slot(token, octet)
  };

  __device__ __forceinline__ ChunkStage(Memory& memory, int64_t stride)
      : memory_(memory), to_(token_slot(threadIdx.x % 32 / 4, threadIdx.x % 4)), stride_(stride) {}

  // What is fetched next: `rows` is token 0 at the warp's first channel; `tokens` tokens and `channels`
  // channels exist (none if negative).
  __device__ __forceinline__ void point_to(uint16_t const* rows, int tokens, int channels) {
    int const token = threadIdx.x % 32 / 4, octet = threadIdx.x % 4;
    rows_ = rows + token * stride_ + 8 * octet;
    tokens_ = 8 * octet < channels ? tokens - token : 0;
  }

  // Starts to load a chunk.
  __device__ __forceinline__ void fetch() {
#pragma unroll
    for (int g = 0; g < kChunkGroups; ++g) fetch_group(g);
  }

  // GroupLoads' for the chunk whose loads are under way, after which those of the next one are.
  template <bool kFull, class F>
  __device__ __forceinline__ void for_each(F&& f) {
    ChunkPart const part;
    auto const token = [&](int i) {
      return reinterpret_cast<uint2 const*>(memory_.raw[0] + token_slot(part.token(i), part.quad / 2)) +
             part.quad % 2;
    };
    uint2 const* const from[2] = {token(0), token(1)};
#pragma unroll 1
    for (int first = 0; first < kChunkGroups; first += 2)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int const g = first + i;
        wait_for_copy_groups<kChunkGroups - 1>();
        __syncwarp();
        uint2 raw[4];
#pragma unroll
        for (int t = 0; t < 4; ++t) raw[t] = from[t % 2][2 * (g * kGroupSlots + t / 2 * kGroupSlots / 2)];
        __syncwarp();
        fetch_group(g);
        f(raw, g, i);
      }
  }

 private:
  __device__ __forceinline__ void fetch_group(int g) {
    uint4* const to = memory_.raw[g] + to_;
    copy_async(to, rows_, g * kKeyGroup < tokens_);
    copy_async(to + kGroupSlots / 2, rows_ + kKeyGroup / 2 * stride_,
               g * kKeyGroup + kKeyGroup / 2 < tokens_);
    commit_copies();
    rows_ += kKeyGroup * stride_;
  }

  Memory& memory_;
  int to_;
  int64_t stride_;
  uint16_t const* rows_;
  int tokens_;
};

}  // namespace hopper_fa
