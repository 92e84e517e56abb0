// Q and K: rotation, smoothing, scale and rounding of rows, in registers from load to rounding.
//
// Roofline: 2 bytes read and 1 written an element. 16k tokens x 2048 channels: 101 MB, 25 us at 4 TB/s, for Q
// and again for K; scales of a head, group or tensor read everything twice: 42 us. A warp issues some 920
// instructions for its 2048 elements with rotation and int8 (128 columns; butterflies 192, codes 112, mean
// 80, maximum 64, signs and products 64): 16 us at 1.75 GHz. So memory binds as long as copies and arithmetic
// overlap: the next tile's rows are copied during this one's arithmetic.
//
// A warp has 2048 elements, a thread 64 of them: WarpRows.
#pragma once

#include "hopper_fa/quantize.h"
#include "quantize/rotate.cuh"

namespace hopper_fa {

enum class ScaleOf : int { kRow, kTile, kGiven, kNone };

struct RowsArguments {
  uint16_t const* x;
  int64_t batch_stride, row_stride, head_stride;
  int seqlen, heads, head_dim;
  int tile_rows;              // rows a CTA
  int head_tiles, cta_tiles;  // of a head in all batch entries; neighbours among them that a CTA takes
  QuantizeTiles tiles;        // all CTAs; tiles.blocks.divisor of them cover a sequence
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
  Overlap overlap;
};

constexpr int kRowsCta = 128;  // rows of the largest CTA

template <int kColumns>
struct RowsShared {
  static constexpr int kRows = WarpRows<kColumns>::kRows;
  static constexpr int kSlots = kColumns / 16;  // of 16 codes, in a row

  // NOTE: slots behind a row, so that threads of different rows meet different banks.
  struct Warp {
    uint4 raw[kRows][kColumns / 8 + 2];  // of the next tile, once this one's is in registers
    uint4 codes[kRows][kSlots + 1];
  };
  alignas(16) float mean[kColumns], other[kColumns], scratch[kColumns];
  alignas(16) uint32_t signs[kColumns / 2];
  uint32_t of_warps[2][32];
  Warp warps[kRowsCta / kRows];
};

// CTAs of kRowsCta rows that an SM shall hold.
constexpr int rows_min_ctas(int columns) { return columns == 64 ? 4 : columns == 128 ? 2 : 1; }

// Bytes of shared memory for a CTA of `rows` rows.
template <int kColumns>
constexpr int rows_shared_bytes(int rows) {
  using Shared = RowsShared<kColumns>;
  return sizeof(Shared) - (kRowsCta - rows) / Shared::kRows * sizeof(typename Shared::Warp);
}

// A warp's rows of a tile from global into shared memory; returns at once.
template <int kColumns, class Warp>
__device__ __forceinline__ void fetch_rows(RowsArguments const& args, QuantizeTile const& tile, int warp,
                                           Warp& to) {
  constexpr int kOctets = kColumns / 8, kRows = WarpRows<kColumns>::kRows;
  int const lane = threadIdx.x % 32, octet = lane % kOctets, first = lane / kOctets;
  int const row = tile.block * args.tile_rows + warp * kRows + first;
  uint16_t const* from = args.x + tile.batch * args.batch_stride + tile.head * args.head_stride +
                         row * args.row_stride + 8 * octet;
  int64_t const step = 32 / kOctets * args.row_stride;
  int const rows = 8 * octet < args.head_dim ? args.seqlen - row : 0;  // from this thread's first one on
#pragma unroll
  for (int r = 0; r < kRows; r += 32 / kOctets, from += step)
    copy_async(&to.raw[first + r][octet], from, r < rows);
}

// One tile, of which this warp's rows are on their way to own_shared.raw; then it becomes the next one, if
// there is one.
template <DType kIn, DType kOut, int kColumns>
__device__ __forceinline__ void round_tile(RowsArguments const& args, RowsShared<kColumns>& shared,
                                           typename RowsShared<kColumns>::Warp& own_shared,
                                           QuantizeTile& next, bool has_next, int parity, bool of_new_batch) {
  using Rows = WarpRows<kColumns>;
  constexpr int kOwn = Rows::kOwn, kGroups = Rows::kGroups;
  constexpr bool kInt8 = kOut == DType::kInt8;
  constexpr float kLimit = kInt8 ? kInt8Max : kE4M3Max;
  QuantizeTile const tile = next;
  int const head_batch = tile.batch * args.heads + tile.head;
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int const first_row = tile.block * args.tile_rows + warp * Rows::kRows;  // of the warp
  bool const whole = args.head_dim == kColumns;
  Rows rows;
  auto const row_of = [&](int own) { return first_row + rows.row + 8 * own; };
  auto const exists = [&](int own) { return row_of(own) < args.seqlen; };

  bool const with_dots = args.other_mean && !args.collect;
  auto const share = [&](float const* vectors, int64_t index, bool squared, float* to) {
    share_vector<kColumns>(vectors + index * args.head_dim, args.head_dim, args.rotate, args.signs, squared,
                           shared.scratch, to);
  };
  if (of_new_batch) {
    __syncthreads();
    if (args.mean) share(args.mean, head_batch, false, shared.mean);
    if (with_dots && args.queries) {
      __syncthreads();  // both use the scratch
      share(args.other_mean, tile.batch * args.heads_kv + args.q_heads_per_kv.quotient(tile.head), true,
            shared.other);
    }
    __syncthreads();
  }

  wait_for_copies();
  __syncwarp();
  uint2 raw[2][kGroups];
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int j = 0; j < kGroups; ++j)
      raw[h][j] = reinterpret_cast<uint2 const*>(
          own_shared.raw[rows.row + 8 * Rows::own(h, j)])[rows.column(h, j) / 4];
  __syncwarp();
  if (has_next) {
    next = tile.block > 0 ? QuantizeTile{tile.block - 1, tile.head, tile.batch}
                          : QuantizeTile{args.tiles.blocks.divisor - 1, tile.head, tile.batch - 1};
    fetch_rows<kColumns>(args, next, warp, own_shared);
  }

  if (args.rotate) {
    if (whole)
      rotate_rows<kIn, true>(rows, raw, shared.signs, args.head_dim);
    else
      rotate_rows<kIn, false>(rows, raw, shared.signs, args.head_dim);
  } else {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        float2 const low = unpack<kIn>(raw[h][j].x), high = unpack<kIn>(raw[h][j].y);
        float (&x)[4] = rows.x[h][j];
        x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
      }
  }

  // Products of the own rows with the vector in shared.other, the query head's `dot_head` of all.
  auto const write_dots = [&](int64_t dot_head) {
    float sum[kOwn] = {};
    rows.with_vector(shared.other, [&](float& x, float v, int own) { sum[own] += x * v; });
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      sum[own] += __shfl_xor_sync(~0u, sum[own], 1);
      sum[own] += __shfl_xor_sync(~0u, sum[own], 2);
      if (exists(own) && lane % 4 == 0) args.dots[dot_head * args.seqlen + row_of(own)] = sum[own];
    }
  };
  if (with_dots && args.queries) write_dots(head_batch);
  if (args.mean) rows.with_vector(shared.mean, [](float& x, float v, int) { x = x - v; });
  if (with_dots && !args.queries) {
    int const group = args.q_heads_per_kv.divisor;
    for (int i = 0; i < group; ++i) {
      int64_t const query_head = static_cast<int64_t>(head_batch) * group + i;
      __syncthreads();
      share(args.other_mean, query_head, true, shared.other);
      __syncthreads();
      write_dots(query_head);
    }
  }
  // The blocks' factors; that of a single block goes into the scale. Nothing past head_dim.
  bool const single = (args.head_dim & (args.head_dim - 1)) == 0;
  float const norm_left = args.rotate && single ? hadamard_norm(args.head_dim) : 1.f;
  if (!whole) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        int const column = rows.column(h, j);
        float const norm =
            args.rotate && !single ? hadamard_norm(hadamard_block(column, args.head_dim)) : 1.f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& x = rows.x[h][j][i];
          x = column < args.head_dim ? x * norm : 0.f;
        }
      }
  }

  // Largest finite magnitude of the own rows' columns, and whether there is another kind.
  uint32_t amax[kOwn];  // bits of floats >= 0 are ordered as the floats are
  bool broken[kOwn];
#pragma unroll
  for (int own = 0; own < kOwn; ++own) {
    float largest = 0;
    rows.for_row(own, [&](float& x) { largest = max_nan(largest, fabsf(x)); });
    broken[own] = exists(own) && !is_finite(largest);
    if (broken[own]) {
      largest = 0;
      rows.for_row(own, [&](float& x) { largest = is_finite(x) ? fmaxf(largest, fabsf(x)) : largest; });
      // What is not finite becomes NaN in e4m3 and 0 in int8, which has the NaN in its scale.
      rows.for_row(own, [&](float& x) { x = is_finite(x) ? x : kInt8 ? 0.f : NAN; });
    }
    amax[own] = exists(own) ? __float_as_uint(largest) : 0;
  }

  Scale scale[kOwn];
  auto const set_scale = [&](int own, bool writes, int64_t at) {
    scale[own] = scale_of(__uint_as_float(amax[own]), kLimit, norm_left);
    if (writes) args.scale[at] = kInt8 && broken[own] ? NAN : scale[own].scale;
  };
  if (args.scale_of == ScaleOf::kRow) {
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      amax[own] = max(amax[own], __shfl_xor_sync(~0u, amax[own], 1));
      amax[own] = max(amax[own], __shfl_xor_sync(~0u, amax[own], 2));
      broken[own] = __ballot_sync(~0u, broken[own]) >> (lane & ~3) & 0xf;
      set_scale(own, exists(own) && lane % 4 == 0,
                static_cast<int64_t>(head_batch) * args.seqlen + row_of(own));
    }
  } else if (args.scale_of == ScaleOf::kNone) {
#pragma unroll
    for (int own = 0; own < kOwn; ++own) scale[own] = {1.f, norm_left};
    if (threadIdx.x == 0 && tile.block == 0) args.scale[head_batch] = 1.f;
  } else {
#pragma unroll
    for (int own = 1; own < kOwn; ++own)
      amax[0] = max(amax[0], amax[own]), broken[0] = broken[0] || broken[own];
    bool const of_tile = args.scale_of == ScaleOf::kTile;
    uint32_t* const given =
        args.amax + 2 * (tile.batch * args.amax_batch + args.heads_a_amax.quotient(tile.head));
    if (of_tile || args.collect) {
      uint32_t const of_warp = __reduce_max_sync(~0u, amax[0]);
      if (lane == 0) shared.of_warps[parity][warp] = of_warp;
      broken[0] = __syncthreads_or(broken[0]);
      amax[0] = __reduce_max_sync(~0u, lane < blockDim.x / 32 ? shared.of_warps[parity][lane] : 0u);
      if (args.collect) {
        if (threadIdx.x == 0) {
          atomicMax(given, amax[0]);
          if (broken[0]) atomicOr(given + 1, 1u);
        }
        return;
      }
    } else {
      amax[0] = given[0], broken[0] = given[1];
    }
    set_scale(
        0, threadIdx.x == 0 && (of_tile || tile.block == 0),
        of_tile ? static_cast<int64_t>(head_batch) * args.tiles.blocks.divisor + tile.block : head_batch);
#pragma unroll
    for (int own = 1; own < kOwn; ++own) scale[own] = scale[0];
  }

#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      int const own = Rows::own(h, j);
      float const(&x)[4] = rows.x[h][j];
      uint32_t codes;
      if constexpr (kInt8) {
        codes = to_int8(x, scale[own].inverse);
      } else {
        float y[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) y[i] = x[i] * scale[own].inverse;
        codes = to_e4m3(y[0], y[1], y[2], y[3]);
      }
      int const slot = Rows::group(h, j);
      reinterpret_cast<uint32_t*>(&own_shared.codes[rows.row + 8 * own][slot])[lane % 4] = codes;
    }
  }
  __syncwarp();

  int const pitch = (args.head_dim + 15) / 16 * 16;
  constexpr int kSlots = RowsShared<kColumns>::kSlots, kStep = 32 / kSlots;  // rows at once
  int const row = lane / kSlots, slot = lane % kSlots;
  int64_t const out_row = static_cast<int64_t>(args.heads) * pitch;
  uint8_t* out = args.out + (static_cast<int64_t>(tile.batch) * args.seqlen + first_row + row) * out_row +
                 tile.head * pitch + 16 * slot;
  int const left = whole || 16 * slot < pitch ? args.seqlen - first_row - row : 0;
#pragma unroll
  for (int r = 0; r < Rows::kRows; r += kStep, out += kStep * out_row)
    if (r < left) __stcs(reinterpret_cast<uint4*>(out), own_shared.codes[row + r][slot]);
  __syncwarp();
}

// A persistent grid. CTA part * heads + head takes cta_tiles tiles of a head, so that its means stay.
template <DType kIn, DType kOut, int kColumns>
__global__ void __launch_bounds__(kRowsCta / WarpRows<kColumns>::kRows * 32, rows_min_ctas(kColumns))
    quantize_rows_kernel(__grid_constant__ RowsArguments const args) {
  extern __shared__ uint4 rows_shared[];
  auto& shared = reinterpret_cast<RowsShared<kColumns>&>(rows_shared);
  int const warp = threadIdx.x / 32;
  auto& own = shared.warps[warp];
  // NOTE: last tile first: what an earlier pass over the tensor read last may still lie in L2.
  int const part = args.tiles.heads.quotient(blockIdx.x), head = blockIdx.x - part * args.heads;
  int const first = part * args.cta_tiles;
  int const position = min_int(first + args.cta_tiles, args.head_tiles) - 1;  // at least first
  QuantizeTile tile = args.tiles.get(position * args.heads + head);
  wait_for_launches(args.overlap == Overlap::kNone);
  fetch_rows<kColumns>(args, tile, warp, own);
  wait_for_launches(args.overlap == Overlap::kLoads);
  let_next_begin();
  if (args.rotate && threadIdx.x < kColumns / 2) {
    uint32_t const two = args.signs[threadIdx.x / 4] >> (2 * threadIdx.x % 8);
    shared.signs[threadIdx.x] = (two & 1) << 15 | (two & 2) << 30;
  }
  for (int i = position; i >= first; --i)
    round_tile<kIn, kOut>(args, shared, own, tile, i > first, i & 1,
                          i == position || tile.block == args.tiles.blocks.divisor - 1);
  wait_for_launches(args.overlap == Overlap::kAll);
}

}  // namespace hopper_fa
