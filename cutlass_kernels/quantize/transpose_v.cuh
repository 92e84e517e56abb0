// V: smoothing, scale, rounding, and the layout that the second product reads: transposed, keys permuted in
// groups of 16, a row of ones below the channels.
//
// Roofline: 2 bytes read and 1 written an element, (tile_d + 8) / tile_d times that for the rows of ones and
// zeros. 16k tokens x 2048 channels: 101 MB + 2 MB, 26 us at 4 TB/s; arithmetic 6 us, with the sums of
// rounding errors 16 us. V that is e4m3 already: 67 MB, 17 us.
//
// A thread transposes 16 keys of 8 channels in registers: the keys of a 16-byte store are a group, so that
// the permutation is the choice of the register a byte comes from. Shared memory only gathers a channel's
// groups into lines. The mean rounding error is a mean over tokens as any other (token_stats.cuh); its chunks
// are read a second time, while their lines are in L1.
#pragma once

#include "quantize/layout.h"
#include "quantize/token_stats.cuh"

namespace hopper_fa {

struct TransposeVArguments {
  void const* v;
  int64_t batch_stride, row_stride, head_stride;  // elements
  int seqlen, heads, head_dim;
  int groups;  // key groups a CTA
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

// NOTE: threads read every eighth channel at once; the gaps spread them over the banks.
__device__ __forceinline__ int channel_slot(int channel) { return channel + channel / 8; }

// x - mean less what its code stands for.
template <DType kIn>
__device__ __forceinline__ float2 rounding_errors(uint32_t word, VChannel const& a, VChannel const& b) {
  float2 x = unpack<kIn>(word);
  x.x -= a.mean, x.y -= b.mean;
  float2 const codes = from_e4m3(to_e4m3(__fmul_rn(x.x, a.inverse), __fmul_rn(x.y, b.inverse)));
  return make_float2(__fsub_rn(x.x, __fmul_rn(codes.x, a.scale)),
                     __fsub_rn(x.y, __fmul_rn(codes.y, b.scale)));
}

// Chunk sums of the rounding errors of a CTA's keys, in the order of token_stats.cuh. `of_lanes` is (chunks
// of the CTA, 16, head_dim).
template <DType kIn>
__device__ __forceinline__ void sum_errors(TransposeVArguments const& args, QuantizeTile const& tile,
                                           VChannel const* channels, float* of_lanes) {
  int const octets = args.head_dim / 8, tile_key = tile.block * args.groups * kKeyGroup;
  int const lanes = args.groups / (kStatsChunk / kKeyGroup) * kStatsLanes;
  auto const v =
      static_cast<uint16_t const*>(args.v) + tile.batch * args.batch_stride + tile.head * args.head_stride;
  for (int part = threadIdx.x; part < lanes * octets; part += blockDim.x) {
    int const lane = part / octets, octet = part - lane * octets;
    int const first = tile_key + lane / kStatsLanes * kStatsChunk + lane % kStatsLanes;
    int const left = args.seqlen - first;
    int const exist = left <= 0 ? 0 : min_int(8, ceil_div(left, kStatsLanes));
    VChannel const* const channel = channels + channel_slot(8 * octet);
    float sum[8];
    // Sums with NaN or infinity in them are formed again, without what is not finite.
    auto const add = [&](bool filter, int i) {
      uint4 raw = make_uint4(0, 0, 0, 0);
      if (i < exist)
        raw = __ldg(reinterpret_cast<uint4 const*>(v + (first + kStatsLanes * i) * args.row_stride) + octet);
      uint32_t const words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        float2 e = rounding_errors<kIn>(words[w], channel[2 * w], channel[2 * w + 1]);
        bool const counts_x = i < exist && (!filter || is_finite(e.x));
        bool const counts_y = i < exist && (!filter || is_finite(e.y));
        e = make_float2(counts_x ? e.x : 0.f, counts_y ? e.y : 0.f);
        sum[2 * w] = i == 0 ? e.x : sum[2 * w] + e.x;
        sum[2 * w + 1] = i == 0 ? e.y : sum[2 * w + 1] + e.y;
      }
    };
#pragma unroll
    for (int i = 0; i < 8; ++i) add(false, i);
    bool finite = true;
#pragma unroll
    for (int c = 0; c < 8; ++c) finite = finite && is_finite(sum[c]);
    if (!finite) {
#pragma unroll 1
      for (int i = 0; i < 8; ++i) add(true, i);
    }
    float4* const to = reinterpret_cast<float4*>(of_lanes + lane * args.head_dim + 8 * octet);
    to[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    to[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
  }
  __syncthreads();
  int const chunks = ceil_div(args.seqlen, kStatsChunk), first_chunk = tile_key / kStatsChunk;
  for (int i = threadIdx.x; i < lanes / kStatsLanes * args.head_dim; i += blockDim.x) {
    int const chunk = i / args.head_dim, c = i - chunk * args.head_dim;
    if (first_chunk + chunk >= chunks) break;
    int64_t const head_batch = tile.batch * args.heads + tile.head;
    args.error_sums[(head_batch * chunks + first_chunk + chunk) * args.head_dim + c] =
        join_lanes(of_lanes + chunk * kStatsLanes * args.head_dim + c, args.head_dim,
                   [](float a, float b) { return a + b; });
  }
}

// Byte c of each of four words: the e4m3 codes of keys a, b, c, d for channel c.
__device__ __forceinline__ void transpose_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d,
                                                uint32_t (&of_channel)[4]) {
  uint32_t const low_ab = __byte_perm(a, b, 0x5140), high_ab = __byte_perm(a, b, 0x7362);
  uint32_t const low_cd = __byte_perm(c, d, 0x5140), high_cd = __byte_perm(c, d, 0x7362);
  of_channel[0] = __byte_perm(low_ab, low_cd, 0x5410), of_channel[1] = __byte_perm(low_ab, low_cd, 0x7632);
  of_channel[2] = __byte_perm(high_ab, high_cd, 0x5410),
  of_channel[3] = __byte_perm(high_ab, high_cd, 0x7632);
}

template <DType kIn>
__global__ void __launch_bounds__(256) transpose_v_kernel(__grid_constant__ TransposeVArguments const args) {
  constexpr bool kRounds = kIn != DType::kE4M3;  // else the bytes are codes already
  constexpr int kWords = kRounds ? 4 : 2;        // of 8 channels of one key
  extern __shared__ uint4 staged[];              // v_slot(channel, group)
  __shared__ VChannel channels[kMaxHeadDim + kMaxHeadDim / 8];
  QuantizeTile const tile = args.tiles.get(gridDim.x - 1 - blockIdx.x);
  int const head_batch = tile.batch * args.heads + tile.head;
  int const tile_key = tile.block * args.groups * kKeyGroup;

  // Thread (group of 16 keys, octet of channels); the last warp may hold threads of no group.
  int const octets = args.head_dim / 8;
  int const group = threadIdx.x / octets, octet = threadIdx.x - group * octets;
  bool const works = group < args.groups;
  int const key = tile_key + group * kKeyGroup;
  int const keys = works ? args.seqlen - key : 0;  // of 16 that exist; may be negative, or more than 16
  uint32_t raw[kKeyGroup][kWords];
  int64_t const first = tile.batch * args.batch_stride + tile.head * args.head_stride + 8 * octet;
#pragma unroll
  for (int i = 0; i < kKeyGroup; ++i) {
    int64_t const at = first + (key + i) * args.row_stride;
    if constexpr (kRounds) {
      uint4 x = make_uint4(0, 0, 0, 0);
      if (i < keys) x = __ldg(reinterpret_cast<uint4 const*>(static_cast<uint16_t const*>(args.v) + at));
      raw[i][0] = x.x, raw[i][1] = x.y, raw[i][2] = x.z, raw[i][3] = x.w;
    } else {
      uint2 x = make_uint2(0, 0);
      if (i < keys) x = __ldg(reinterpret_cast<uint2 const*>(static_cast<uint8_t const*>(args.v) + at));
      raw[i][0] = x.x, raw[i][1] = x.y;
    }
  }

  if constexpr (kRounds) {
    int64_t const head = static_cast<int64_t>(head_batch) * args.head_dim;
    for (int c = threadIdx.x; c < args.head_dim; c += blockDim.x) {
      Scale scale = {1.f, 1.f};
      if (args.amax)
        scale = scale_of(
            __uint_as_float(
                args.amax[tile.batch * args.amax_batch + tile.head * args.amax_head + c * args.amax_channel]),
            kE4M3Max);
      if (tile.block == 0) args.scale[head + c] = scale.scale;
      channels[channel_slot(c)] = {args.mean ? args.mean[head + c] : 0.f, scale.scale, scale.inverse, 0.f};
    }
    __syncthreads();
  }

  if (works) {
    uint32_t mask[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) mask[t] = key_mask(t, keys);

    if constexpr (kRounds) {
      // (x - mean) * inverse; what is not finite there becomes NaN.
      auto const scaled = [](float x, VChannel const& channel) {
        float const y = (x - channel.mean) * channel.inverse;
        return __fmaf_rn(y, 0.f, y);
      };
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        int const channel = 8 * octet + 2 * w;
        VChannel const a = channels[channel_slot(channel)], b = channels[channel_slot(channel + 1)];
        uint32_t even[4], odd[4];
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          float x[4], y[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float2 const pair = unpack<kIn>(raw[key_at(4 * t + i)][w]);
            x[i] = scaled(pair.x, a), y[i] = scaled(pair.y, b);
          }
          even[t] = to_e4m3(x[0], x[1], x[2], x[3]) & mask[t];
          odd[t] = to_e4m3(y[0], y[1], y[2], y[3]) & mask[t];
        }
        staged[v_slot(channel, group, args.groups)] = make_uint4(even[0], even[1], even[2], even[3]);
        staged[v_slot(channel + 1, group, args.groups)] = make_uint4(odd[0], odd[1], odd[2], odd[3]);
      }
    } else {
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        uint32_t words[4][4];  // (t, channel)
#pragma unroll
        for (int t = 0; t < 4; ++t)
          transpose_bytes(raw[key_at(4 * t)][w], raw[key_at(4 * t + 1)][w], raw[key_at(4 * t + 2)][w],
                          raw[key_at(4 * t + 3)][w], words[t]);
#pragma unroll
        for (int c = 0; c < 4; ++c)  // keys that do not exist were loaded as zeros
          staged[v_slot(8 * octet + 4 * w + c, group, args.groups)] =
              make_uint4(words[0][c], words[1][c], words[2][c], words[3][c]);
      }
    }
  }
  __syncthreads();

  int const keys_pitch = ceil_div(args.seqlen, kKeyGroup) * kKeyGroup;
  int const tile_d = tile_columns(args.head_dim), rows = tile_d + kOnesRows;
  for (int i = threadIdx.x; i < rows * args.groups; i += blockDim.x) {
    int const r = i / args.groups, g = i - r * args.groups;
    int const key = tile_key + g * kKeyGroup;
    if (key >= args.seqlen) continue;
    uint4 codes = make_uint4(0, 0, 0, 0);
    if (r < args.head_dim) {
      codes = staged[v_slot(r, g, args.groups)];
    } else if (r == tile_d) {
      constexpr uint32_t kOnes = 0x38383838;
      int const keys = args.seqlen - key;
      codes = make_uint4(kOnes & key_mask(0, keys), kOnes & key_mask(1, keys), kOnes & key_mask(2, keys),
                         kOnes & key_mask(3, keys));
    }
    *reinterpret_cast<uint4*>(args.out + (static_cast<int64_t>(head_batch) * rows + r) * keys_pitch + key) =
        codes;
  }

  if constexpr (kRounds) {
    if (!args.error_sums) return;
    __syncthreads();  // the codes have been read
    sum_errors<kIn>(args, tile, channels, reinterpret_cast<float*>(staged));
  }
}

}  // namespace hopper_fa
