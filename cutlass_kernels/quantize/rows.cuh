// Q and K: smoothing, rotation, scale and rounding of rows, in registers from load to store.
//
// Roofline: 2 bytes read and 1 written an element. 16k tokens x 2048 channels: 101 MB, 25 us at 4 TB/s, for Q
// and again for K; scales of a head, group or tensor read everything twice: 42 us. Issue slots come close, so
// loads, arithmetic and stores of different CTAs must overlap; 64 registers keep 1024 threads on an SM. With
// mean, rotation and int8 at head dim 128 a thread issues about 860 instructions for its 32 elements (SASS):
// first addresses and loads 90, mean 120, signs 55, butterflies 190 and 64 shuffles, norm and maximum 64,
// scale 60, rounding and stores 170. That is 31 us at 1.75 GHz: issue binds there, memory without the
// rotation.
//
// A row belongs to 2, 4 or 8 threads (head dims 64, 128, 256) with 32 columns each: octets t, t + threads,
// ... Distances 1, 2, 4 of a butterfly are inside an octet, the next ones between threads, the last two
// between a thread's octets.
#pragma once

#include "quantize/layout.h"
#include "quantize/numerics.cuh"

namespace hopper_fa {

enum class ScaleOf : int { kRow, kTile, kGiven };

struct RowsArguments {
  uint16_t const* x;
  int64_t batch_stride, row_stride, head_stride;
  int seqlen, heads, head_dim;
  int tile_rows;        // rows a CTA
  QuantizeTiles tiles;  // all CTAs; tiles.blocks.divisor of them cover a sequence
  float const* mean;
  bool rotate;
  uint8_t signs[32];
  float const* other_mean;  // see QuantizeRowsParams
  float* dots;
  bool queries;
  Divisor q_heads_per_kv;
  int heads_kv;
  ScaleOf scale_of;
  bool collect;    // find amax and write nothing else
  uint32_t* amax;  // kGiven: (bits of the largest finite magnitude, whether some element is not)
  int amax_batch;  // its index is batch * amax_batch + head / heads_a_amax
  Divisor heads_a_amax;
  uint8_t* out;
  float* scale;
};

// A thread's 32 columns: x[j][i] is column 8 * (lane + kThreads * j) + i.
template <int kThreads>
struct RowPart {
  float x[4][8];
  int lane, head_dim;

  __device__ __forceinline__ int column(int j) const { return 8 * (lane + kThreads * j); }

  template <class F>
  __device__ __forceinline__ void for_each(F&& f) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 8; ++i) f(x[j][i]);
  }

  // This thread's first elements of a float32 vector of head_dim elements.
  __device__ __forceinline__ float4 const* start_of(float const* vector) const {
    return reinterpret_cast<float4 const*>(vector) + 2 * lane;
  }

  // Octet j of a vector that starts at `start`; 0 past head_dim.
  __device__ __forceinline__ void octet_of(float4 const* start, int j, float (&v)[8]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float4 w = make_float4(0, 0, 0, 0);
      if (column(j) < head_dim) w = __ldg(start + 2 * kThreads * j + i);
      v[4 * i] = w.x, v[4 * i + 1] = w.y, v[4 * i + 2] = w.z, v[4 * i + 3] = w.w;
    }
  }

  // The octets as they were loaded, minus a vector unless that is null.
  // NOTE: one octet at a time, so that the vector's elements are not all in registers beside the row's.
  template <DType kIn>
  __device__ __forceinline__ void unpack_less(uint4 const (&raw)[4], float const* vector) {
    float4 const* const start = start_of(vector);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t const words[4] = {raw[j].x, raw[j].y, raw[j].z, raw[j].w};
      float v[8];
      if (vector) octet_of(start, j, v);
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        float2 const pair = unpack<kIn>(words[i / 2]);
        x[j][i] = vector ? pair.x - v[i] : pair.x;
        x[j][i + 1] = vector ? pair.y - v[i + 1] : pair.y;
      }
    }
  }

  // Product of the whole row with a vector, in every thread of the row.
  __device__ __forceinline__ float dot(float const* vector) {
    float4 const* const start = start_of(vector);
    float sum = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float v[8];
      octet_of(start, j, v);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += x[j][i] * v[i];
    }
#pragma unroll
    for (int step = 1; step < kThreads; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return sum;
  }

  // kWhole: head_dim is one block, 32 * kThreads.
  template <bool kWhole>
  __device__ __forceinline__ void rotate(uint8_t const (&signs)[32]) {
    auto const block = [&](int j) { return kWhole ? 32 * kThreads : hadamard_block(column(j), head_dim); };
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t const bits = signs[column(j) / 8];
#pragma unroll
      for (int i = 0; i < 8; ++i) x[j][i] = bits >> i & 1 ? -x[j][i] : x[j][i];
#pragma unroll
      for (int distance = 1; distance < 8; distance *= 2)
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (!(i & distance)) butterfly(x[j][i], x[j][i + distance]);
    }
#pragma unroll
    for (int step = 1; step < kThreads; step *= 2) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        // a + b below, a - b above. NOTE: what has no partner adds -0, which changes no bit; a branch around
        // each addition made the compiler hold all shuffled values at once, and spill.
        bool const joined = 8 * step < block(j);
        float const own = joined && (lane & step) ? -1.f : 1.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float const other = __shfl_xor_sync(~0u, x[j][i], step);
          x[j][i] = fmaf(x[j][i], own, joined ? other : -0.f);
        }
      }
    }
#pragma unroll
    for (int step = 1; step < 4; step *= 2)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (!(j & step) && 8 * kThreads * step < block(j))
#pragma unroll
          for (int i = 0; i < 8; ++i) butterfly(x[j][i], x[j + step][i]);
    if constexpr (!kWhole || kThreads == 4) {  // else the norm is a power of two: see norm_left
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float const norm = hadamard_norm(block(j));
#pragma unroll
        for (int i = 0; i < 8; ++i) x[j][i] *= norm;
      }
    }
  }

  static __device__ __forceinline__ void butterfly(float& a, float& b) {
    float const sum = a + b;
    b = a - b;
    a = sum;
  }
};

template <DType kIn, DType kOut, int kThreads>
__global__ void __launch_bounds__(128 * kThreads, 8 / kThreads)
    quantize_rows_kernel(__grid_constant__ RowsArguments const args) {
  constexpr bool kInt8 = kOut == DType::kInt8;
  constexpr float kLimit = kInt8 ? kInt8Max : kE4M3Max;
  __shared__ uint32_t of_warps[32];
  wait_for_stream();
  // NOTE: last tile first: what an earlier pass over the tensor read last may still lie in L2.
  QuantizeTile const tile = args.tiles.get(gridDim.x - 1 - blockIdx.x);
  int const row_in_tile = threadIdx.x / kThreads;
  int const row = tile.block * args.tile_rows + row_in_tile;
  bool const exists = row < args.seqlen;
  int const head_batch = tile.batch * args.heads + tile.head;

  RowPart<kThreads> part;
  part.lane = threadIdx.x % kThreads;
  part.head_dim = args.head_dim;
  uint4 raw[4];
  {
    auto const x = reinterpret_cast<uint4 const*>(args.x + tile.batch * args.batch_stride +
                                                  tile.head * args.head_stride + row * args.row_stride) +
                   part.lane;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      raw[j] = make_uint4(0, 0, 0, 0);
      if (exists && part.column(j) < args.head_dim) raw[j] = __ldg(x + kThreads * j);
    }
  }

  bool const with_dots = args.other_mean && !args.collect;
  if (with_dots && args.queries) {
    int const other = tile.batch * args.heads_kv + args.q_heads_per_kv.quotient(tile.head);
    part.template unpack_less<kIn>(raw, nullptr);
    float const dot = part.dot(args.other_mean + static_cast<int64_t>(other) * args.head_dim);
    if (exists && part.lane == 0) args.dots[static_cast<int64_t>(head_batch) * args.seqlen + row] = dot;
  }
  if (args.mean)
    part.template unpack_less<kIn>(raw, args.mean + static_cast<int64_t>(head_batch) * args.head_dim);
  else
    part.template unpack_less<kIn>(raw, nullptr);
  if (with_dots && !args.queries) {
    int const group = args.q_heads_per_kv.divisor;
    for (int i = 0; i < group; ++i) {
      int64_t const other = static_cast<int64_t>(head_batch) * group + i;
      float const dot = part.dot(args.other_mean + other * args.head_dim);
      if (exists && part.lane == 0) args.dots[other * args.seqlen + row] = dot;
    }
  }
  if (args.rotate) {
    if (args.head_dim == 32 * kThreads)
      part.template rotate<true>(args.signs);
    else
      part.template rotate<false>(args.signs);
  }

  // NOTE: a factor that is a power of two changes no bit of a code, so it goes into the scale.
  bool const whole = args.head_dim == 32 * kThreads;
  float const norm_left = args.rotate && whole && kThreads != 4 ? hadamard_norm(32 * kThreads) : 1.f;

  // Largest finite magnitude of the thread's columns, and whether there is another kind.
  float largest = 0;
  part.for_each([&](float& x) { largest = max_nan(largest, fabsf(x)); });
  bool const broken = exists && !is_finite(largest);
  if (broken) {
    largest = 0;
    part.for_each([&](float& x) { largest = is_finite(x) ? fmaxf(largest, fabsf(x)) : largest; });
    // What is not finite becomes NaN in e4m3 and 0 in int8, which has the NaN in its scale.
    part.for_each([&](float& x) { x = is_finite(x) ? x : kInt8 ? 0.f : NAN; });
  }
  uint32_t amax =
      exists ? __float_as_uint(largest * norm_left) : 0;  // bits of floats >= 0 are ordered as the floats are
  bool group_broken;

  int64_t const index =
      static_cast<int64_t>(tile.batch) * args.amax_batch + args.heads_a_amax.quotient(tile.head);
  int const warp_lane = threadIdx.x % 32;
  if (args.scale_of == ScaleOf::kRow) {
    for (int step = 1; step < kThreads; step *= 2) amax = max(amax, __shfl_xor_sync(~0u, amax, step));
    uint32_t const of_row = (1u << kThreads) - 1;
    group_broken = __ballot_sync(~0u, broken) >> (warp_lane - part.lane) & of_row;
  } else if (args.scale_of == ScaleOf::kTile || args.collect) {
    amax = __reduce_max_sync(~0u, amax);
    if (warp_lane == 0) of_warps[threadIdx.x / 32] = amax;
    group_broken = __syncthreads_or(broken);
    amax = __reduce_max_sync(~0u, warp_lane < blockDim.x / 32 ? of_warps[warp_lane] : 0u);
    if (args.collect) {
      if (threadIdx.x == 0) {
        atomicMax(args.amax + 2 * index, amax);
        if (group_broken) atomicOr(args.amax + 2 * index + 1, 1u);
      }
      return;
    }
  } else {
    amax = args.amax[2 * index];
    group_broken = args.amax[2 * index + 1];
  }

  Scale const scale = scale_of(__uint_as_float(amax), kLimit);
  bool const writes_scale = args.scale_of == ScaleOf::kRow    ? exists && part.lane == 0
                            : args.scale_of == ScaleOf::kTile ? threadIdx.x == 0
                                                              : threadIdx.x == 0 && tile.block == 0;
  if (writes_scale) {
    int64_t const at = args.scale_of == ScaleOf::kRow ? static_cast<int64_t>(head_batch) * args.seqlen + row
                       : args.scale_of == ScaleOf::kTile
                           ? static_cast<int64_t>(head_batch) * args.tiles.blocks.divisor + tile.block
                           : head_batch;
    args.scale[at] = kInt8 && group_broken ? NAN : scale.scale;
  }

  int const pitch = (args.head_dim + 15) / 16 * 16;
  uint8_t* const out =
      args.out + ((static_cast<int64_t>(tile.batch) * args.seqlen + row) * args.heads + tile.head) * pitch;
  float const inverse = scale.inverse * norm_left;
  uint32_t codes[4][2];
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float y[4];
    // NOTE: not contracted with the addition that rounds to int8.
#pragma unroll
      for (int i = 0; i < 4; ++i) y[i] = __fmul_rn(part.x[j][4 * half + i], inverse);
      codes[j][half] = kInt8 ? to_int8(y[0], y[1], y[2], y[3]) : to_e4m3(y[0], y[1], y[2], y[3]);
    }
  if constexpr (kThreads >= 4) {  // octets of four threads are a sector of 32 bytes
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (exists && part.column(j) < pitch)
        __stcs(reinterpret_cast<uint2*>(out + part.column(j)), make_uint2(codes[j][0], codes[j][1]));
  } else {
    // Two threads swap octets: each ends with two that lie side by side, 16 bytes, twice.
    bool const odd = part.lane & 1;
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      uint32_t received[2];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        received[half] = __shfl_xor_sync(~0u, odd ? codes[j][half] : codes[j + 1][half], 1);
      int const column = 8 * ((part.lane & ~1) + kThreads * (j + odd));
      if (exists && column < pitch)
        __stcs(reinterpret_cast<uint4*>(out + column),
               odd ? make_uint4(received[0], received[1], codes[j + 1][0], codes[j + 1][1])
                   : make_uint4(codes[j][0], codes[j][1], received[0], received[1]));
    }
  }
}

}  // namespace hopper_fa
