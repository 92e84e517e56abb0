// Q and K: rotation, smoothing, scale and rounding of rows, in registers from load to rounding.
//
// Roofline: 2 bytes read and 1 written an element. 16k tokens x 2048 channels: 101 MB, 25 us at 4 TB/s, for Q
// and again for K; scales of a head, group or tensor read everything twice: 42 us. A warp issues some 920
// instructions for its 2048 elements with rotation and int8 (128 columns; butterflies 192, codes 112, mean
// 80, maximum 64, signs and products 64; of 256 columns a fourth step of butterflies): 16 us at 1.75 GHz. So
// memory binds as long as copies and arithmetic overlap: the next tile's rows are copied during this one's
// arithmetic, and an SM has CTAs that do not wait for each other.
//
// A warp has 2048 elements, a thread 64 of them: WarpRows.
#pragma once

#include "hopper_fa/quantize.h"
#include "quantize/dot_operand.cuh"
#include "quantize/rotate.cuh"
#include "quantize/tile_exchange.cuh"

namespace hopper_fa {

enum class ScaleOf : int { kRow, kTile, kGiven, kNone };

struct RowsArguments {
  uint16_t const* x;
  int64_t batch_stride, row_stride, head_stride;
  int seqlen, heads, head_dim;
  int tile_rows, cluster;     // rows of a tile, CTAs that share one
  int head_tiles, cta_tiles;  // of a head in all batch entries; neighbours among them that a cluster takes
  QuantizeTiles tiles;        // tiles.blocks.divisor cover a sequence
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

// Rows of the largest CTA. NOTE: of 256 columns two share a tile of 128 rows, so that those on an SM do not
// all wait for each other's maxima.
constexpr int rows_of_cta(int columns) { return columns == 256 ? 64 : 128; }

template <int kColumns>
struct RowsShared {
  static constexpr int kRows = WarpRows<kColumns>::kRows, kWarps = rows_of_cta(kColumns) / kRows;
  static constexpr int kSlots = kColumns / 16;  // of 16 codes, in a row

  struct alignas(128) Warp {
    uint4 raw[kRows][kColumns / 8];  // by row_slot; of the next tile, once this one's is in registers
    uint4 codes[kRows][kSlots + 1];  // NOTE: a slot behind a row, so that rows begin in different banks
  };
  alignas(16) float mean[kColumns], other[kColumns], scratch[kColumns];
  alignas(16) uint32_t signs[kColumns / 2];
  DotOperand<kColumns> dot;
  TileExchange maxima;  // a number: twice the maximum's bits, and 1 if broken
  Warp warps[kWarps];
};

// Largest CTAs that an SM shall hold.
constexpr int rows_min_ctas(int columns) { return columns == 64 ? 4 : 2; }

// Bytes of shared memory for a CTA of `rows` rows.
template <int kColumns>
constexpr int rows_shared_bytes(int rows) {
  using Shared = RowsShared<kColumns>;
  return sizeof(Shared) - (Shared::kWarps - rows / Shared::kRows) * sizeof(typename Shared::Warp);
}

// A warp's rows of a tile, from row own_rows of it on, from global into shared memory; returns at once.
template <int kColumns, class Warp>
__device__ __forceinline__ void fetch_rows(RowsArguments const& args, QuantizeTile const& tile, int own_rows,
                                           Warp& to) {
  constexpr int kOctets = kColumns / 8, kRows = WarpRows<kColumns>::kRows;
  int const lane = threadIdx.x % 32, octet = lane % kOctets, first = lane / kOctets;
  int const row = tile.block * args.tile_rows + own_rows + first;
  uint16_t const* from = args.x + tile.batch * args.batch_stride + tile.head * args.head_stride +
                         row * args.row_stride + 8 * octet;
  int64_t const step = 32 / kOctets * args.row_stride;
  int const rows = 8 * octet < args.head_dim ? args.seqlen - row : 0;  // from this thread's first one on
#pragma unroll
  for (int r = 0; r < kRows; r += 32 / kOctets, from += step)
    copy_async(&to.raw[first + r][row_slot(first + r, octet)], from, r < rows);
}

// One tile, of which this warp's rows are on their way to own_shared.raw; then it becomes the next one, if
// there is one. own_rows: the warp's first row in a tile. n: tiles before this one.
template <DType kIn, DType kOut, int kColumns>
__device__ __forceinline__ void round_tile(RowsArguments const& args, RowsShared<kColumns>& shared,
                                           typename RowsShared<kColumns>::Warp& own_shared, int own_rows,
                                           QuantizeTile& next, bool has_next, int n, bool of_new_batch) {
  using Rows = WarpRows<kColumns>;
  constexpr int kOwn = Rows::kOwn, kGroups = Rows::kGroups;
  constexpr bool kInt8 = kOut == DType::kInt8;
  constexpr float kLimit = kInt8 ? kInt8Max : kE4M3Max;
  QuantizeTile const tile = next;
  int const head_batch = tile.batch * args.heads + tile.head;
  int const lane = threadIdx.x % 32;
  int const first_row = tile.block * args.tile_rows + own_rows;  // of the warp
  bool const whole = args.head_dim == kColumns;
  // NOTE: for what depends on it if not whole: ptxas would compute that before the loop over tiles, and the
  // other paths would lack its registers.
  int head_dim = args.head_dim;
  asm volatile("" : "+r"(head_dim));
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
      int64_t const other = tile.batch * args.heads_kv + args.q_heads_per_kv.quotient(tile.head);
      shared.dot.template set<kIn>(args.other_mean + other * args.head_dim, args.head_dim);
    }
    __syncthreads();
  }

  wait_for_copies();
  __syncwarp();
  uint2 raw[2][kGroups];
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      // The slot of row_slot(rows.row, rows.column(h, j) / 8), its lines of 8 slots apart.
      int const group = Rows::group(h, j), in_line = row_slot(rows.row, 2 * (group % 4) + rows.quad / 8);
      uint4 const* const row = own_shared.raw[rows.row + 8 * Rows::own(h, j)];
      raw[h][j] = reinterpret_cast<uint2 const*>(row + in_line)[16 * (group / 4) + rows.quad / 4 % 2];
    }
  __syncwarp();
  if (has_next) {
    next = tile.block > 0 ? QuantizeTile{tile.block - 1, tile.head, tile.batch}
                          : QuantizeTile{args.tiles.blocks.divisor - 1, tile.head, tile.batch - 1};
    fetch_rows<kColumns>(args, next, own_rows, own_shared);
  }

  // Products of the own rows with another vector, the query head's `dot_head` of all; of all lanes of a quad.
  auto const write_dots = [&](float const(&dots)[kOwn], int64_t dot_head) {
#pragma unroll
    for (int own = 0; own < kOwn; ++own)
      if (exists(own) && lane % 4 == 0) args.dots[dot_head * args.seqlen + row_of(own)] = dots[own];
  };
  if (with_dots && args.queries) {
    float dots[kOwn];
    shared.dot.template multiply<kIn>(raw, dots);
    write_dots(dots, head_batch);
  }

  if (args.rotate) {
    if (whole)
      rotate_rows<kIn, true>(rows, raw, shared.signs, kColumns);
    else
      rotate_rows<kIn, false>(rows, raw, shared.signs, head_dim);
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

  if (args.mean) rows.with_vector(shared.mean, [](float& x, float v, int) { x = x - v; });
  if (with_dots && !args.queries) {
    int const group = args.q_heads_per_kv.divisor;
    for (int i = 0; i < group; ++i) {
      int64_t const query_head = static_cast<int64_t>(head_batch) * group + i;
      __syncthreads();
      share(args.other_mean, query_head, true, shared.other);
      __syncthreads();
      float dots[kOwn] = {};
      rows.with_vector(shared.other, [&](float& x, float v, int own) { dots[own] += x * v; });
#pragma unroll
      for (int own = 0; own < kOwn; ++own) dots[own] = quad_sum(dots[own]);
      write_dots(dots, query_head);
    }
  }
  // The blocks' factors; that of a single block goes into the scale. Nothing past head_dim.
  bool const single = whole || (head_dim & (head_dim - 1)) == 0;
  float const norm_left = !args.rotate ? 1.f
                          : whole      ? hadamard_norm(kColumns)
                          : single     ? hadamard_norm(head_dim)
                                       : 1.f;
  if (!whole) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        int const column = rows.column(h, j);
        float const norm = args.rotate && !single ? hadamard_norm(hadamard_block(column, head_dim)) : 1.f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& x = rows.x[h][j][i];
          x = column < head_dim ? x * norm : 0.f;
        }
      }
  }

  // Largest finite magnitude of the own rows' columns, and whether there is another kind.
  uint32_t amax[kOwn];  // bits of floats >= 0 are ordered as the floats are
  bool broken[kOwn];
#pragma unroll
  for (int own = 0; own < kOwn; ++own) {
    float halves[2] = {};  // NOTE: one chain of maxima would wait for itself
    int count = 0;
    rows.for_row(own, [&](float& x) { halves[count % 2] = max_nan(halves[count % 2], fabsf(x)), ++count; });
    float largest = max_nan(halves[0], halves[1]);
    broken[own] = exists(own) && !is_finite(largest);
    if (broken[own]) {
      largest = 0;
      rows.for_row(own, [&](float& x) { largest = is_finite(x) ? fmaxf(largest, fabsf(x)) : largest; });
      // What is not finite becomes NaN in e4m3 and 0 in int8, which has the NaN in its scale.
      rows.for_row(own, [&](float& x) { x = is_finite(x) ? x : kInt8 ? 0.f : NAN; });
    }
    amax[own] = exists(own) ? __float_as_uint(largest) : 0;
  }

  float inverse[kOwn];
  auto const set_scale = [&](int own, bool writes, int64_t at) {
    float const largest = __uint_as_float(amax[own]);
    inverse[own] = inverse_scale_of(largest, kLimit);
    if (writes) args.scale[at] = kInt8 && broken[own] ? NAN : scale_of(largest, kLimit, norm_left);
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
    for (int own = 0; own < kOwn; ++own) inverse[own] = norm_left;
    if (own_rows == 0 && lane == 0 && tile.block == 0) args.scale[head_batch] = 1.f;
  } else {
#pragma unroll
    for (int own = 1; own < kOwn; ++own)
      amax[0] = max(amax[0], amax[own]), broken[0] = broken[0] || broken[own];
    if (args.scale_of == ScaleOf::kTile || args.collect) {
      bool const broken_warp = __any_sync(~0u, broken[0]);
      uint32_t const of_warp = 2 * __reduce_max_sync(~0u, amax[0]) + broken_warp;
      uint32_t const of_lane = shared.maxima.exchange(of_warp, own_rows / Rows::kRows,
                                                      args.tile_rows / Rows::kRows, args.cluster, n);
      broken[0] = __any_sync(~0u, of_lane & 1);
      amax[0] = __reduce_max_sync(~0u, of_lane) / 2;
    }
    bool const writes = own_rows == 0 && lane == 0;  // one thread of a tile
    if (args.scale_of == ScaleOf::kTile) {
      set_scale(0, writes, static_cast<int64_t>(head_batch) * args.tiles.blocks.divisor + tile.block);
    } else {
      uint32_t* const given =
          args.amax + 2 * (tile.batch * args.amax_batch + args.heads_a_amax.quotient(tile.head));
      if (args.collect) {
        if (writes) {
          atomicMax(given, amax[0]);
          if (broken[0]) atomicOr(given + 1, 1u);
        }
        return;
      }
      amax[0] = given[0], broken[0] = given[1];
      set_scale(0, writes && tile.block == 0, head_batch);
    }
#pragma unroll
    for (int own = 1; own < kOwn; ++own) inverse[own] = inverse[0];
  }

#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      int const own = Rows::own(h, j);
      float const(&x)[4] = rows.x[h][j];
      uint32_t codes;
      if constexpr (kInt8) {
        codes = to_int8(x, inverse[own]);
      } else {
        float y[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) y[i] = x[i] * inverse[own];
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

// A persistent grid. Cluster part * heads + head takes cta_tiles tiles of a head, so that its means stay.
template <DType kIn, DType kOut, int kColumns>
__global__ void __launch_bounds__(RowsShared<kColumns>::kWarps * 32, rows_min_ctas(kColumns))
    quantize_rows_kernel(__grid_constant__ RowsArguments const args) {
  extern __shared__ __align__(128) uint4 rows_shared[];
  auto& shared = reinterpret_cast<RowsShared<kColumns>&>(rows_shared);
  int const warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // uniform
  auto& own = shared.warps[warp];
  // NOTE: last tile first: what an earlier pass over the tensor read last may still lie in L2.
  int const cluster = blockIdx.x / args.cluster, rank = blockIdx.x - cluster * args.cluster;
  int const part = args.tiles.heads.quotient(cluster), head = cluster - part * args.heads;
  int const first = part * args.cta_tiles;
  int const position = first + min_int(args.cta_tiles, args.head_tiles - first) - 1;
  QuantizeTile tile = args.tiles.at(position, head);
  int const own_rows = rank * rows_of_cta(kColumns) + warp * WarpRows<kColumns>::kRows;
  shared.maxima.start(args.cluster);
  wait_for_launches(args.overlap == Overlap::kNone);
  fetch_rows<kColumns>(args, tile, own_rows, own);
  wait_for_launches(args.overlap == Overlap::kLoads);
  let_next_begin();
  if (args.rotate && threadIdx.x < kColumns / 2) {
    uint32_t const two = args.signs[threadIdx.x / 4] >> (2 * threadIdx.x % 8);
    shared.signs[threadIdx.x] = (two & 1) << 15 | (two & 2) << 30;
  }
  shared.maxima.wait_for_start(args.cluster);
  for (int i = position; i >= first; --i)
    round_tile<kIn, kOut>(args, shared, own, own_rows, tile, i > first, position - i,
                          i == position || tile.block == args.tiles.blocks.divisor - 1);
  wait_for_launches(args.overlap == Overlap::kAll);
}

}  // namespace hopper_fa
