// V: smoothing, scale, rounding, and the layout that the second product reads: transposed, keys permuted in
// groups of 16, a row of ones below the channels.
//
// Roofline: 2 bytes read and 1 written an element, (tile_d + 8) / tile_d times that for the rows of ones and
// zeros. 16k tokens x 2048 channels: 101 MB + 2 MB, 26 us at 4 TB/s.
//
// A thread rounds four keys of four channels, the keys that are a word of the layout, so that the permutation
// is the choice of the register a byte comes from; and their lanes of the mean rounding error, which are a
// mean over tokens as any other (token_stats.cuh). It does so for the 8 groups of a chunk, one after the
// other, as the sums want it. Shared memory only gathers a channel's words into lines.
#pragma once

#include <type_traits>

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
  float* error_sums;  // (batch, heads, chunks of 128 keys, head_dim), of the rounding errors; may be null
};

// What the arithmetic needs of a channel, in shared memory.
struct alignas(16) VChannel {
  float mean, scale, inverse, unused;
};

// NOTE: threads read every fourth channel at once; the gaps spread them over the banks.
__device__ __forceinline__ int channel_slot(int channel) { return channel + channel / 4; }

template <int kThreads>
struct VShared {
  uint4 codes[ChunkPart<kThreads>::kChunks][ChunkPart<kThreads>::kColumns * 8];  // code_slot(channel, group)
  VChannel channels[ChunkPart<kThreads>::kColumns * 5 / 4];
};

// Chunk `chunk` of a head, by the threads of `part`: codes into shared memory, sums of errors out.
template <DType kIn, bool kErrors, bool kFull, class Part>
__device__ __forceinline__ void round_chunk(QuantizeVArguments const& args, Part const& part,
                                            VChannel const* channels, uint4* codes, QuantizeTile const& tile,
                                            int chunk) {
  int const first = chunk * kStatsChunk, tokens = args.seqlen - first;  // may be negative
  bool const works = 4 * part.quad < args.head_dim;
  int const mine = works ? tokens : 0;
  auto const v = args.v + tile.batch * args.batch_stride + tile.head * args.head_stride +
                 (first + 2 * part.word) * args.row_stride + 4 * part.quad;
  VChannel const* const channel = channels + channel_slot(4 * part.quad);
  float sum[4][4];  // (channel, lane)

  // Keys 16 g ... of the chunk. filter: sums only, without what is not finite.
  auto const round = [&](uint2 const(&raw)[4], int g, bool filter) {
    int const keys = mine - g * kKeyGroup;
    uint32_t const mask = kFull ? ~0u : key_mask(part.word, keys);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      VChannel const of = channel[c];
      float x[4], y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float2 const pair = unpack<kIn>(c < 2 ? raw[i].x : raw[i].y);
        x[i] = (c % 2 ? pair.y : pair.x) - of.mean;
        y[i] = x[i] * of.inverse;
        y[i] = __fmaf_rn(y[i], 0.f, y[i]);  // what is not finite becomes NaN
      }
      uint32_t const low = to_e4m3(y[0], y[1]), high = to_e4m3(y[2], y[3]);
      if (!filter && works)
        reinterpret_cast<uint32_t*>(codes + code_slot(4 * part.quad + c, g))[part.word] =
            (low | high << 16) & mask;
      if constexpr (kErrors) {
        float2 const code_of[2] = {from_e4m3(low), from_e4m3(high)};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float const code = i % 2 ? code_of[i / 2].y : code_of[i / 2].x;
          float error = __fsub_rn(x[i], __fmul_rn(code, of.scale));
          if (!kFull && part.token(i) >= keys || filter && !is_finite(error)) error = 0.f;
          sum[c][i] += error;
        }
      }
    }
  };
  auto const round_all = [&](bool filter) {
#pragma unroll
    for (int c = 0; c < 4; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[c][i] = -0.f;  // -0 + x is x, for -0 too
    for_each_group<kFull>(v, args.row_stride, mine, part,
                          [&](uint2 const(&raw)[4], int g) { round(raw, g, filter); });
  };

  round_all(false);
  if constexpr (kErrors) {
    // A NaN or infinity stays in its sum, so finite sums need no second look.
    bool finite = true;
#pragma unroll
    for (int c = 0; c < 4; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) finite = finite && is_finite(sum[c][i]);
    if (!finite) round_all(true);
    float4 sums;
    sums.x = add_lanes(sum[0]), sums.y = add_lanes(sum[1]);
    sums.z = add_lanes(sum[2]), sums.w = add_lanes(sum[3]);
    if (part.word == 0 && works && tokens > 0) {
      int64_t const at = static_cast<int64_t>(tile.batch * args.heads + tile.head) * args.chunks + chunk;
      *reinterpret_cast<float4*>(args.error_sums + at * args.head_dim + 4 * part.quad) = sums;
    }
  }
}

// A CTA: as many chunks as it has threads for. kThreads: a tile has 32 * kThreads channels.
// NOTE: two CTAs an SM: with three (80 registers) a compensated V takes 48 us instead of 44.
template <DType kIn, int kThreads>
__global__ void __launch_bounds__(kVThreads, 2)
    quantize_v_kernel(__grid_constant__ QuantizeVArguments const args) {
  __shared__ VShared<kThreads> shared;
  wait_for_stream();
  ChunkPart<kThreads> const part;
  constexpr int kGroups = kStatsChunk / kKeyGroup * part.kChunks;  // of a CTA
  // NOTE: last tile first: what the statistics read last may still lie in L2.
  QuantizeTile const tile = args.tiles.get(gridDim.x - 1 - blockIdx.x);
  int64_t const head_channels = static_cast<int64_t>(tile.batch * args.heads + tile.head) * args.head_dim;
  for (int c = threadIdx.x; c < args.head_dim; c += kVThreads) {
    Scale scale = {1.f, 1.f};
    if (args.amax) {
      int64_t const at = tile.batch * args.amax_batch + tile.head * args.amax_head + c * args.amax_channel;
      scale = scale_of(__uint_as_float(args.amax[at]), kE4M3Max);
    }
    if (tile.block == 0) args.scale[head_channels + c] = scale.scale;
    VChannel& channel = shared.channels[channel_slot(c)];
    channel.mean = args.mean ? args.mean[head_channels + c] : 0.f;
    channel.scale = scale.scale, channel.inverse = scale.inverse;
  }
  __syncthreads();

  int const chunk = tile.block * part.kChunks + part.chunk;
  bool const full = part.kColumns == args.head_dim && (chunk + 1) * kStatsChunk <= args.seqlen;
  auto const round = [&](auto errors, auto is_full) {
    round_chunk<kIn, errors.value, is_full.value>(args, part, shared.channels, shared.codes[part.chunk], tile,
                                                  chunk);
  };
  if (args.error_sums) {
    full ? round(std::true_type{}, std::true_type{}) : round(std::true_type{}, std::false_type{});
  } else {
    full ? round(std::false_type{}, std::true_type{}) : round(std::false_type{}, std::false_type{});
  }
  __syncthreads();

  int const keys_pitch = ceil_div(args.seqlen, kKeyGroup) * kKeyGroup;
  constexpr int kRows = part.kColumns + kOnesRows;
  uint8_t* const out =
      args.out + static_cast<int64_t>(tile.batch * args.heads + tile.head) * kRows * keys_pitch;
  for (int i = threadIdx.x; i < kRows * kGroups; i += kVThreads) {
    int const r = i / kGroups, g = i % kGroups;
    int const key = (tile.block * kGroups + g) * kKeyGroup;
    if (key >= args.seqlen) continue;
    uint4 codes = make_uint4(0, 0, 0, 0);
    if (r < args.head_dim) {
      codes = shared.codes[g / 8][code_slot(r, g % 8)];
    } else if (r == part.kColumns) {
      constexpr uint32_t kOnes = 0x38383838;
      int const keys = args.seqlen - key;
      codes = make_uint4(kOnes & key_mask(0, keys), kOnes & key_mask(1, keys), kOnes & key_mask(2, keys),
                         kOnes & key_mask(3, keys));
    }
    __stcs(reinterpret_cast<uint4*>(out + static_cast<int64_t>(r) * keys_pitch + key), codes);
  }
}

}  // namespace hopper_fa
