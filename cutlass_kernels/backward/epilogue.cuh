// Gradients of 64 rows: registers to global memory.
#pragma once

#include "backward/codes.cuh"
#include "backward/traits.cuh"
#include "common/fragment.cuh"

namespace hopper_fa {

// Rows [first_row, first_row + 64) of one head, columns from first_column on: x * factor in 16 bits. Rows
// past seqlen and columns past head_dim are left out.
template <class Element, class Fragment>
__device__ __forceinline__ void store_rows(Strided const& to, int batch, int head, int first_row, int seqlen,
                                           int head_dim, Fragment const& x, float factor,
                                           int first_column = 0) {
  int const row = first_row + row_in_tile();
  uint16_t* const out = to.row(batch, head, row);
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r) {
    CUTE_UNROLL
    for (int octet = 0; octet < decltype(size(x))::value / 4; octet += 4) {
      uint32_t words[4];
      CUTE_UNROLL
      for (int j = 0; j < 4; ++j) {
        int const i = 4 * (octet + j) + 2 * r;
        words[j] = round_pair<Element>(x(i) * factor, x(i + 1) * factor);
      }
      quad_transpose(words);
      int const column = first_column + 8 * (octet + threadIdx.x % 4);
      if (row + 8 * r < seqlen && column < head_dim)
        *reinterpret_cast<uint4*>(out + 8 * r * to.row_stride + column) =
            make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

// dK (kOfK) or dV of 64 keys from first_key on, whose sum is x.
template <class Traits, bool kOfK, class Gradient>
__device__ __forceinline__ void store_key_gradient(BackwardArguments const& args,
                                                   typename Traits::SharedStorage const& shared,
                                                   int first_key, Gradient& x) {
  float factor = kOfK ? args.softmax_scale : 1.f;
  if constexpr (Traits::kQuantized && kOfK) {
    // NOTE: keys that no row sees have a gradient of 0, whatever their scale.
    factor = shared.tile.walk.count == 0 ? 0.f : 0.693147180559945309f / shared.key_factor;
    if (args.codes.rotated) rotate_back(x, args.head_dim, args.codes.signs);
  }
  store_rows<typename Traits::Element>(kOfK ? args.dk : args.dv, shared.tile.batch, shared.tile.head,
                                       first_key, args.seqlen_k, args.head_dim, x, factor);
}

}  // namespace hopper_fa
