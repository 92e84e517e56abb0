// V: smoothing, scale, rounding, and the layout that the second product reads: transposed, keys permuted in
// groups of 16, a row of ones below the channels.
//
// Roofline: 2 bytes read and 1 written an element. 16k tokens x 2048 channels: 101 MB, 25 us at 4 TB/s.
//
// A thread rounds four keys of four channels, the keys that are a word of the layout, so that the permutation
// is the choice of the register a byte comes from. It does so for the 8 groups of a chunk, one after the
// other. Shared memory only gathers a channel's words into lines. What rounding took from a chunk's sum is
// the sum of the scaled elements less that of the codes, which is exact: products with ones on the tensor
// cores.
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
  QuantizeTiles tiles;
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

template <int kColumns>
struct VShared {
  uint4 codes[ChunkPart<kColumns>::kChunks][kColumns * 8];  // code_slot(channel, group)
  VChannel channels[kColumns];
};

// The scale of a channel whose largest element is amax, or whose sample's is.
__device__ __forceinline__ Scale scale_of_v(float amax, bool of_sample) {
  return of_sample ? scale_of(fmaxf(amax, kSmallestAmax), kE4M3Max / kHeadroom) : scale_of(amax, kE4M3Max);
}

// Starts to load chunk `chunk` of a head, its channels from first_channel on, by the threads of `part`.
template <int kAhead, class Part>
__device__ __forceinline__ GroupLoads<kAhead, Part> load_chunk(QuantizeVArguments const& args,
                                                               Part const& part, QuantizeTile const& tile,
                                                               int chunk, int first_channel) {
  int const first = chunk * kStatsChunk;
  // NOTE: unsigned, or its sign's extension is spilled.
  uint32_t const channel = first_channel + 4 * part.quad;
  bool const works = channel < static_cast<uint32_t>(args.head_dim);
  return {args.v + tile.batch * args.batch_stride + tile.head * args.head_stride +
              (first + 2 * part.word) * args.row_stride + channel,
          args.row_stride, works ? args.seqlen - first : 0, part};
}

// Rounds what `loads` brings, of load_chunk: codes into shared memory, their errors out. Returns whether a
// code of this thread may be saturated.
template <DType kIn, bool kSums, bool kFull, class Part, class Loads>
__device__ __forceinline__ bool round_chunk(QuantizeVArguments const& args, Part const& part, Loads& loads,
                                            VChannel const* channels, uint4* codes, QuantizeTile const& tile,
                                            int chunk, int first_channel) {
  int const tokens = args.seqlen - chunk * kStatsChunk;  // may be negative
  uint32_t const channel = first_channel + 4 * part.quad;
  bool const works = channel < static_cast<uint32_t>(args.head_dim);
  int const mine = works ? tokens : 0;
  VChannel of[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) of[c] = channels[4 * part.quad + c];
  float largest = 0.f;
  float sum[4], code_sum[2][2][4];  // [parity of the group][pair of channels]

  // Keys 16 g ... of the chunk. filter: sums only, without what is not finite.
  auto const round = [&](uint2 const(&raw)[4], int g, int parity, bool filter) {
    uint32_t words[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float2 const pair = unpack<kIn>(c < 2 ? raw[i].x : raw[i].y);
        y[i] = ((c % 2 ? pair.y : pair.x) - of[c].mean) * of[c].inverse;
        if (!kFull && g * kKeyGroup + part.token(i) >= mine) y[i] = 0.f;
        if (!filter) largest = fmaxf(largest, fabsf(y[i]));
        y[i] = __fmaf_rn(y[i], 0.f, y[i]);  // what is not finite becomes NaN
        if (filter && !is_finite(y[i])) y[i] = 0.f;
        if constexpr (kSums) sum[c] += y[i];
      }
      words[c] = to_e4m3(y[0], y[1], y[2], y[3]);
      if (!filter && works)
        reinterpret_cast<uint32_t*>(codes + code_slot(4 * part.quad + c, g))[part.word] = words[c];
    }
    if constexpr (kSums) {
#pragma unroll
      for (int c = 0; c < 4; c += 2) add_codes(code_sum[parity][c / 2], words[c], words[c + 1]);
    }
  };
  auto const round_all = [&](auto& loads, auto filter) {
#pragma unroll
    for (int i = 0; i < 16; ++i) code_sum[i / 8][i / 4 % 2][i % 4] = 0.f;
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[c] = 0.f;
    loads.template for_each<kFull>(
        [&](uint2 const(&raw)[4], int g, int parity) { round(raw, g, parity, filter.value); });
  };

  round_all(loads, std::false_type{});
  if constexpr (kSums) {
    // A NaN stays in its sum, so finite sums need no second look.
    // NOTE: a warp's threads look again together, as its products want them.
    bool finite = true;
#pragma unroll
    for (int c = 0; c < 4; ++c) finite = finite && is_finite(sum[c]);
    if (__any_sync(~0u, works && !finite)) {
      auto again = load_chunk<1>(args, part, tile, chunk, first_channel);
      round_all(again, std::true_type{});
    }
    float error[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float total = sum[c] + __shfl_xor_sync(~0u, sum[c], 1);
      total += __shfl_xor_sync(~0u, total, 2);
      error[c] = total - (code_sum[0][c / 2][2 * (c % 2)] + code_sum[1][c / 2][2 * (c % 2)]);
    }
    if (part.word == 0 && works && tokens > 0) {
      int64_t const at = static_cast<int64_t>(tile.batch * args.heads + tile.head) * args.chunks + chunk;
      *reinterpret_cast<float4*>(args.errors + at * args.head_dim + channel) =
          make_float4(error[0], error[1], error[2], error[3]);
    }
  }
  return largest >= kSaturates;
}

// Rows first_row, ... of a head's V^T, `rows` of them, groups of keys from first_group on, to global memory.
// codes: by code_slot, a chunk's kChannels channels from first_row on; below head_dim come zeros and ones.
template <int kChannels, int kGroups>
__device__ __forceinline__ void store_codes(QuantizeVArguments const& args, QuantizeTile const& tile,
                                            uint4 const (*codes)[kChannels * 8], int columns, int first_row,
                                            int rows, int first_group) {
  int const keys_pitch = ceil_div(args.seqlen, kKeyGroup) * kKeyGroup;
  int64_t const head_batch = static_cast<int64_t>(tile.batch) * args.heads + tile.head;
  uint8_t* const out = args.out + (head_batch * (columns + 1) + first_row) * keys_pitch;
  for (int i = threadIdx.x; i < rows * kGroups; i += kVThreads) {
    int const r = i / kGroups, g = i % kGroups;
    int const key = (first_group + g) * kKeyGroup;
    if (key >= args.seqlen) continue;
    uint4 words = make_uint4(0, 0, 0, 0);
    if (first_row + r < args.head_dim) {
      words = codes[g / 8][code_slot(r, g % 8)];
    } else if (first_row + r == columns) {
      words = ones_of(args.seqlen - key);
    }
    __stcs(reinterpret_cast<uint4*>(out + static_cast<int64_t>(r) * keys_pitch + key), words);
  }
}

// Notes what of a thread's chunk a sample's scales have no room for.
template <DType kIn, class Part>
__device__ __forceinline__ void note_outgrown(QuantizeVArguments const& args, Part const& part,
                                              QuantizeTile const& tile, int chunk, VChannel const* channels) {
  auto again = load_chunk<1>(args, part, tile, chunk, 0);
  float amax[4] = {0.f, 0.f, 0.f, 0.f};
  again.template for_each<false>([&](uint2 const(&raw)[4], int g, int) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bool const exists = chunk * kStatsChunk + g * kKeyGroup + part.token(i) < args.seqlen;
      float2 const low = unpack<kIn>(raw[i].x), high = unpack<kIn>(raw[i].y);
      float const x[4] = {low.x, low.y, high.x, high.y};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float const size = fabsf(x[c] - channels[4 * part.quad + c].mean);
        if (exists && is_finite(size)) amax[c] = fmaxf(amax[c], size);
      }
    }
  });
  int64_t const at =
      static_cast<int64_t>(tile.batch * args.heads + tile.head) * args.head_dim + 4 * part.quad;
#pragma unroll
  for (int c = 0; c < 4; ++c)
    if (__fmul_rn(amax[c], channels[4 * part.quad + c].inverse) >= kSaturates)
      atomicMax(args.outgrown + at + c, __float_as_uint(amax[c]));  // bits are ordered as the floats are
}

// A CTA: as many chunks as it has threads for. kColumns: channels of a tile.
template <DType kIn, int kColumns>
__global__ void __launch_bounds__(kVThreads, 2)
    quantize_v_kernel(__grid_constant__ QuantizeVArguments const args) {
  __shared__ VShared<kColumns> shared;
  ChunkPart<kColumns> const part;
  constexpr int kGroups = kStatsChunk / kKeyGroup * part.kChunks;  // of a CTA
  // NOTE: last tile first: what the statistics read last may still lie in L2.
  QuantizeTile const tile = args.tiles.get(gridDim.x - 1 - blockIdx.x);
  int const chunk = tile.block * part.kChunks + part.chunk;
  wait_for_launches(args.overlap == Overlap::kNone);
  auto loads = load_chunk<3>(args, part, tile, chunk, 0);
  wait_for_launches(args.overlap == Overlap::kLoads);
  let_next_begin();
  int64_t const head_channels = static_cast<int64_t>(tile.batch * args.heads + tile.head) * args.head_dim;
  for (int c = threadIdx.x; c < args.head_dim; c += kVThreads) {
    float const mean = args.mean ? __ldcg(args.mean + head_channels + c) : 0.f;
    Scale scale = {1.f, 1.f};
    if (args.amax) {
      int64_t const at = tile.batch * args.amax_batch + tile.head * args.amax_head + c * args.amax_channel;
      scale = scale_of_v(__uint_as_float(__ldcg(args.amax + at)), args.outgrown != nullptr);
    }
    if (tile.block == 0) args.scale[head_channels + c] = scale.scale;
    shared.channels[c] = {mean, scale.inverse};
  }
  __syncthreads();

  bool const full = kColumns == args.head_dim && (chunk + 1) * kStatsChunk <= args.seqlen;
  auto const round = [&](auto sums, auto is_full) {
    return round_chunk<kIn, sums.value, is_full.value>(args, part, loads, shared.channels,
                                                       shared.codes[part.chunk], tile, chunk, 0);
  };
  bool outgrown;
  if (args.errors) {
    outgrown = full ? round(std::true_type{}, std::true_type{}) : round(std::true_type{}, std::false_type{});
  } else {
    outgrown =
        full ? round(std::false_type{}, std::true_type{}) : round(std::false_type{}, std::false_type{});
  }
  if (outgrown && args.outgrown) note_outgrown<kIn>(args, part, tile, chunk, shared.channels);
  __syncthreads();
  store_codes<kColumns, kGroups>(args, tile, shared.codes, kColumns, 0, kColumns + 1, tile.block * kGroups);
  wait_for_launches(args.overlap == Overlap::kAll);
}

}  // namespace hopper_fa
