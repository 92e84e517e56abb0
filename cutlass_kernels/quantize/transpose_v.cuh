// V that is e4m3 already, in the layout that the second product reads: transposed, keys permuted in groups of
// 16, a row of ones below the channels.
//
// Roofline: a byte read and one written an element. 16k tokens x 2048 channels: 67 MB, 17 us at 4 TB/s.
//
// A thread transposes 16 keys of 8 channels in registers: the keys of a 16-byte store are a group, so that
// the permutation is the choice of the register a byte comes from. Shared memory only gathers a channel's
// groups into lines.
#pragma once

#include "hopper_fa/types.h"
#include "quantize/layout.h"
#include "quantize/numerics.cuh"

namespace hopper_fa {

struct TransposeVArguments {
  uint8_t const* v;
  int64_t batch_stride, row_stride, head_stride;
  int seqlen, heads, head_dim;
  int groups;  // key groups a CTA
  QuantizeTiles tiles;
  uint8_t* out;
};

// Byte c of each of four words: the e4m3 codes of keys a, b, c, d for channel c.
__device__ __forceinline__ void transpose_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d,
                                                uint32_t (&of_channel)[4]) {
  uint32_t const low_ab = __byte_perm(a, b, 0x5140), high_ab = __byte_perm(a, b, 0x7362);
  uint32_t const low_cd = __byte_perm(c, d, 0x5140), high_cd = __byte_perm(c, d, 0x7362);
  of_channel[0] = __byte_perm(low_ab, low_cd, 0x5410), of_channel[1] = __byte_perm(low_ab, low_cd, 0x7632);
  of_channel[2] = __byte_perm(high_ab, high_cd, 0x5410),
  of_channel[3] = __byte_perm(high_ab, high_cd, 0x7632);
}

// kIn: e4m3, whose translation unit the kernel is in.
template <DType kIn>
__global__ void __launch_bounds__(256) transpose_v_kernel(__grid_constant__ TransposeVArguments const args) {
  extern __shared__ uint4 staged[];  // v_slot(channel, group)
  let_next_begin();
  QuantizeTile const tile = args.tiles.get(blockIdx.x);
  int const head_batch = tile.batch * args.heads + tile.head;
  int const tile_key = tile.block * args.groups * kKeyGroup;

  // Thread (group of 16 keys, octet of channels); the last warp may hold threads of no group.
  int const octets = args.head_dim / 8;
  int const group = threadIdx.x / octets, octet = threadIdx.x - group * octets;
  bool const works = group < args.groups;
  int const key = tile_key + group * kKeyGroup;
  int const keys = works ? args.seqlen - key : 0;  // of 16 that exist; may be negative, or more than 16
  uint2 raw[kKeyGroup];
  int64_t const first = tile.batch * args.batch_stride + tile.head * args.head_stride + 8 * octet;
#pragma unroll
  for (int i = 0; i < kKeyGroup; ++i) {
    raw[i] = make_uint2(0, 0);
    if (i < keys)
      raw[i] = __ldg(reinterpret_cast<uint2 const*>(args.v + first + (key + i) * args.row_stride));
  }
  if (works) {
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      uint32_t words[4][4];  // (t, channel)
      auto const word = [&](int position) { return w ? raw[key_at(position)].y : raw[key_at(position)].x; };
#pragma unroll
      for (int t = 0; t < 4; ++t)
        transpose_bytes(word(4 * t), word(4 * t + 1), word(4 * t + 2), word(4 * t + 3), words[t]);
#pragma unroll
      for (int c = 0; c < 4; ++c)  // keys that do not exist were loaded as zeros
        staged[v_slot(8 * octet + 4 * w + c, group, args.groups)] =
            make_uint4(words[0][c], words[1][c], words[2][c], words[3][c]);
    }
  }
  __syncthreads();

  int const keys_pitch = ceil_div(args.seqlen, kKeyGroup) * kKeyGroup;
  int const tile_d = tile_columns(args.head_dim), rows = tile_d + 1;
  for (int i = threadIdx.x; i < rows * args.groups; i += blockDim.x) {
    int const r = i / args.groups, g = i - r * args.groups;
    int const key = tile_key + g * kKeyGroup;
    if (key >= args.seqlen) continue;
    uint4 codes = make_uint4(0, 0, 0, 0);
    if (r < args.head_dim) {
      codes = staged[v_slot(r, g, args.groups)];
    } else if (r == tile_d) {
      codes = ones_of(args.seqlen - key);
    }
    *reinterpret_cast<uint4*>(args.out + (static_cast<int64_t>(head_batch) * rows + r) * keys_pitch + key) =
        codes;
  }
}

}  // namespace hopper_fa
