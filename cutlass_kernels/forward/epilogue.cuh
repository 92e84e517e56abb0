// Output of one warpgroup: registers to global memory, without a detour through shared memory.
#pragma once

#include "forward/traits.cuh"

namespace hopper_fa {

// 4 x 4 transpose across a quad: lane t passes word j to lane j and ends with word t of lanes 0, 1, 2, 3.
__device__ __forceinline__ void quad_transpose(uint32_t (&w)[4]) {
  bool const upper = threadIdx.x & 2, odd = threadIdx.x & 1;
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    uint32_t const received = __shfl_xor_sync(~0u, upper ? w[i] : w[i + 2], 2);
    (upper ? w[i] : w[i + 2]) = received;
  }
  CUTE_UNROLL
  for (int i = 0; i < 4; i += 2) {
    uint32_t const received = __shfl_xor_sync(~0u, odd ? w[i] : w[i + 1], 1);
    (odd ? w[i] : w[i + 1]) = received;
  }
}

// Where the rows of this thread go: row r and r + 8 of its warp's 16.
struct OutputRows {
  uint16_t* out;  // row r, column 0
  float* lse;
  int exist;  // 0, 1 or 2 of them are inside the sequence

  __device__ __forceinline__ OutputRows(ForwardArguments const& args, Tile const& tile, int first_row) {
    int const row = first_row + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
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
  float const *scale, *mean;  // of the head's column 0
  float const* lse_shift;     // of the first row; may be null

  __device__ __forceinline__ Dequantisation(ForwardArguments const& args, Tile const& tile, int first_row) {
    int const heads_kv = args.scheduler.heads_q / args.q_heads_per_kv;
    int64_t const head = int64_t(tile.batch) * heads_kv + tile.head / args.q_heads_per_kv;
    scale = args.fp8.v_scale + head * args.head_dim;
    mean = args.fp8.v_mean + head * args.head_dim;
    int64_t const q_head = int64_t(tile.batch) * args.scheduler.heads_q + tile.head;
    lse_shift = args.fp8.lse_shift ? args.fp8.lse_shift + q_head * args.seqlen_q + first_row : nullptr;
  }

  // Columns `column` and `column` + 1, both of them inside the head dim. weight: 0 for a row that saw no key.
  template <class Pair>
  __device__ __forceinline__ void apply(Pair& pair, int column, float weight) const {
    float2 const s = __ldg(reinterpret_cast<float2 const*>(scale + column));
    float2 const m = __ldg(reinterpret_cast<float2 const*>(mean + column));
    pair[0] = fmaf(pair[0], s.x, m.x * weight), pair[1] = fmaf(pair[1], s.y, m.y * weight);
  }
};

template <class Element>
__device__ __forceinline__ uint32_t round_pair(cutlass::Array<float, 2> const& pair) {
  cutlass::NumericArrayConverter<Element, float, 2> round;
  return reinterpret_cast<uint32_t const&>(static_cast<cutlass::Array<Element, 2> const&>(round(pair)));
}

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

// Rows [first_row, first_row + 64) of one head: out = output * factor in 16 bits, and their LSE.
template <class Traits, class Output>
__device__ __forceinline__ void store_output(ForwardArguments const& args, Tile const& tile, int first_row,
                                             Output const& output, float const (&factor)[2],
                                             float const (&lse)[2]) {
  OutputRows const rows(args, tile, first_row);
  Dequantisation const dequantisation(args, tile, first_row);
  int const in_quad = threadIdx.x % 4;
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r) {
    uint16_t* const out = rows.out + 8 * r * args.out_row_stride;
    // Four column octets at a time: each lane of the quad ends with one whole octet, 16 bytes.
    CUTE_UNROLL
    for (int octet = 0; octet < Traits::kHeadDim / 8; octet += 4) {
      uint32_t words[4];
      CUTE_UNROLL
      for (int j = 0; j < 4; ++j) {
        cutlass::Array<float, 2> pair;
        int const i = 4 * (octet + j) + 2 * r;
        pair[0] = output(i) * factor[r], pair[1] = output(i + 1) * factor[r];
        if constexpr (Traits::kFp8) {
          if (8 * (octet + j) < args.head_dim)
            dequantisation.apply(pair, 8 * (octet + j) + 2 * in_quad, lse[r] == -INFINITY ? 0.f : 1.f);
        }
        words[j] = round_output<Traits>(args, pair);
      }
      quad_transpose(words);
      int const column = 8 * (octet + in_quad);
      if (r < rows.exist && column < args.head_dim)
        *reinterpret_cast<uint4*>(out + column) = make_uint4(words[0], words[1], words[2], words[3]);
    }
    if (r < rows.exist && in_quad == 0) {
      rows.lse[8 * r] = lse[r];
      if constexpr (Traits::kFp8) {
        int const row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + 8 * r;
        if (dequantisation.lse_shift && lse[r] != -INFINITY)
          rows.lse[8 * r] = lse[r] + args.softmax_scale * __ldg(dequantisation.lse_shift + row);
      }
    }
  }
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
