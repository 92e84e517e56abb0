// Output of one warpgroup by TMA: registers to the place of the tile's Q in shared memory, from there to
// global memory.
#pragma once

#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "forward/epilogue.cuh"

namespace hopper_fa {

// All of a warpgroup's warps are done with what lies in the staging.
__device__ __forceinline__ void wait_staging(int warpgroup) {
  constexpr int kFirstId = 5;  // of the named barriers, after the batons' four
  asm volatile("bar.sync %0, 128;" ::"r"(kFirstId + warpgroup) : "memory");
}

// Four 8 x 8 matrices of 16 bits, octets `octet` and the next by 16 rows, into rows of 64 columns. Lane i has
// the address of row i % 8 of matrix i / 8; the octets of a row are swizzled as TMA's 128-byte swizzle wants
// them.
__device__ __forceinline__ void store_matrices(uint32_t const (&words)[4], uint8_t* rows, int lane,
                                               int octet) {
  int const swizzled = (octet + lane / 16) ^ (lane % 8);
  SM90_U32x4_STSM_N::copy(words[0], words[1], words[2], words[3],
                          *reinterpret_cast<uint128_t*>(rows + lane % 16 * 128 + swizzled * 16));
}

// As store_output. `staging` is the warpgroup's Q of that tile, which no product reads any more once all its
// warps are here; it is free again when the lane of each that stores has seen cute::tma_store_wait<0>.
//
// Every warp stores its own 16 rows, so none waits for another to write. TMA leaves out rows past the
// sequence and columns past head_dim.
template <class Traits, class Output>
__device__ __forceinline__ void store_output_tma(typename Traits::Arguments const& args,
                                                 WarpgroupTile const& tile, Output const& output,
                                                 float const (&factor)[2], float const (&lse)[2],
                                                 typename Traits::Element* staging, int warpgroup) {
  using Element = typename Traits::Element;
  constexpr int kSlab = 64 * 64;
  unsigned const thread = fresh_thread() % 128;
  int const lane = thread % 32, warp_row = thread / 32 * 16;
  Element* const rows = staging + warp_row * 64;
  wait_staging(warpgroup);
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
    store_matrices(words, reinterpret_cast<uint8_t*>(rows + octet / 8 * kSlab), lane, octet % 8);
  }
  tma_store_fence();
  __syncwarp();
  if (lane == 0) {
    CUTE_UNROLL
    for (int slab = 0; slab < Traits::kSlabs; ++slab)
      SM90_TMA_STORE_4D::copy(&args.out_map, rows + slab * kSlab, slab * 64, tile.row + warp_row, tile.head,
                              tile.batch);
    tma_store_arrive();
  }
  OutputRows const to(args, tile, warp_row + lane / 4);
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r)
    if (r < to.exist && lane % 4 == 0) to.lse[8 * r] = lse[r];
}

// As store_dequantised, by way of `staging`, the tile's Q or the output's own place: a warp's pieces of 64
// columns, 2 KB each, take turns in what room there is.
template <class Traits, class Out, class Output>
__device__ __forceinline__ void store_dequantised_tma(typename Traits::Arguments const& args,
                                                      WarpgroupTile const& tile, Output const& output,
                                                      float const (&factor)[2], float const (&lse)[2],
                                                      float const (&affine)[2][Traits::kHeadDim],
                                                      uint8_t* staging, int warpgroup) {
  constexpr int kPieceBytes = 16 * 128,
                kPlaces = (Traits::kTile.store == Store::kPlace ? 32 : 16) * Traits::kHeadDim / kPieceBytes;
  constexpr int kOctets = Traits::kHeadDim / 8;
  unsigned const thread = fresh_thread() % 128;
  int const lane = thread % 32, warp = thread / 32;
  OutputRows const rows(args, tile, 16 * warp + lane / 4);
  LseShift const shift(args, rows);
  uint32_t const columns = cast_smem_ptr_to_uint(&affine[0][0]) + 8 * (lane % 4);
  float2 scale[2], mean[2];
  auto const load = [&](int octet) { load_affine<Traits::kHeadDim>(columns, octet, scale, mean); };
  load(0);
  bool const empty[2] = {lse[0] == -INFINITY, lse[1] == -INFINITY};
  // NOTE: the output's own place does not need it, as every warp has its part there and TMA is done with
  // that; but without it 124 bytes spill at d64.
  wait_staging(warpgroup);
  CUTE_UNROLL
  for (int piece = 0; piece < kOctets / 8; ++piece) {
    uint8_t* const place = staging + (warp * kPlaces + piece % kPlaces) * kPieceBytes;
    if (piece >= kPlaces) {
      if (elect_one_sync()) tma_store_wait<kPlaces - 1>();
      __syncwarp();
    }
    CUTE_UNROLL
    for (int pair = 0; pair < 8; pair += 2) {
      int const octet = 8 * piece + pair;
      uint32_t words[4];
      CUTE_UNROLL
      for (int j = 0; j < 4; ++j) {
        int const r = j % 2, i = 4 * (octet + j / 2) + 2 * r;
        words[j] = round_pair<Out>(fmaf(output(i) * factor[r], scale[j / 2].x, mean[j / 2].x),
                                   fmaf(output(i + 1) * factor[r], scale[j / 2].y, mean[j / 2].y));
        if (empty[r]) words[j] = 0;  // so far V's mean
      }
      if (octet + 2 < kOctets) load(octet + 2);
      store_matrices(words, place, lane, pair);
    }
    tma_store_fence();
    __syncwarp();
    if (elect_one_sync()) {
      SM90_TMA_STORE_4D::copy(&args.out_map, place, piece * 64, tile.row + 16 * warp, tile.head, tile.batch);
      tma_store_arrive();
    }
  }
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r)
    if (r < rows.exist && lane % 4 == 0) rows.lse[8 * r] = lse[r] + args.softmax_scale * shift.of_row[r];
}

}  // namespace hopper_fa
