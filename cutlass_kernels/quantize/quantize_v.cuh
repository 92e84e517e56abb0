// V: smoothing, scale, rounding, and the layout that the second product reads: transposed, keys permuted in
// groups of 16, a row of ones below the channels.
//
// Roofline: 2 bytes read and 1 written an element. 16k tokens x 2048 channels: 101 MB, 25 us at 4 TB/s.
//
// A warp rounds 32 channels of a chunk of 128 keys and needs no other warp; its next chunk is copied into
// shared memory meanwhile. A thread rounds four keys of four channels, the keys that are a word of the
// layout, so that the permutation is the choice of the register a byte comes from. It does so for the chunk's
// 8 groups of 16 keys, one after the other. Shared memory gathers a channel's words into lines. What rounding
// took from a chunk's sum is the sum of the scaled elements less that of the codes, which is exact: products
// with ones on the tensor cores.
//
// Scales from a sample's maxima may prove too small for another token. Then the channel's true maximum is
// noted, and the kernel after this one, which else only adds up the chunks, rounds its slice of 32 channels
// anew (finish_v.cuh).
#pragma once

#include <cute/arch/mma_sm80.hpp>
#include <type_traits>

#include "hopper_fa/quantize.h"
#include "quantize/chunk.cuh"

namespace hopper_fa {

struct QuantizeVArguments {
  uint16_t const* v;
  int64_t batch_stride, row_stride, head_stride;  // elements
  int seqlen, heads, head_dim, chunks;
  QuantizeTiles tiles;        // of as many chunks as a CTA has warps for; tiles.blocks.divisor a sequence
  int head_tiles, cta_tiles;  // of a head in all batch entries; neighbours among them that a CTA takes
  float const* mean;
  uint32_t const* amax;
  int64_t amax_batch, amax_head, amax_channel;  // strides; 0 where a scale is shared
  uint8_t* out;
  float* scale;
  // (batch, heads, chunks of 128 keys, head_dim): sums of scaled elements less codes; may be null.
  float* errors;
  // (batch, heads, head_dim), bits of floats >= 0: where elements need more room than a sample's scale
  // leaves, the largest of them, less the mean; else 0. May be null.
  uint32_t* outgrown;
  float* mean_out;  // with errors: mean (or 0), and what rounding took from V on average; may be mean
  Overlap overlap;
};

// What the arithmetic needs of a channel.
struct VChannel {
  float mean, inverse;
};

// Adds the codes' values of 16 keys to the sums of two channels a thread quad: first of each pair in d[0] and
// d[1], second in d[2] and d[3]. Operand rows are channels, columns keys, in some order. The sums are exact:
// multiples of 2^-9, at most 448 * 64.
__device__ __forceinline__ void add_codes(float (&d)[4], uint32_t first, uint32_t second) {
  constexpr uint32_t kOnes = 0x3c003c00;
  cute::SM80_16x8x16_F32F16F16F32_TN::fma(d[0], d[1], d[2], d[3], halves_of_e4m3(first),
                                          halves_of_e4m3(second), halves_of_e4m3(first >> 16),
                                          halves_of_e4m3(second >> 16), kOnes, kOnes, d[0], d[1], d[2], d[3]);
}

// What a warp has in shared memory.
struct VWarp {
  uint4 codes[kVSlice * kChunkGroups];  // code_slot(channel, group)
  VChannel channels[kVSlice];
};

struct VScale {
  float scale, inverse;
};

// Of a channel whose largest element is amax, or whose sample's is.
__device__ __forceinline__ VScale scale_of_v(float amax, bool of_sample) {
  float const largest = of_sample ? fmaxf(amax, kSmallestAmax) : amax;
  float const limit = of_sample ? kE4M3Max / kHeadroom : kE4M3Max;
  return {scale_of(largest, limit), inverse_scale_of(largest, limit)};
}

// A warp's part of V: 32 channels of a chunk of a head.
struct VPart {
  int batch, head, chunk, first_channel;

  __device__ __forceinline__ int64_t head_batch(QuantizeVArguments const& args) const {
    return static_cast<int64_t>(batch) * args.heads + head;
  }
  // That exist of the chunk and of the head from here on; may be negative.
  __device__ __forceinline__ int tokens(QuantizeVArguments const& args) const {
    return args.seqlen - chunk * kStatsChunk;
  }
  __device__ __forceinline__ int channels(QuantizeVArguments const& args) const {
    return args.head_dim - first_channel;
  }
  // Its first token at its first channel.
  __device__ __forceinline__ uint16_t const* start(QuantizeVArguments const& args) const {
    return args.v + batch * args.batch_stride + head * args.head_stride +
           static_cast<int64_t>(chunk * kStatsChunk) * args.row_stride + first_channel;
  }
  // Starts to load it.
  template <int kAhead>
  __device__ __forceinline__ GroupLoads<kAhead> loads(QuantizeVArguments const& args) const {
    int const channel = 4 * ChunkPart().quad;
    return {start(args) + channel, args.row_stride, channel < channels(args) ? tokens(args) : 0};
  }
  // Where a line of its codes begins, of row `row` of V^T and keys from 16 `group` on.
  __device__ __forceinline__ uint8_t* codes(QuantizeVArguments const& args, int columns, int row,
                                            int group) const {
    int const keys_pitch = ceil_div(args.seqlen, kKeyGroup) * kKeyGroup;
    return args.out + (head_batch(args) * (columns + 1) + row) * keys_pitch + chunk * kStatsChunk +
           group * kKeyGroup;
  }
};

// Rounds what `loads` brings, `part` of V: codes into shared memory, their errors out. Returns whether a code
// of this thread may be saturated. kFull: all of it exists.
template <DType kIn, bool kSums, bool kFull, class Loads>
__device__ __forceinline__ bool round_chunk(QuantizeVArguments const& args, VPart const& part, Loads& loads,
                                            VWarp& shared) {
  ChunkPart const own;
  int const channel = 4 * own.quad;
  bool const works = kFull || channel < part.channels(args);
  int const tokens = works ? part.tokens(args) : 0;  // may be negative
  VChannel of[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) of[c] = shared.channels[channel + c];
  uint32_t saturated = 0;           // bit 7 of a byte: so was a code there
  float sum[4], code_sum[2][2][4];  // [parity of the group][pair of channels]

  // Keys 16 g ... of the chunk. again: what is not finite counts in no sum.
  auto const round = [&](uint2 const(&raw)[4], int g, int parity, bool again) {
    uint32_t words[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float2 const pair = unpack<kIn>(c < 2 ? raw[i].x : raw[i].y);
        y[i] = ((c % 2 ? pair.y : pair.x) - of[c].mean) * of[c].inverse;
        if (!kFull && g * kKeyGroup + own.token(i) >= tokens) y[i] = 0.f;
        // Infinity becomes NaN. NOTE: with sums that waits for a second look, as they tell of it.
        if (!kSums || again) y[i] = __fmaf_rn(y[i], 0.f, y[i]);
      }
      words[c] = to_e4m3(y[0], y[1], y[2], y[3]);
      reinterpret_cast<uint32_t*>(shared.codes + code_slot(channel + c, g))[own.word] = words[c];
      saturated |= (words[c] & 0x7f7f7f7fu) + 0x02020202u;  // 448 is 0x7e
      if constexpr (kSums) {
        if (again) {
#pragma unroll
          for (int i = 0; i < 4; ++i) y[i] = is_finite(y[i]) ? y[i] : 0.f;
          words[c] = to_e4m3(y[0], y[1], y[2], y[3]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[c] += y[i];
      }
    }
    if constexpr (kSums) {
#pragma unroll
      for (int c = 0; c < 4; c += 2) add_codes(code_sum[parity][c / 2], words[c], words[c + 1]);
    }
  };
  auto const round_all = [&](auto& loads, auto again) {
#pragma unroll
    for (int i = 0; i < 16; ++i) code_sum[i / 8][i / 4 % 2][i % 4] = 0.f;
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[c] = 0.f;
    loads.template for_each<kFull>(
        [&](uint2 const(&raw)[4], int g, int parity) { round(raw, g, parity, again.value); });
  };

  round_all(loads, std::false_type{});
  if constexpr (kSums) {
    // NaN and infinity stay in their sums, so finite sums need no second look.
    // NOTE: a warp's threads look again together, as its products want them.
    bool finite = true;
#pragma unroll
    for (int c = 0; c < 4; ++c) finite = finite && is_finite(sum[c]);
    if (__any_sync(~0u, !finite)) {
      auto again = part.loads<1>(args);
      round_all(again, std::true_type{});
    }
    float error[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      error[c] = quad_sum(sum[c]) - (code_sum[0][c / 2][2 * (c % 2)] + code_sum[1][c / 2][2 * (c % 2)]);
    }
    if (own.word == 0 && tokens > 0) {
      int64_t const at =
          (part.head_batch(args) * args.chunks + part.chunk) * args.head_dim + part.first_channel;
      *reinterpret_cast<float4*>(args.errors + at + channel) =
          make_float4(error[0], error[1], error[2], error[3]);
    }
  }
  return saturated & 0x80808080u;
}

// The codes of the first `rows` channels of `part` from shared memory to V^T.
__device__ __forceinline__ void store_codes(QuantizeVArguments const& args, VPart const& part, int columns,
                                            int rows, VWarp const& shared) {
  int const lane = threadIdx.x % 32, g = lane % kChunkGroups, first = lane / kChunkGroups;
  constexpr int kStep = 32 / kChunkGroups;  // rows at once
  if (g * kKeyGroup >= part.tokens(args)) return;
  int64_t const step = int64_t(kStep) * (ceil_div(args.seqlen, kKeyGroup) * kKeyGroup);  // bytes
  uint8_t* out = part.codes(args, columns, part.first_channel + first, g);
#pragma unroll
  for (int r = first; r < kVSlice + first; r += kStep, out += step)
    if (r < rows) __stcs(reinterpret_cast<uint4*>(out), shared.codes[code_slot(r, g)]);
}

// The row of ones, for the keys of `part`.
__device__ __forceinline__ void store_ones(QuantizeVArguments const& args, VPart const& part, int columns) {
  int const g = threadIdx.x % 32, keys = part.tokens(args) - g * kKeyGroup;
  if (g < kChunkGroups && keys > 0)
    *reinterpret_cast<uint4*>(part.codes(args, columns, columns, g)) = ones_of(keys);
}

// Notes what of a thread's part a sample's scales have no room for.
template <DType kIn>
__device__ __forceinline__ void note_outgrown(QuantizeVArguments const& args, VPart const& part,
                                              VWarp const& shared) {
  ChunkPart const own;
  auto again = part.loads<1>(args);
  float amax[4] = {0.f, 0.f, 0.f, 0.f};
  again.template for_each<false>([&](uint2 const(&raw)[4], int g, int) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bool const exists = g * kKeyGroup + own.token(i) < part.tokens(args);
      float2 const low = unpack<kIn>(raw[i].x), high = unpack<kIn>(raw[i].y);
      float const x[4] = {low.x, low.y, high.x, high.y};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float const size = fabsf(x[c] - shared.channels[4 * own.quad + c].mean);
        if (exists && is_finite(size)) amax[c] = fmaxf(amax[c], size);
      }
    }
  });
  int64_t const at = part.head_batch(args) * args.head_dim + part.first_channel + 4 * own.quad;
#pragma unroll
  for (int c = 0; c < 4; ++c)
    if (__fmul_rn(amax[c], shared.channels[4 * own.quad + c].inverse) >= kSaturates)
      atomicMax(args.outgrown + at + c, __float_as_uint(amax[c]));  // bits are ordered as the floats are
}

struct VShared {
  struct alignas(128) Warp : VWarp {
    ChunkStage::Memory stage;
  };
  Warp warps[kVThreads / 32];
};

// A persistent grid. CTA part * heads + head takes cta_tiles tiles of a head, so that scales stay. kColumns:
// channels of a tile of the attention kernel.
template <DType kIn, int kColumns>
__global__ void __launch_bounds__(kVThreads, kVCtas)
    quantize_v_kernel(__grid_constant__ QuantizeVArguments const args) {
  extern __shared__ __align__(128) uint4 v_shared[];
  constexpr int kSlices = kColumns / kVSlice, kChunks = kVThreads / 32 / kSlices;   // of a tile
  int const warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;  // warp: uniform
  auto& shared = reinterpret_cast<VShared&>(v_shared).warps[warp];
  // NOTE: last tile first: what the statistics read last may still lie in L2.
  int const cta = args.tiles.heads.quotient(blockIdx.x), head = blockIdx.x - cta * args.heads;
  int const first = cta * args.cta_tiles;
  int position = first + min_int(args.cta_tiles, args.head_tiles - first) - 1;
  QuantizeTile tile = args.tiles.at(position, head);
  ChunkStage stage(shared.stage, args.row_stride);
  auto const point_stage = [&](bool exists) {
    VPart const part = {tile.batch, head, tile.block * kChunks + warp / kSlices, warp % kSlices * kVSlice};
    stage.point_to(part.start(args), exists ? part.tokens(args) : 0, part.channels(args));
    return part;
  };
  VPart next = point_stage(true);
  stage.fetch();
  wait_for_launches(args.overlap == Overlap::kLoads);
  let_next_begin();

  float scale = 1.f;  // of channel `lane`
  for (bool of_new_batch = true; position >= first; --position) {
    VPart const part = next;
    int64_t const head_channels = part.head_batch(args) * args.head_dim;
    if (of_new_batch) {
      int const channel = min_int(part.first_channel + lane, args.head_dim - 1);
      VChannel of = {args.mean ? __ldcg(args.mean + head_channels + channel) : 0.f, 1.f};
      if (args.amax) {
        int64_t const at = tile.batch * args.amax_batch + head * args.amax_head + channel * args.amax_channel;
        VScale const both = scale_of_v(__uint_as_float(__ldcg(args.amax + at)), args.outgrown != nullptr);
        scale = both.scale, of.inverse = both.inverse;
      }
      shared.channels[lane] = of;
      __syncwarp();
    }
    if (part.chunk == 0 && lane < part.channels(args))
      args.scale[head_channels + part.first_channel + lane] = scale;
    of_new_batch = tile.block == 0;
    tile.block = (of_new_batch ? args.tiles.blocks.divisor : tile.block) - 1, tile.batch -= of_new_batch;
    next = point_stage(position > first);

    bool const full = part.tokens(args) >= kStatsChunk && part.channels(args) >= kVSlice;
    auto const round = [&](auto sums, auto is_full) {
      return round_chunk<kIn, sums.value, is_full.value>(args, part, stage, shared);
    };
    bool outgrown;
    if (args.errors) {
      outgrown =
          full ? round(std::true_type{}, std::true_type{}) : round(std::true_type{}, std::false_type{});
    } else {
      outgrown =
          full ? round(std::false_type{}, std::true_type{}) : round(std::false_type{}, std::false_type{});
    }
    if (outgrown && args.outgrown) note_outgrown<kIn>(args, part, shared);
    __syncwarp();
    store_codes(args, part, kColumns, kVSlice, shared);
    if (part.first_channel == 0) store_ones(args, part, kColumns);
    __syncwarp();
  }
  wait_for_copies();
  wait_for_launches(args.overlap == Overlap::kAll);
}

}  // namespace hopper_fa
