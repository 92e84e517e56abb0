// Means over tokens, and the largest |x - mean| of V, of all tokens or of a sample. A cluster's CTAs add up
// chunks of 128 tokens of the sample and then, through each other's shared memory, their sums. Every addition
// has its place: no atomics, and the bits of hopper_fa/token_stats.py.
//
// Roofline: the sample is read once. 16k tokens x 2048 channels: 67 MB, 17 us at 4 TB/s; of one token in
// eight 2 us and the launch.
#pragma once

#include <cooperative_groups.h>

#include "hopper_fa/quantize.h"
#include "quantize/layout.h"
#include "quantize/numerics.cuh"

namespace hopper_fa {

struct TokenStatsArguments {
  uint16_t const* x;
  int64_t batch_stride, row_stride, head_stride;
  int shift;                            // one token in 2^shift is sampled
  int tokens, heads, head_dim, chunks;  // tokens of the sample
  float* mean;                          // may be null
  bool smooth;                          // amax is of x - mean
  uint32_t* amax;
  int64_t amax_batch, amax_head, amax_channel;  // strides; 0 where a scale is shared
  uint32_t* outgrown;                           // (batch, heads, head_dim), set to 0; may be null
  Overlap overlap;
};

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

// `of` the first CTA of a cluster joined with those of the others, by op(s[r], s[r + half]).
template <class Of, class Op>
__device__ __forceinline__ auto join_ctas(int ctas, Of&& of, Op&& op) {
  decltype(of(0)) s[kStatsCtas];
#pragma unroll
  for (int r = 0; r < kStatsCtas; ++r) s[r] = of(min_int(r, ctas - 1));
#pragma unroll
  for (int half = kStatsCtas / 2; half > 0; half /= 2)
    if (half < ctas)
#pragma unroll
      for (int r = 0; r < half; ++r) s[r] = op(s[r], s[r + half]);
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

// A cluster: one head; CTA r of n takes its chunks r, r + n, ... . Thread (lane of 16, octet of channels); 16
// * head_dim / 8 of them.
template <DType kIn, bool kExtremes>
__global__ void __launch_bounds__(512, 2)
    token_stats_kernel(__grid_constant__ TokenStatsArguments const args) {
  extern __shared__ uint4 raw[];  // (8, threads): every thread copies what it will read
  float* const of_lanes = reinterpret_cast<float*>(raw + 8 * blockDim.x);  // (16, head_dim)
  wait_for_launches(args.overlap != Overlap::kAll);
  let_next_begin();
  auto const cluster = cooperative_groups::this_cluster();
  int const ctas = cluster.num_blocks(), rank = cluster.block_rank();
  int const head_batch = blockIdx.x / ctas;
  int const head = head_batch % args.heads, batch = head_batch / args.heads;
  int const octets = args.head_dim / 8, pairs = args.head_dim / 2;
  int const lane = threadIdx.x / octets, octet = threadIdx.x - lane * octets;
  auto const extremes = reinterpret_cast<uint32_t*>(of_lanes + kStatsLanes * args.head_dim);
  uint16_t const* const x = args.x + batch * args.batch_stride + head * args.head_stride + 8 * octet;

  // The lane's tokens of a chunk are first, first + 16, ... of the sample, `exist` of 8. The last warp may
  // hold threads of no lane.
  auto const exist = [&](int chunk) {
    int const left = args.tokens - chunk * kStatsChunk - lane;
    return lane >= kStatsLanes || left <= 0 ? 0 : min_int(8, ceil_div(left, kStatsLanes));
  };
  auto const fetch = [&](int chunk) {
    int const first = chunk * kStatsChunk + lane, count = exist(chunk);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int const token = sampled_token(i < count ? first + i * kStatsLanes : 0, args.shift);
      copy_async(raw + i * blockDim.x + threadIdx.x, x + token * args.row_stride, i < count);
    }
  };

  // Of the chunks so far: of channel threadIdx.x, and of a pair of channels minima, then maxima.
  float sum = 0.f;
  bool const high = threadIdx.x >= pairs;
  uint32_t extreme = high ? kInfinities<kIn> | 0x80008000u : kInfinities<kIn>;
  auto const further = [&](uint32_t a, uint32_t b) {
    return high ? max_halves<kIn>(a, b) : min_halves<kIn>(a, b);
  };
  if (rank < args.chunks) fetch(rank);
  for (int chunk = rank; chunk < args.chunks; chunk += ctas) {
    int const count = exist(chunk);
    wait_for_copies();
    ChannelStats<kIn, kExtremes> stats;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      stats.template add<false>(raw[i * blockDim.x + threadIdx.x], i == 0, i < count);
    // A NaN or infinity stays in its sum, so finite sums need no second look.
    bool finite = true;
#pragma unroll
    for (int c = 0; c < 8; ++c) finite = finite && is_finite(stats.sum[c]);
    if (!finite) {
#pragma unroll 1
      for (int i = 0; i < 8; ++i)
        stats.template add<true>(raw[i * blockDim.x + threadIdx.x], i == 0, i < count);
    }
    if (chunk + ctas < args.chunks) fetch(chunk + ctas);  // while this chunk's lanes are joined

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
    if (threadIdx.x < args.head_dim) {
      sum += join_lanes(of_lanes + threadIdx.x, args.head_dim, [](float a, float b) { return a + b; });
      if constexpr (kExtremes) {
        int const first = high ? kStatsLanes * pairs + threadIdx.x - pairs : threadIdx.x;
        extreme = further(extreme, join_lanes(extremes + first, pairs, further));
      }
    }
    __syncthreads();
  }

  // The CTA's, then of all in the order of join_ctas; every CTA does that for its share of the channels.
  if (threadIdx.x < args.head_dim) {
    of_lanes[threadIdx.x] = sum;
    if constexpr (kExtremes) extremes[threadIdx.x] = extreme;
  }
  cluster.sync();
  int const share = ceil_div(args.head_dim, ctas), channel = rank * share + threadIdx.x;
  bool const exists = threadIdx.x < share && channel < args.head_dim;
  if (threadIdx.x < ceil_div(share, 32) * 32) {
    int const c = exists ? channel : 0;
    float mean = join_ctas(
        ctas, [&](int r) { return cluster.map_shared_rank(of_lanes, r)[c]; },
        [](float a, float b) { return a + b; });
    mean = __fdiv_rn(mean, static_cast<float>(max_int(1, args.tokens)));
    int64_t const at = static_cast<int64_t>(head_batch) * args.head_dim + channel;
    if (args.mean && exists) args.mean[at] = mean;
    if (args.outgrown && exists) args.outgrown[at] = 0;
    if constexpr (kExtremes) {
      auto const of = [&](int first, auto op) {
        uint32_t const word =
            join_ctas(ctas, [&](int r) { return cluster.map_shared_rank(extremes, r)[first + c / 2]; }, op);
        float2 const pair = unpack<kIn>(word);
        return c % 2 ? pair.y : pair.x;
      };
      float const lowest = of(0, min_halves<kIn>), highest = of(pairs, max_halves<kIn>);
      float const centre = args.smooth ? mean : 0.f;
      // Rounding is monotonic, so this is the maximum of the rounded |x - mean|; 0 where nothing is finite.
      // NOTE: not where an x - mean overflows, which takes elements beyond half of BF16's range.
      float const amax =
          lowest <= highest && is_finite(centre) ? fmaxf(highest - centre, centre - lowest) : 0.f;
      uint32_t const bits = exists ? __float_as_uint(fabsf(amax)) : 0;  // -0 would be the largest
      uint32_t* const to =
          args.amax + batch * args.amax_batch + head * args.amax_head + channel * args.amax_channel;
      if (args.amax_channel) {
        if (exists) *to = bits;
      } else {
        uint32_t const of_warp = __reduce_max_sync(~0u, bits);
        if (threadIdx.x % 32 == 0)
          atomicMax(to, of_warp);  // bits of floats >= 0 are ordered as the floats are
      }
    }
  }
  cluster.sync();  // no CTA ends while others read its shared memory
  wait_for_launches(args.overlap == Overlap::kAll);
}

}  // namespace hopper_fa
