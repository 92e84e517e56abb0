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

  __device__ __forceinline__ OutputRows(ForwardArguments const& args, Tile const& tile, int first_row) {
    int const row = first_row + row_in_tile();
    out = static_cast<uint16_t*>(args.out) + tile.batch * args.out_batch_stride +
          tile.head * args.out_head_stride + row * args.out_row_stride;
    lse = args.lse + static_cast<int64_t>(tile.batch * args.scheduler.heads_q + tile.head) * args.seqlen_q +
          row;
    exist = (row < args.seqlen_q) + (row + 8 < args.seqlen_q);
  }
};

// 8-bit inputs: the affine map that takes a column of sum(P V) / sum(P) back to what V was before
// quantisation.
struct Dequantisation {
  float const *scale, *mean;  // of the head's first column for this thread
  int head_dim;
  float lse_shift[2] = {0, 0};  // of this thread's rows, times softmax_scale

  // Two columns of this thread in each of four octets.
  struct Columns {
    float2 scale[4], mean[4];
  };

  __device__ __forceinline__ Dequantisation(ForwardArguments const& args, Tile const& tile, int first_row,
                                            int rows_exist)
      : head_dim(args.head_dim) {
    int const heads_kv = args.scheduler.heads_q / args.q_heads_per_kv;
    int const head = tile.batch * heads_kv + tile.head / args.q_heads_per_kv;
    int64_t const column = int64_t(head) * head_dim + threadIdx.x % 4 * 2;
    scale = args.fp8.v_scale + column;
    mean = args.fp8.v_mean + column;
    if (args.fp8.lse_shift) {
      int64_t const q_head = int64_t(tile.batch) * args.scheduler.heads_q + tile.head;
      float const* const shift = args.fp8.lse_shift + q_head * args.seqlen_q + first_row + row_in_tile();
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r)
        if (r < rows_exist) lse_shift[r] = args.softmax_scale * __ldg(shift + 8 * r);
    }
  }

  // NOTE: octets beyond the head dim load its last one and are not stored: without a branch the loads are in
  // flight together, which is what the epilogue's time hangs on.
  __device__ __forceinline__ Columns load(int octet) const {
    Columns columns;
    CUTE_UNROLL
    for (int j = 0; j < 4; ++j) {
      int const column = min(8 * (octet + j), head_dim - 8);
      columns.scale[j] = __ldg(reinterpret_cast<float2 const*>(scale + column));
      columns.mean[j] = __ldg(reinterpret_cast<float2 const*>(mean + column));
    }
    return columns;
  }
};

// Two columns in the output's dtype. 8 bit: a run-time choice here, which costs two instructions, because one
// around store_output would double its code.
template <class Traits>
__device__ __forceinline__ uint32_t round_output(ForwardArguments const& args,
                                                 cutlass::Array<float, 2> const& pair) {
  if constexpr (Traits::kFp8) {
    uint32_t const fp16 = round_pair<cutlass::half_t>(pair), bf16 = round_pair<cutlass::bfloat16_t>(pair);
    return args.fp8.out_dtype == DType::kFP16 ? fp16 : bf16;
  } else {
    return round_pair<typename Traits::Element>(pair);
  }
}

// Four column octets of row r, each lane of the quad one whole octet, 16 bytes: columns(octet's number among
// the four) are this thread's two of it.
template <class Traits, class Columns>
__device__ __forceinline__ void store_octets(ForwardArguments const& args, OutputRows const& rows, int r,
                                             int octet, Columns columns) {
  uint32_t words[4];
  CUTE_UNROLL
  for (int j = 0; j < 4; ++j) words[j] = round_output<Traits>(args, columns(j));
  quad_transpose(words);
  int const column = 8 * (octet + threadIdx.x % 4);
  if (r < rows.exist && column < args.head_dim)
    *reinterpret_cast<uint4*>(rows.out + 8 * r * args.out_row_stride + column) =
        make_uint4(words[0], words[1], words[2], words[3]);
}

// Rows [first_row, first_row + 64) of one head: out = output * factor in 16 bits, and their LSE.
template <class Traits, class Output>
__device__ __forceinline__ void store_output(ForwardArguments const& args, Tile const& tile, int first_row,
                                             Output const& output, float const (&factor)[2],
                                             float const (&lse)[2]) {
  OutputRows const rows(args, tile, first_row);
  constexpr int kOctets = Traits::kHeadDim / 8;
  float shift[2] = {0, 0};
  if constexpr (Traits::kFp8) {
    Dequantisation const dequantisation(args, tile, first_row, rows.exist);
    typename Dequantisation::Columns next = dequantisation.load(0);
    CUTE_UNROLL
    for (int octet = 0; octet < kOctets; octet += 4) {
      auto const columns = next;
      if (octet + 4 < kOctets) next = dequantisation.load(octet + 4);
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        float const weight = lse[r] == -INFINITY ? 0.f : 1.f;  // of a row that saw no key: 0
        store_octets<Traits>(args, rows, r, octet, [&](int j) {
          cutlass::Array<float, 2> pair;
          int const i = 4 * (octet + j) + 2 * r;
          pair[0] = fmaf(output(i) * factor[r], columns.scale[j].x, columns.mean[j].x * weight);
          pair[1] = fmaf(output(i + 1) * factor[r], columns.scale[j].y, columns.mean[j].y * weight);
          return pair;
        });
      }
    }
    shift[0] = dequantisation.lse_shift[0], shift[1] = dequantisation.lse_shift[1];
  } else {
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      CUTE_UNROLL
      for (int octet = 0; octet < kOctets; octet += 4)
        store_octets<Traits>(args, rows, r, octet, [&](int j) {
          cutlass::Array<float, 2> pair;
          int const i = 4 * (octet + j) + 2 * r;
          pair[0] = output(i) * factor[r], pair[1] = output(i + 1) * factor[r];
          return pair;
        });
    }
  }
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r)
    if (r < rows.exist && threadIdx.x % 4 == 0) rows.lse[8 * r] = Traits::kFp8 ? lse[r] + shift[r] : lse[r];
}

// The same for rows that see no key: zeros and -inf.
template <class Traits>
__device__ __forceinline__ void store_empty(ForwardArguments const& args, Tile const& tile, int first_row) {
  OutputRows const rows(args, tile, first_row);
  int const in_quad = threadIdx.x % 4;
  for (int r = 0; r < rows.exist; ++r) {
    for (int column = 8 * in_quad; column < args.head_dim; column += 32)
      *reinterpret_cast<uint4*>(rows.out + 8 * r * args.out_row_stride + column) = make_uint4(0, 0, 0, 0);
    if (in_quad == 0) rows.lse[8 * r] = -INFINITY;
  }
}

}  // namespace hopper_fa
