// The backward of an 8-bit forward. S = (q_scale Q) (k_scale K)^T must be the forward's, so Q and K enter the
// products as codes, which 16 bits hold exactly, times powers of two; the rest of the scales acts in FP32:
//
//   scale log2(e) q_scale = 2^a factor_i      Q' = 2^a Q    a row of Q
//   k_scale = 2^b kappa                       K' = 2^b K    a key block
//   P = exp2(f S' + bias_i)                                f = factor_i kappa
//   dS' = P (f dP - f delta_i) = f dS
//   dV = P^T dO                dK = ln(2) dS'^T Q' / kappa        dQ = softmax_scale dS' K' / factor_i
//
// f and f delta_i are made in shared memory by a warp that has nothing else to do: multiplied where they are
// used, kappa cost 12% of the kernel at d64.
//
// V is dequantised and rounded to 16 bits, as O is: of a row that sees one key both are rounded alike, and
// delta cancels dP exactly. dQ and dK of rotated tensors are rotated back where they leave.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "backward/traits.cuh"
#include "common/fragment.cuh"
#include "quantize/layout.h"
#include "quantize/numerics.cuh"

namespace hopper_fa {

// Exponent of the power of two that codes are multiplied by for the scale `full`: its own, as far as the
// products stay exact in the element type.
template <class Element>
__device__ __forceinline__ int code_exponent(float full, DType codes) {
  constexpr bool kNarrow = std::is_same_v<Element, cutlass::half_t>;
  // NOTE: e4m3 goes from 2^-9 to 448, int8 from 1 to 127; FP16 from 2^-24 to 65504.
  int const lowest = !kNarrow ? -100 : codes == DType::kInt8 ? -24 : -15;
  int const highest = !kNarrow ? 100 : codes == DType::kInt8 ? 9 : 7;
  int const exponent = (__float_as_int(full) >> 23 & 255) - 127;
  return min(max(exponent, lowest), highest);
}

__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

// scale log2(e) q_scale of a query row.
__device__ __forceinline__ float full_row_factor(BackwardArguments const& args, int batch, int head,
                                                 int row) {
  ScaleRef const& s = args.codes.q_scale;
  int64_t const at = int64_t(batch) * s.batch_stride + int64_t(head) * s.head_stride +
                     int64_t(row / args.codes.q_group_rows) * s.group_stride;
  return args.scale_log2 * s.data[at];
}

__device__ __forceinline__ float k_scale_of(BackwardCodes const& codes, int batch, int head, int key) {
  ScaleRef const& s = codes.k_scale;
  return s.data[int64_t(batch) * s.batch_stride + int64_t(head) * s.head_stride +
                int64_t(key / codes.k_group_rows) * s.group_stride];
}

template <class Traits>
__device__ __forceinline__ float key_factor(BackwardCodes const& codes, int n_block, int head, int batch) {
  float const full = k_scale_of(codes, batch, head, n_block * Traits::kBlockN);
  return full * power_of_two(-code_exponent<typename Traits::Element>(full, codes.dtype));
}

// One warp: multiplies every query block's factors, and delta that has them, by the keys' factor.
template <class Traits>
__device__ __forceinline__ void scale_rows_by_keys(BackwardArguments const& args,
                                                   typename Traits::SharedStorage& shared) {
  RingCursor<Traits::kTile.q_stages> ring;
  for (int left = args.q_heads_per_kv * shared.tile.walk.count; left > 0; --left) {
    FullBarrier::wait(&shared.rows_full[ring.slot], ring.phase);
    CUTE_UNROLL
    for (int i = threadIdx.x % 32; i < Traits::kBlockM; i += 32) {
      shared.factor[ring.slot][i] *= shared.key_factor;
      if constexpr (!Traits::kSplit) shared.delta[ring.slot][i] *= shared.key_factor;
    }
    // NOTE: TMA writes there next.
    tma_store_fence();
    arrive_warp(shared.q_full[ring.slot]);
    ring.advance();
  }
}

constexpr int kWidenThreads = 256;
constexpr int kWidenKeys = 128, kWidenChannels = 64;  // of V, a CTA

// How many CTAs widen Q, K and V.
struct WidenGrid {
  int q, k, v;
};

inline WidenGrid make_widen_grid(BackwardArguments const& args, int batch, int heads_kv) {
  int64_t const pieces = ceil_div(args.head_dim, 16);  // of 16 codes, a row
  auto const ctas = [&](int64_t rows) { return int((rows * pieces + kWidenThreads - 1) / kWidenThreads); };
  return {ctas(int64_t(batch) * args.seqlen_q * args.heads_q),
          ctas(int64_t(batch) * args.seqlen_k * heads_kv),
          batch * heads_kv * ceil_div(args.seqlen_k, kWidenKeys) * ceil_div(args.head_dim, kWidenChannels)};
}

// 16 codes of Q or K and what they are multiplied by, to 16 bits.
template <class Element>
__device__ __forceinline__ void widen_codes(uint4 const& codes, DType dtype, float power, uint4 (&out)[2]) {
  uint32_t const in[4] = {codes.x, codes.y, codes.z, codes.w};
  auto* const words = reinterpret_cast<uint32_t*>(out);
  CUTE_UNROLL
  for (int i = 0; i < 8; ++i) {
    uint32_t const two = in[i / 2] >> 16 * (i % 2);
    float2 x;
    if (dtype == DType::kInt8)
      x = make_float2(static_cast<int8_t>(two), static_cast<int8_t>(two >> 8));
    else
      x = unpack<DType::kFP16>(halves_of_e4m3(two & 0xffff));
    words[i] = round_pair<Element>(x.x * power, x.y * power);
  }
}

// Rows of Q (kQueries) or K: thread by thread 16 columns.
template <class Element, bool kQueries>
__device__ __forceinline__ void widen_rows(BackwardArguments const& args, int cta, int batch_size,
                                           int heads) {
  int const seqlen = kQueries ? args.seqlen_q : args.seqlen_k;
  int const pieces = (args.head_dim + 15) / 16;
  int64_t const index = int64_t(cta) * kWidenThreads + threadIdx.x;
  int64_t const row = index / pieces;  // of all heads, tokens and batch entries
  int const column = static_cast<int>(index - row * pieces) * 16;
  if (row >= int64_t(batch_size) * seqlen * heads) return;
  int const head = row % heads;
  int64_t const token = row / heads;
  int const at = token % seqlen, batch = token / seqlen;
  float const full =
      kQueries ? full_row_factor(args, batch, head, at) : k_scale_of(args.codes, batch, head, at);
  uint4 const codes = static_cast<uint4 const*>(kQueries ? args.codes.q : args.codes.k)[index];
  uint4 out[2];
  widen_codes<Element>(codes, args.codes.dtype, power_of_two(code_exponent<Element>(full, args.codes.dtype)),
                       out);
  Strided const& to = kQueries ? args.wide_q : args.wide_k;
  auto* const place = reinterpret_cast<uint4*>(to.row(batch, head, at) + column);
  place[0] = out[0];
  if (column + 8 < args.head_dim) place[1] = out[1];
}

// 128 keys by 64 channels of V: transposed, scaled, rounded.
template <class Element>
__device__ __forceinline__ void widen_v(BackwardArguments const& args, int cta, int heads) {
  constexpr int kPitch = kWidenChannels + 8;
  __shared__ alignas(16) uint16_t tile[kWidenKeys * kPitch];
  int const key_tiles = (args.seqlen_k + kWidenKeys - 1) / kWidenKeys;
  int const channel_tiles = (args.head_dim + kWidenChannels - 1) / kWidenChannels;
  int const first_channel = cta % channel_tiles * kWidenChannels;
  cta /= channel_tiles;
  int const first_key = cta % key_tiles * kWidenKeys;
  int const head_batch = cta / key_tiles;

  int const keys_pitch = (args.seqlen_k + 15) / 16 * 16;
  int const in_tile = threadIdx.x % kWidenChannels, channel = first_channel + in_tile;
  if (channel < args.head_dim) {
    float const scale = args.codes.v_scale[int64_t(head_batch) * args.head_dim + channel];
    float const mean =
        args.codes.v_mean ? args.codes.v_mean[int64_t(head_batch) * args.head_dim + channel] : 0.f;
    auto const* const from = static_cast<uint8_t const*>(args.codes.v) +
                             (int64_t(head_batch) * args.codes.v_channels + channel) * keys_pitch + first_key;
    for (int group = threadIdx.x / kWidenChannels; group < kWidenKeys / kKeyGroup;
         group += kWidenThreads / kWidenChannels) {
      if (first_key + group * kKeyGroup >= args.seqlen_k) break;
      uint4 const codes = *reinterpret_cast<uint4 const*>(from + group * kKeyGroup);
      uint32_t const in[4] = {codes.x, codes.y, codes.z, codes.w};
      CUTE_UNROLL
      for (int i = 0; i < 8; ++i) {
        float2 const x = unpack<DType::kFP16>(halves_of_e4m3(in[i / 2] >> 16 * (i % 2) & 0xffff));
        uint32_t const two = round_pair<Element>(fmaf(x.x, scale, mean), fmaf(x.y, scale, mean));
        uint16_t* const to = tile + group * kKeyGroup * kPitch + in_tile;
        to[key_at(2 * i) * kPitch] = static_cast<uint16_t>(two);
        to[key_at(2 * i + 1) * kPitch] = static_cast<uint16_t>(two >> 16);
      }
    }
  }
  __syncthreads();
  int const octet = threadIdx.x % (kWidenChannels / 8);
  if (first_channel + 8 * octet >= args.head_dim) return;
  for (int key = threadIdx.x / (kWidenChannels / 8); key < min(kWidenKeys, args.seqlen_k - first_key);
       key += kWidenThreads / (kWidenChannels / 8)) {
    uint16_t* const to = args.wide_v.row(head_batch / heads, head_batch % heads, first_key + key);
    *reinterpret_cast<uint4*>(to + first_channel + 8 * octet) =
        *reinterpret_cast<uint4 const*>(tile + key * kPitch + 8 * octet);
  }
}

// Q', K' and V in 16 bits.
template <class Traits>
__global__ void __launch_bounds__(kWidenThreads)
    widen(__grid_constant__ BackwardArguments const args, WidenGrid const grid, int batch, int heads_kv) {
  using Element = typename Traits::Element;
  int const cta = blockIdx.x;
  if (cta < grid.q)
    widen_rows<Element, true>(args, cta, batch, args.heads_q);
  else if (cta < grid.q + grid.k)
    widen_rows<Element, false>(args, cta - grid.q, batch, heads_kv);
  else
    widen_v<Element>(args, cta - grid.q - grid.k, heads_kv);
}

__device__ __forceinline__ void add_and_subtract(float& a, float& b) {
  float const sum = a + b;
  b = a - b, a = sum;
}

// Step at distance kDistance across the quad, whose lanes have neighbouring pairs of columns.
template <int kDistance, class Fragment>
__device__ __forceinline__ void mix_lanes(Fragment& x) {
  bool const second = threadIdx.x & kDistance;
  CUTE_UNROLL
  for (int i = 0; i < decltype(size(x))::value; ++i) {
    float const other = __shfl_xor_sync(~0u, x(i), kDistance);
    x(i) = second ? other - x(i) : x(i) + other;
  }
}

// Steps at distances of kDistance, 2 kDistance, ... octets, within blocks of `octets` in all.
// NOTE: by recursion, as nvcc unrolls no loop whose bounds another loop sets.
template <int kDistance, class Fragment>
__device__ __forceinline__ void mix_octets(Fragment& x, int octets) {
  constexpr int kPairs = decltype(size(x))::value / 8;
  if constexpr (kDistance <= kPairs) {
    CUTE_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) {
      int const first = pair / kDistance * 2 * kDistance + pair % kDistance;
      // The blocks of this size and above come first.
      if ((pair / kDistance + 1) * 2 * kDistance <= octets) {
        CUTE_UNROLL
        for (int i = 4 * first; i < 4 * first + 4; ++i) add_and_subtract(x(i), x(i + 4 * kDistance));
      }
    }
    mix_octets<2 * kDistance>(x, octets);
  }
}

// Rows of a gradient in a fragment of 64 x head dim, from the rotated basis to the tensor's own: Hadamard
// blocks, their norms, signs.
template <class Fragment>
__device__ __forceinline__ void rotate_back(Fragment& x, int head_dim, uint8_t const (&signs)[32]) {
  constexpr int kOctets = decltype(size(x))::value / 4;
  int const lane = threadIdx.x % 4;
  // Columns 8 octet + 2 lane + i: distance 1, then 2 and 4, then whole octets.
  CUTE_UNROLL
  for (int i = 0; i < 4 * kOctets; i += 2) add_and_subtract(x(i), x(i + 1));
  mix_lanes<1>(x);
  mix_lanes<2>(x);
  mix_octets<1>(x, head_dim / 8);
  CUTE_UNROLL
  for (int octet = 0; octet < kOctets; ++octet) {
    float const norm = hadamard_norm(hadamard_block(8 * octet, head_dim));
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      bool const negative = signs[octet] >> (2 * lane + i % 2) & 1;
      x(4 * octet + i) *= negative ? -norm : norm;
    }
  }
}

}  // namespace hopper_fa
