// Means over tokens, and the largest |x - mean| of V, of all tokens or of a sample. Two kernels: sums (and
// extremes) of chunks of 128 tokens of the sample, then of all chunks. Every addition has its place: no
// atomics, and the bits of hopper_fa/token_stats.py.
//
// Roofline: the first kernel reads the sample once and writes 4 (with extremes 8) bytes a channel for each
// 256 bytes read; the second reads those again, from L2. 16k tokens x 2048 channels: 67 MB + 2 MB, 17 us at 4
// TB/s; of one token in eight 2 us and the launches.
#pragma once

#include "quantize/layout.h"
#include "quantize/numerics.cuh"

namespace hopper_fa {

struct TokenStatsArguments {
  uint16_t const* x;
  int64_t batch_stride, row_stride, head_stride;
  int shift;                            // one token in 2^shift is sampled
  int tokens, heads, head_dim, chunks;  // tokens of the sample
  QuantizeTiles tiles;
  int tile_count;
  int64_t partials;  // batch * heads * chunks * head_dim
  // (batch, heads, chunks, head_dim) sums; with extremes, as many minima and then maxima of 16 bits after
  // them.
  float* workspace;
  bool extremes;
  float* mean;
  bool smooth;  // amax is of x - mean
  uint32_t* amax;
  int64_t amax_batch, amax_head, amax_channel;  // strides; 0 where a scale is shared
  uint32_t* outgrown;  // set to 0 by the second kernel, (batch, heads, head_dim); may be null
  bool beside;         // of the first kernel, see begin_launch
};

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

// s[0] becomes the first 2 kHalf elements joined by op(s[r], s[r + half]), from kHalf down to 1.
template <int kHalf, class T, class Op>
__device__ __forceinline__ void join_halves(T (&s)[kStatsLanes], Op&& op) {
#pragma unroll
  for (int r = 0; r < kHalf; ++r) s[r] = op(s[r], s[r + kHalf]);
  if constexpr (kHalf > 1) join_halves<kHalf / 2>(s, op);
}

// A channel's 16 lanes of a chunk, `stride` apart.
template <class T, class Op>
__device__ __forceinline__ T join_lanes(T const* lanes, int stride, Op&& op) {
  T s[kStatsLanes];
#pragma unroll
  for (int r = 0; r < kStatsLanes; ++r) s[r] = lanes[r * stride];
  join_halves<kStatsLanes / 2>(s, op);
  return s[0];
}

template <DType kIn, bool kExtremes>
struct ChannelStats {
  float sum[8];
  uint32_t low[4], high[4];  // pairs of 16-bit elements

  // A token's 8 channels; the first token starts the sums. kFilter: leaves out what is not finite.
  template <bool kFilter>
  __device__ __forceinline__ void add(uint4 const& raw, bool starts, bool exists) {
    constexpr uint32_t kHighest = kInfinities<kIn>, kLowest = kHighest | 0x80008000u;
    uint32_t const words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      float2 x = unpack<kIn>(words[w]);
      uint32_t left_out = exists ? 0 : ~0u;
      if constexpr (kFilter) {
        if (!is_finite(x.x)) left_out |= 0xffffu, x.x = 0.f;
        if (!is_finite(x.y)) left_out |= 0xffff0000u, x.y = 0.f;
      }
      sum[2 * w] = starts ? x.x : sum[2 * w] + x.x;
      sum[2 * w + 1] = starts ? x.y : sum[2 * w + 1] + x.y;
      if constexpr (kExtremes) {
        uint32_t const kept = words[w] & ~left_out;
        low[w] = min_halves<kIn>(starts ? kHighest : low[w], kept | (kHighest & left_out));
        high[w] = max_halves<kIn>(starts ? kLowest : high[w], kept | (kLowest & left_out));
      }
    }
  }
};

// A persistent grid; a tile is 128 tokens of the sample of one head. Thread (lane r of 16, octet of
// channels); 16 * head_dim / 8 of them.
template <DType kIn, bool kExtremes>
__global__ void __launch_bounds__(512, 2)
    token_stats_kernel(__grid_constant__ TokenStatsArguments const args) {
  extern __shared__ uint4 raw[];  // (8, threads): every thread copies what it will read
  float* const of_lanes = reinterpret_cast<float*>(raw + 8 * blockDim.x);  // (16, head_dim)
  begin_launch(args.beside);
  int const octets = args.head_dim / 8, pairs = args.head_dim / 2;
  int const lane = threadIdx.x / octets, octet = threadIdx.x - lane * octets;
  auto const extremes = reinterpret_cast<uint32_t*>(of_lanes + kStatsLanes * args.head_dim);

  struct Tokens {  // the lane's of a tile: first, first + 16, ... of the sample
    uint16_t const* head;
    int first, exist;  // of 8; the last warp may hold threads of no lane
  };
  auto const tokens_of = [&](QuantizeTile const& tile) -> Tokens {
    int const first = tile.block * kStatsChunk + lane, left = args.tokens - first;
    return {args.x + tile.batch * args.batch_stride + tile.head * args.head_stride + 8 * octet, first,
            lane >= kStatsLanes || left <= 0 ? 0 : min_int(8, ceil_div(left, kStatsLanes))};
  };
  auto const fetch = [&](Tokens const& tokens) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      bool const exists = i < tokens.exist;
      int const token = sampled_token(exists ? tokens.first + i * kStatsLanes : 0, args.shift);
      copy_async(raw + i * blockDim.x + threadIdx.x, tokens.head + token * args.row_stride, exists);
    }
  };

  int index = blockIdx.x;
  QuantizeTile tile = args.tiles.get(index);
  Tokens tokens = tokens_of(tile);
  fetch(tokens);
  while (true) {
    wait_for_copies();
    ChannelStats<kIn, kExtremes> stats;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      stats.template add<false>(raw[i * blockDim.x + threadIdx.x], i == 0, i < tokens.exist);
    // A NaN or infinity stays in its sum, so finite sums need no second look.
    bool finite = true;
#pragma unroll
    for (int c = 0; c < 8; ++c) finite = finite && is_finite(stats.sum[c]);
    if (!finite) {
#pragma unroll 1
      for (int i = 0; i < 8; ++i)
        stats.template add<true>(raw[i * blockDim.x + threadIdx.x], i == 0, i < tokens.exist);
    }
    int64_t const out =
        ((static_cast<int64_t>(tile.batch) * args.heads + tile.head) * args.chunks + tile.block) *
        args.head_dim;
    index += gridDim.x;
    if (index < args.tile_count) {  // while this tile's lanes are joined
      tile = args.tiles.get(index);
      tokens = tokens_of(tile);
      fetch(tokens);
    }

    if (lane < kStatsLanes) {
      float4* const to = reinterpret_cast<float4*>(of_lanes + lane * args.head_dim + 8 * octet);
      to[0] = make_float4(stats.sum[0], stats.sum[1], stats.sum[2], stats.sum[3]);
      to[1] = make_float4(stats.sum[4], stats.sum[5], stats.sum[6], stats.sum[7]);
      if constexpr (kExtremes) {
        auto const lows = reinterpret_cast<uint4*>(extremes);
        lows[lane * octets + octet] = make_uint4(stats.low[0], stats.low[1], stats.low[2], stats.low[3]);
        lows[(kStatsLanes + lane) * octets + octet] =
            make_uint4(stats.high[0], stats.high[1], stats.high[2], stats.high[3]);
      }
    }
    __syncthreads();
    for (int c = threadIdx.x; c < args.head_dim; c += blockDim.x)
      args.workspace[out + c] =
          join_lanes(of_lanes + c, args.head_dim, [](float a, float b) { return a + b; });
    if constexpr (kExtremes) {
      auto const to = reinterpret_cast<uint32_t*>(args.workspace + args.partials);
      for (int c = threadIdx.x; c < 2 * pairs; c += blockDim.x) {  // minima, then maxima
        bool const high = c >= pairs;
        int const pair = high ? c - pairs : c;
        to[((high ? args.partials : 0) + out) / 2 + pair] = join_lanes(
            extremes + high * kStatsLanes * pairs + pair, pairs,
            [high](uint32_t a, uint32_t b) { return high ? max_halves<kIn>(a, b) : min_halves<kIn>(a, b); });
      }
    }
    if (index >= args.tile_count) break;
    __syncthreads();
  }
  end_launch(args.beside);
}

// The sums of a head's chunks, `sums` apart by head_dim, are filled up with zeros to a power of two and added
// by a[i] + a[i + half] until one is left. A CTA has a channel a lane, and warp w the chunks w + kWarps j.
struct ChunkTree {
  int size = 1;  // what the sums that are left are filled up to

  // The warp's part.
  template <int kWarps, int kLoads>
  __device__ __forceinline__ float of_warp(float* sums, int chunks, int head_dim, bool exists) {
    int const warp = threadIdx.x / 32;
    auto const at = [&](int64_t chunk) { return chunk * head_dim; };
    int left = chunks;
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

// A CTA: 32 channels of one head, see ChunkTree. kIn: whose translation unit's copy this is.
// NOTE: small CTAs and few loads where they suffice.
template <DType kIn, int kWarps, int kLoads>
__global__ void __launch_bounds__(32 * kWarps)
    finish_stats_kernel(__grid_constant__ TokenStatsArguments const args) {
  begin_launch();
  __shared__ float shared[3][kWarps][32];
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int const slices = ceil_div(args.head_dim, 32);
  int const head_batch = blockIdx.x / slices;
  int const channel = (blockIdx.x - head_batch * slices) * 32 + lane;
  bool const exists = channel < args.head_dim;
  int64_t const base = static_cast<int64_t>(head_batch) * args.chunks * args.head_dim + channel;
  ChunkTree tree;
  shared[0][warp][lane] =
      tree.of_warp<kWarps, kLoads>(args.workspace + base, args.chunks, args.head_dim, exists);
  if (args.extremes) {
    auto const lows = reinterpret_cast<uint16_t const*>(args.workspace + args.partials) + base;
    uint32_t low = kInfinities<kIn>, high = kInfinities<kIn> | 0x80008000u;
#pragma unroll 4
    for (int chunk = warp; chunk < args.chunks && exists; chunk += kWarps) {
      int64_t const at = static_cast<int64_t>(chunk) * args.head_dim;
      low = min_halves<kIn>(low, lows[at]);
      high = max_halves<kIn>(high, lows[args.partials + at]);
    }
    shared[1][warp][lane] = unpack<kIn>(low).x, shared[2][warp][lane] = unpack<kIn>(high).x;
  }
  __syncthreads();
  if (warp > 0) return;

  float const mean = __fdiv_rn(tree.of_all(shared[0]), static_cast<float>(max_int(1, args.tokens)));
  if (args.mean && exists) args.mean[static_cast<int64_t>(head_batch) * args.head_dim + channel] = mean;
  if (args.outgrown && exists) args.outgrown[static_cast<int64_t>(head_batch) * args.head_dim + channel] = 0;
  if (!args.extremes) return;
  float const centre = args.smooth ? mean : 0.f;
  float low = INFINITY, high = -INFINITY;
#pragma unroll
  for (int w = 0; w < kWarps; ++w)
    low = fminf(low, shared[1][w][lane]), high = fmaxf(high, shared[2][w][lane]);
  // Rounding is monotonic, so this is the maximum of the rounded |x - mean|; 0 where nothing is finite.
  // NOTE: not where an x - mean overflows, which takes elements beyond half of BF16's range.
  float const amax = low <= high && is_finite(centre) ? fmaxf(high - centre, centre - low) : 0.f;
  uint32_t const bits = exists ? __float_as_uint(amax) : 0;
  int const head = head_batch % args.heads, batch = head_batch / args.heads;
  uint32_t* const to =
      args.amax + batch * args.amax_batch + head * args.amax_head + channel * args.amax_channel;
  if (args.amax_channel) {
    if (exists) *to = bits;
  } else {
    uint32_t const of_warp = __reduce_max_sync(~0u, bits);
    if (lane == 0) atomicMax(to, of_warp);  // bits of floats >= 0 are ordered as the floats are
  }
}

}  // namespace hopper_fa
