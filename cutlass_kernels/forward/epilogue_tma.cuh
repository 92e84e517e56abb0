// Output of one warpgroup by TMA: registers to the place of the tile's Q in shared memory, from there to
// global memory.
#pragma once

#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "forward/epilogue.cuh"

namespace hopper_fa {

// As store_output. `staging` is the warpgroup's Q of that tile, which no product reads any more once all its
// warps are here; it is free again when lane 0 of each has seen cute::tma_store_wait<0>.
//
// Every warp stores its own 16 rows, so none waits for another to write. TMA leaves out rows past the
// sequence and columns past head_dim.
template <class Traits, class Output>
__device__ __forceinline__ void store_output_tma(typename Traits::Arguments const& args, Tile const& tile,
                                                 int first_row, Output const& output,
                                                 float const (&factor)[2], float const (&lse)[2],
                                                 typename Traits::Element* staging, int warpgroup) {
  using Element = typename Traits::Element;
  constexpr int kFirstId = 4;  // of the named barriers, after the batons'
  constexpr int kSlab = 64 * 64;
  int const lane = threadIdx.x % 32;
  int const warp_row = threadIdx.x % 128 / 32 * 16;
  Element* const rows = staging + warp_row * 64;
  asm volatile("bar.sync %0, 128;" ::"r"(kFirstId + warpgroup) : "memory");

  // Four 8 x 8 matrices at a time, two octets of columns by 16 rows. Lane i has the address of row i % 8 of
  // matrix i / 8; the octets of a row are swizzled as TMA's 128-byte swizzle wants them.
  CUTE_UNROLL
  for (int octet = 0; octet < Traits::kHeadDim / 8; octet += 2) {
    uint32_t words[4];
    CUTE_UNROLL
    for (int j = 0; j < 4; ++j) {
      int const r = j % 2, i = 4 * (octet + j / 2) + 2 * r;
      cutlass::Array<float, 2> pair;
      pair[0] = output(i) * factor[r], pair[1] = output(i + 1) * factor[r];
      words[j] = round_pair<typename Traits::Element>(pair);
    }
    int const swizzled = (octet % 8 + lane / 16) ^ (lane % 8);
    Element* const to = rows + octet / 8 * kSlab + lane % 16 * 64 + swizzled * 8;
    SM90_U32x4_STSM_N::copy(words[0], words[1], words[2], words[3], *reinterpret_cast<uint128_t*>(to));
  }
  tma_store_fence();
  __syncwarp();
  if (lane == 0) {
    CUTE_UNROLL
    for (int slab = 0; slab < Traits::kSlabs; ++slab)
      SM90_TMA_STORE_4D::copy(&args.out_map, rows + slab * kSlab, slab * 64, first_row + warp_row, tile.head,
                              tile.batch);
    tma_store_arrive();
  }
  OutputRows const to(args, tile, first_row);
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r)
    if (r < to.exist && lane % 4 == 0) to.lse[8 * r] = lse[r];
}

}  // namespace hopper_fa
