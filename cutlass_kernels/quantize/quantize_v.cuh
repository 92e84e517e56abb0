// V: smoothing, scale, rounding, and the layout that the second product reads: transposed, keys permuted in
// groups of 16, a row of ones below the channels.
//
// Roofline: 2 bytes read and 1 written an element, (tile_d + 8) / tile_d times that for the rows of ones and
// zeros. 16k tokens x 2048 channels: 101 MB + 2 MB, 26 us at 4 TB/s.
//
// A thread rounds four keys of four channels, the keys that are a word of the layout, so that the permutation
// is the choice of the register a byte comes from. It does so for the 8 groups of a chunk, one after the
// other. Shared memory only gathers a channel's words into lines. The sums of a chunk's codes, which say what
// rounding did to a channel's mean, are products with ones on the tensor cores; they are exact.
#pragma once

#include <cute/arch/mma_sm80.hpp>
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
  float* code_sums;  // (batch, heads, chunks of 128 keys, head_dim), of the codes' values; may be null
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

// Chunk `chunk` of a head, by the threads of `part`: codes into shared memory, their sums out.
template <DType kIn, bool kSums, bool kFull, class Part>
__device__ __forceinline__ void round_chunk(QuantizeVArguments const& args, Part const& part,
                                            VChannel const* channels, uint4* codes, QuantizeTile const& tile,
                                            int chunk) {
  int const first = chunk * kStatsChunk, tokens = args.seqlen - first;  // may be negative
  bool const works = 4 * part.quad < args.head_dim;
  int const mine = works ? tokens : 0;
  auto const v = args.v + tile.batch * args.batch_stride + tile.head * args.head_stride +
                 (first + 2 * part.word) * args.row_stride + 4 * part.quad;
  VChannel of[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) of[c] = channels[4 * part.quad + c];
  float sum[2][2][4];  // [parity of the group][pair of channels]

  // Keys 16 g ... of the chunk. filter: sums only, without what is not finite.
  auto const round = [&](uint2 const(&raw)[4], int g, float (&group_sum)[2][4], bool filter) {
    uint32_t const mask = kFull ? ~0u : key_mask(part.word, mine - g * kKeyGroup);
    uint32_t words[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float2 const pair = unpack<kIn>(c < 2 ? raw[i].x : raw[i].y);
        y[i] = ((c % 2 ? pair.y : pair.x) - of[c].mean) * of[c].inverse;
        y[i] = __fmaf_rn(y[i], 0.f, y[i]);  // what is not finite becomes NaN
        if (filter && !is_finite(y[i])) y[i] = 0.f;
      }
      words[c] = to_e4m3(y[0], y[1], y[2], y[3]) & mask;
      if (!filter && works)
        reinterpret_cast<uint32_t*>(codes + code_slot(4 * part.quad + c, g))[part.word] = words[c];
    }
    if constexpr (kSums) {
#pragma unroll
      for (int c = 0; c < 4; c += 2) add_codes(group_sum[c / 2], words[c], words[c + 1]);
    }
  };
  auto const round_all = [&](bool filter) {
#pragma unroll
    for (int i = 0; i < 16; ++i) sum[i / 8][i / 4 % 2][i % 4] = 0.f;
    for_each_group<kFull>(v, args.row_stride, mine, part, [&](uint2 const(&raw)[4], int g, int parity) {
      round(raw, g, sum[parity], filter);
    });
  };

  round_all(false);
  if constexpr (kSums) {
    auto const total = [&](int c) { return sum[0][c / 2][2 * (c % 2)] + sum[1][c / 2][2 * (c % 2)]; };
    // A NaN stays in its sum, so finite sums need no second look.
    // NOTE: a warp's threads look again together, as its products want them.
    bool const finite = is_finite(total(0) + total(1) + total(2) + total(3));
    if (__any_sync(~0u, works && !finite)) round_all(true);
    if (part.word == 0 && works && tokens > 0) {
      int64_t const at = static_cast<int64_t>(tile.batch * args.heads + tile.head) * args.chunks + chunk;
      *reinterpret_cast<float4*>(args.code_sums + at * args.head_dim + 4 * part.quad) =
          make_float4(total(0), total(1), total(2), total(3));
    }
  }
}

// A CTA: as many chunks as it has threads for. kColumns: channels of a tile.
template <DType kIn, int kColumns>
__global__ void __launch_bounds__(kVThreads, 2)
    quantize_v_kernel(__grid_constant__ QuantizeVArguments const args) {
  __shared__ VShared<kColumns> shared;
  wait_for_stream();
  ChunkPart<kColumns> const part;
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
    shared.channels[c] = {args.mean ? args.mean[head_channels + c] : 0.f, scale.inverse};
  }
  __syncthreads();

  int const chunk = tile.block * part.kChunks + part.chunk;
  bool const full = kColumns == args.head_dim && (chunk + 1) * kStatsChunk <= args.seqlen;
  auto const round = [&](auto sums, auto is_full) {
    round_chunk<kIn, sums.value, is_full.value>(args, part, shared.channels, shared.codes[part.chunk], tile,
                                                chunk);
  };
  if (args.code_sums) {
    full ? round(std::true_type{}, std::true_type{}) : round(std::true_type{}, std::false_type{});
  } else {
    full ? round(std::false_type{}, std::true_type{}) : round(std::false_type{}, std::false_type{});
  }
  __syncthreads();

  int const keys_pitch = ceil_div(args.seqlen, kKeyGroup) * kKeyGroup;
  constexpr int kRows = kColumns + kOnesRows;
  uint8_t* const out =
      args.out + static_cast<int64_t>(tile.batch * args.heads + tile.head) * kRows * keys_pitch;
  for (int i = threadIdx.x; i < kRows * kGroups; i += kVThreads) {
    int const r = i / kGroups, g = i % kGroups;
    int const key = (tile.block * kGroups + g) * kKeyGroup;
    if (key >= args.seqlen) continue;
    uint4 codes = make_uint4(0, 0, 0, 0);
    if (r < args.head_dim) {
      codes = shared.codes[g / 8][code_slot(r, g % 8)];
    } else if (r == kColumns) {
      constexpr uint32_t kOnes = 0x38383838;
      int const keys = args.seqlen - key;
      codes = make_uint4(kOnes & key_mask(0, keys), kOnes & key_mask(1, keys), kOnes & key_mask(2, keys),
                         kOnes & key_mask(3, keys));
    }
    __stcs(reinterpret_cast<uint4*>(out + static_cast<int64_t>(r) * keys_pitch + key), codes);
  }
}

}  // namespace hopper_fa
