// V whose scales are from a sample's maxima: the slices of 32 channels that other tokens outgrew, rounded
// once more.
//
// A CTA looks at one slice's flag and is done, unless it is set. Then it reads the slice twice: for its true
// maxima, and to round it, the channels that were not outgrown to the same codes. NOTE: one CTA has some 30
// KB under way, so a slice takes as long as all of them, a few us for 1000 keys.
#pragma once

#include "quantize/quantize_v.cuh"

namespace hopper_fa {

struct MendShared {
  uint4 codes[ChunkPart<kVSlice>::kChunks][kVSlice * 8];
  VChannel channels[kVSlice];
  uint32_t amax[kVSlice];
};

// Grid: (batch, heads, slices) flat.
template <DType kIn>
__global__ void __launch_bounds__(kVThreads) mend_v_kernel(__grid_constant__ QuantizeVArguments const args) {
  wait_for_stream();
  if (args.outgrown[blockIdx.x] == 0) return;
  __shared__ MendShared shared;
  int const slices = ceil_div(args.head_dim, kVSlice);
  int const head_batch = blockIdx.x / slices, first_channel = (blockIdx.x - head_batch * slices) * kVSlice;
  int const channels = min_int(kVSlice, args.head_dim - first_channel);
  QuantizeTile const tile = {0, head_batch % args.heads, head_batch / args.heads};
  int64_t const head_channels = static_cast<int64_t>(head_batch) * args.head_dim + first_channel;
  if (threadIdx.x < kVSlice) {
    int const c = min_int(threadIdx.x, channels - 1);
    shared.amax[threadIdx.x] = 0;
    shared.channels[threadIdx.x] = {args.mean ? args.mean[head_channels + c] : 0.f,
                                    scale_of_v(__uint_as_float(args.amax[head_channels + c]), true).inverse};
  }
  __syncthreads();

  // Thread (token of 32, quad of channels).
  constexpr int kQuads = kVSlice / 4;
  int const quad = threadIdx.x % kQuads;
  if (4 * quad < channels) {
    auto const v =
        args.v + tile.batch * args.batch_stride + tile.head * args.head_stride + first_channel + 4 * quad;
    float amax[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 16  // loads under way: a slice has one CTA
    for (int token = threadIdx.x / kQuads; token < args.seqlen; token += kVThreads / kQuads) {
      uint2 const raw = __ldg(reinterpret_cast<uint2 const*>(v + token * args.row_stride));
      float2 const low = unpack<kIn>(raw.x), high = unpack<kIn>(raw.y);
      float const x[4] = {low.x, low.y, high.x, high.y};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float const size = fabsf(x[c] - shared.channels[4 * quad + c].mean);
        if (is_finite(size)) amax[c] = fmaxf(amax[c], size);
      }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) atomicMax(&shared.amax[4 * quad + c], __float_as_uint(amax[c]));
  }
  __syncthreads();
  if (threadIdx.x < channels) {
    float const amax = __uint_as_float(shared.amax[threadIdx.x]);
    if (__fmul_rn(amax, shared.channels[threadIdx.x].inverse) >= kSaturates) {
      Scale const scale = scale_of_v(amax, false);
      shared.channels[threadIdx.x].inverse = scale.inverse;
      args.scale[head_channels + threadIdx.x] = scale.scale;
    }
  }
  __syncthreads();

  ChunkPart<kVSlice> const part;
  for (int first = 0; first < args.chunks; first += part.kChunks) {
    int const chunk = first + part.chunk;
    auto loads = load_chunk<3>(args, part, tile, chunk, first_channel);
    auto const round = [&](auto sums) {
      round_chunk<kIn, sums.value, false>(args, part, loads, shared.channels, shared.codes[part.chunk], tile,
                                          chunk, first_channel);
    };
    args.errors ? round(std::true_type{}) : round(std::false_type{});
    __syncthreads();
    constexpr int kGroups = kStatsChunk / kKeyGroup * part.kChunks;
    store_codes<kVSlice, kGroups>(args, tile, shared.codes, tile_columns(args.head_dim), first_channel,
                                  channels, first * (kStatsChunk / kKeyGroup));
    __syncthreads();
  }
}

}  // namespace hopper_fa
