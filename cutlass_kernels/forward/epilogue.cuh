// Output of one warpgroup: registers to global memory, without a detour through shared memory.
#pragma once

#include "common/fragment.cuh"
#include "forward/traits.cuh"

namespace hopper_fa {

// Where the rows of this thread go: row r and r + 8 of its warp's 16.
struct OutputRows {
  uint16_t* out;  // row r, column 0
  float* lse;
  int exist;  // 0, 1 or 2 of them are inside the sequence

  __device__ __forceinline__ OutputRows(ForwardArguments const& args, WarpgroupTile const& tile,
                                        int in_tile = row_in_tile()) {
    int const row = tile.row + in_tile;
    out = static_cast<uint16_t*>(args.out) + tile.batch * args.out_batch_stride +
          tile.head * args.out_head_stride + row * args.out_row_stride;
    lse = args.lse + static_cast<int64_t>(tile.batch * args.scheduler.heads_q + tile.head) * args.seqlen_q +
          row;
    exist = (row < args.seqlen_q) + (row + 8 < args.seqlen_q);
  }
};

// Four column octets of row r, each lane of the quad one whole octet, 16 bytes: columns(octet's number among
// the four) are this thread's two of it.
template <class Traits, class Columns>
__device__ __forceinline__ void store_octets(ForwardArguments const& args, OutputRows const& rows, int r,
                                             int octet, Columns columns) {
  uint32_t words[4];
  CUTE_UNROLL
  for (int j = 0; j < 4; ++j) words[j] = round_pair<typename Traits::Element>(columns(j));
  quad_transpose(words);
  int const column = 8 * (octet + threadIdx.x % 4);
  if (r < rows.exist && column < args.head_dim)
    *reinterpret_cast<uint4*>(rows.out + 8 * r * args.out_row_stride + column) =
        make_uint4(words[0], words[1], words[2], words[3]);
}

// A warpgroup's 64 rows of one head: out = output * factor in 16 bits, and their LSE.
template <class Traits, class Output>
__device__ __forceinline__ void store_output(ForwardArguments const& args, WarpgroupTile const& tile,
                                             Output const& output, float const (&factor)[2],
                                             float const (&lse)[2]) {
  OutputRows const rows(args, tile);
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r) {
    CUTE_UNROLL
    for (int octet = 0; octet < Traits::kHeadDim / 8; octet += 4)
      store_octets<Traits>(args, rows, r, octet, [&](int j) {
        cutlass::Array<float, 2> pair;
        int const i = 4 * (octet + j) + 2 * r;
        pair[0] = output(i) * factor[r], pair[1] = output(i + 1) * factor[r];
        return pair;
      });
    if (r < rows.exist && threadIdx.x % 4 == 0) rows.lse[8 * r] = lse[r];
  }
}

// 8 bit: what smoothing K took out of every score of a thread's two rows, before softmax_scale.
struct LseShift {
  float of_row[2] = {0, 0};

  // NOTE: to be loaded early and used last.
  __device__ __forceinline__ LseShift(ForwardArguments const& args, OutputRows const& rows) {
    if (!args.fp8.lse_shift) return;
    float const* const first = args.fp8.lse_shift + (rows.lse - args.lse);
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r)
      if (r < rows.exist) asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(of_row[r]) : "l"(first + 8 * r));
  }
};

// Two neighbouring floats of shared memory.
__device__ __forceinline__ float2 load_shared_pair(uint32_t address) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(address));
  return pair;
}

// V's scales and means in a thread's columns of kCount octets. columns: address of its first two scales.
template <int kHeadDim, int kCount>
__device__ __forceinline__ void load_affine(uint32_t columns, int octet, float2 (&scale)[kCount],
                                            float2 (&mean)[kCount]) {
  CUTE_UNROLL
  for (int j = 0; j < kCount; ++j) {
    scale[j] = load_shared_pair(columns + 32 * (octet + j));
    mean[j] = load_shared_pair(columns + 32 * (octet + j) + 4 * kHeadDim);
  }
}

// As store_output, for 8-bit inputs: out = output * factor * affine[0] + affine[1], which takes a column back
// to what V was before quantisation.
template <class Traits, class Out, class Output>
__device__ __forceinline__ void store_dequantised(ForwardArguments const& args, WarpgroupTile const& tile,
                                                  Output const& output, float const (&factor)[2],
                                                  float const (&lse)[2],
                                                  float const (&affine)[2][Traits::kHeadDim]) {
  OutputRows const rows(args, tile, fresh_row_in_tile());
  LseShift const shift(args, rows);
  int const lane = threadIdx.x % 4;
  uint32_t const columns = cast_smem_ptr_to_uint(&affine[0][0]) + 8 * lane;
  float2 scale[4], mean[4];
  auto const load = [&](int octet) { load_affine<Traits::kHeadDim>(columns, octet, scale, mean); };
  // NOTE: where registers allow it, the next columns' scales before the exchanges, whose latency hides
  // theirs, and both rows' exchanges at once: at d256 and 512 keys a quarter of a tile's time is spent here.
  constexpr int kRows = Traits::kHeadDim == 256 && Traits::kTile.pv_parts > 0 ? 1 : 2;
  if constexpr (kRows == 2) load(0);
  CUTE_UNROLL
  for (int octet = 0; octet < Traits::kHeadDim / 8; octet += 4) {
    if constexpr (kRows == 1) load(octet);
    CUTE_UNROLL
    for (int first = 0; first < 2; first += kRows) {
      uint32_t words[kRows][4];
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        CUTE_UNROLL
        for (int j = 0; j < 4; ++j) {
          int const i = 4 * (octet + j) + 2 * (first + r);
          words[r][j] = round_pair<Out>(fmaf(output(i) * factor[first + r], scale[j].x, mean[j].x),
                                        fmaf(output(i + 1) * factor[first + r], scale[j].y, mean[j].y));
        }
      }
      if (kRows == 2 && octet + 4 < Traits::kHeadDim / 8) load(octet + 4);
      quad_transpose(words);
      int const column = 8 * (octet + lane);
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r)
        if (first + r < rows.exist && column < args.head_dim)
          *reinterpret_cast<uint4*>(rows.out + 8 * (first + r) * args.out_row_stride + column) =
              make_uint4(words[r][0], words[r][1], words[r][2], words[r][3]);
    }
  }
  for (int r = 0; r < rows.exist; ++r) {
    // A row that saw no key: so far V's mean.
    if (lse[r] == -INFINITY)
      for (int column = 8 * lane; column < args.head_dim; column += 32)
        *reinterpret_cast<uint4*>(rows.out + 8 * r * args.out_row_stride + column) = make_uint4(0, 0, 0, 0);
    if (lane == 0) rows.lse[8 * r] = lse[r] + args.softmax_scale * shift.of_row[r];
  }
}

// The same for rows that see no key: zeros and -inf.
template <class Traits>
__device__ __forceinline__ void store_empty(ForwardArguments const& args, WarpgroupTile const& tile) {
  OutputRows const rows(args, tile);
  int const in_quad = threadIdx.x % 4;
  for (int r = 0; r < rows.exist; ++r) {
    for (int column = 8 * in_quad; column < args.head_dim; column += 32)
      *reinterpret_cast<uint4*>(rows.out + 8 * r * args.out_row_stride + column) = make_uint4(0, 0, 0, 0);
    if (in_quad == 0) rows.lse[8 * r] = -INFINITY;
  }
}

}  // namespace hopper_fa
