// Which key blocks a group of query rows needs, and which of them need a mask. Compiles for host and device.
#pragma once

#ifdef __CUDACC__
#define HOPPER_FA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOPPER_FA_HOST_DEVICE inline
#endif

namespace hopper_fa {

HOPPER_FA_HOST_DEVICE int min_int(int a, int b) { return a < b ? a : b; }
HOPPER_FA_HOST_DEVICE int max_int(int a, int b) { return a > b ? a : b; }
HOPPER_FA_HOST_DEVICE int ceil_div(int a, int b) { return a / b + (a % b != 0); }  // no overflow near INT_MAX

struct BlockRange {
  int end;       // key blocks [0, end) hold a visible key for some row of the group
  int unmasked;  // key blocks [0, unmasked) are visible in full to every row of the group
};

// Rows [row, row + rows) of a (seqlen_q, seqlen_k) problem; a group wholly past seqlen_q gets {0, 0}.
HOPPER_FA_HOST_DEVICE BlockRange block_range(int row, int rows, int seqlen_q, int seqlen_k, bool causal,
                                             int block_n) {
  if (row >= seqlen_q) return {0, 0};
  if (!causal) return {ceil_div(seqlen_k, block_n), seqlen_k / block_n};
  int const shift = seqlen_k - seqlen_q;                           // row i sees keys [0, i + shift]
  int const last_row = min_int(rows, seqlen_q - row) + (row - 1);  // last row that exists
  int const seen_by_last = max_int(0, last_row + 1 + shift);       // <= seqlen_k, because last_row < seqlen_q
  int const seen_by_first = max_int(0, row + 1 + shift);
  return {ceil_div(seen_by_last, block_n), seen_by_first / block_n};
}

}  // namespace hopper_fa
