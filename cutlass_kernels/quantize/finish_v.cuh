// V after its rounding: what needs all of a channel's tokens.
//
// Compensation adds the mean of what rounding took from V to the mean that attention gives back. And where
// elements outgrew the room that a sample's scales leave, their slice of 32 channels is rounded once more,
// its other channels to the same codes.
//
// A CTA: one slice. NOTE: a slice that is rounded has one CTA's loads under way, so it takes as long as
// thousands of them. That is a few us for 1000 keys, little of an attention over them, and rare; without such
// slices this is the least launch that compensation needs.
#pragma once

#include "quantize/quantize_v.cuh"

namespace hopper_fa {

// x[0] becomes the sum of the first `size` elements, a power of two, by x[i] + x[i + half]; size 0 counts
// as 1.
template <int kSize, int kHalf = kSize / 2>
__device__ __forceinline__ void tree_sum(float (&x)[kSize], int size) {
  if (kHalf < size) {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) x[i] += x[i + kHalf];
  }
  if constexpr (kHalf > 1) tree_sum<kSize, kHalf / 2>(x, size);
}

// The sums of a head's chunks, `sums` apart by head_dim, are filled up with zeros to a power of two and added
// by a[i] + a[i + half] until one is left. A CTA has a channel a lane, and warp w the chunks w + kWarps j.
struct ChunkTree {
  int size;  // what the sums that are left are filled up to

  // The warp's part.
  template <int kWarps, int kLoads>
  __device__ __forceinline__ float of_warp(float* sums, int chunks, int head_dim, bool exists) {
    int const warp = threadIdx.x / 32;
    auto const at = [&](int64_t chunk) { return chunk * head_dim; };
    int left = chunks;
    size = 1;
    while (size < left) size *= 2;
    // Above kLoads a warp the first steps go through memory, where no thread reads what another has written.
    for (; size > kWarps * kLoads; size /= 2, left = min_int(left, size)) {
      int const half = size / 2;
      for (int i = warp; i < half && exists; i += kWarps)
        sums[at(i)] = sums[at(i)] + (i + half < left ? sums[at(i + half)] : 0.f);
    }
    // Then kLoads a thread. Its sums are the ones that the tree joins down to distance kWarps.
    float x[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      int const chunk = warp + kWarps * j;
      x[j] = exists && chunk < left ? sums[at(chunk)] : 0.f;
    }
    tree_sum(x, size / kWarps);
    return x[0];
  }

  // All of it, from the warps' parts.
  template <int kWarps>
  __device__ __forceinline__ float of_all(float const (&parts)[kWarps][32]) const {
    float x[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) x[w] = parts[w][threadIdx.x % 32];
    tree_sum(x, min_int(size, kWarps));
    return x[0];
  }
};

struct FinishVShared {
  VWarp warps[kVThreads / 32];
  float of_warps[kVThreads / 32][32];
};

// Rounds `channels` channels of a head from first_channel on, with scales for what the sample's had no room
// for, each warp another chunk. outgrown: of this lane's channel, 0 where it was not.
template <DType kIn>
__device__ __forceinline__ void round_slice(QuantizeVArguments const& args, int batch, int head,
                                            int first_channel, int channels, uint32_t outgrown,
                                            VWarp& shared) {
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int64_t const at = (static_cast<int64_t>(batch) * args.heads + head) * args.head_dim + first_channel +
                     min_int(lane, channels - 1);
  float const amax = __uint_as_float(outgrown ? outgrown : args.amax[at]);
  VScale const scale = scale_of_v(amax, outgrown == 0);
  if (warp == 0 && outgrown) args.scale[at] = scale.scale;
  shared.channels[lane] = {args.mean ? args.mean[at] : 0.f, scale.inverse};
  __syncwarp();

  for (int chunk = warp; chunk < args.chunks; chunk += kVThreads / 32) {
    VPart const part = {batch, head, chunk, first_channel};
    auto loads = part.loads<3>(args);
    if (args.errors)
      round_chunk<kIn, true, false>(args, part, loads, shared);
    else
      round_chunk<kIn, false, false>(args, part, loads, shared);
    __syncwarp();
    store_codes(args, part, tile_columns(args.head_dim), channels, shared);
    __syncwarp();
  }
}

// Grid: (batch, heads, slices) flat. kLoads: see ChunkTree.
template <DType kIn, int kLoads>
__global__ void __launch_bounds__(kVThreads)
    finish_v_kernel(__grid_constant__ QuantizeVArguments const args) {
  __shared__ FinishVShared shared;
  wait_for_launches(true);
  let_next_begin();
  int const slices = ceil_div(args.head_dim, kVSlice);
  int const head_batch = blockIdx.x / slices, first_channel = (blockIdx.x - head_batch * slices) * kVSlice;
  int const channels = min_int(kVSlice, args.head_dim - first_channel);
  int64_t const head_channels = static_cast<int64_t>(head_batch) * args.head_dim + first_channel;
  int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  bool const exists = lane < channels;
  int64_t const at = head_channels + (exists ? lane : 0);
  ChunkTree tree;
  auto const part_of_errors = [&] {
    if (!args.errors) return 0.f;
    int64_t const first = static_cast<int64_t>(head_batch) * args.chunks * args.head_dim + first_channel;
    return tree.of_warp<kVThreads / 32, kLoads>(args.errors + first + lane, args.chunks, args.head_dim,
                                                exists);
  };
  // NOTE: sums that go through memory are rounded anew with their slice, if it is.
  // NOTE: all of these are under way before it is known whether there is something to round.
  uint32_t const outgrown = args.outgrown && exists ? args.outgrown[at] : 0;
  float part = part_of_errors(), scale = args.scale[at];
  float const mean = args.mean ? args.mean[at] : 0.f;
  if (__any_sync(~0u, outgrown != 0)) {  // the same in all warps
    __syncthreads();                     // all have read what is written now
    round_slice<kIn>(args, head_batch / args.heads, head_batch % args.heads, first_channel, channels,
                     outgrown, shared.warps[warp]);
    __syncthreads();
    part = part_of_errors(), scale = args.scale[at];
  }
  if (!args.errors) return;
  shared.of_warps[warp][lane] = part;
  __syncthreads();
  if (warp > 0 || !exists) return;
  float const taken = __fdiv_rn(tree.of_all(shared.of_warps), static_cast<float>(max_int(1, args.seqlen)));
  float const error = __fmul_rn(scale, taken);
  args.mean_out[at] = args.mean ? __fadd_rn(mean, error) : error;
}

}  // namespace hopper_fa
