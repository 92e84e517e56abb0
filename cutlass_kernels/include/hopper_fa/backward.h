// The backward family's C++ face: dQ, dK and dV of O = softmax(scale * Q K^T) V; three launches, for an 8-bit
// forward four, no synchronisation.
#pragma once

#include "hopper_fa/types.h"

struct CUstream_st;

namespace hopper_fa {

// The 8-bit tensors of a forward, for its backward. Codes are exact in 16 bits, so the products are those of
// 16-bit inputs, and the scales act on the scores in FP32: P is the forward's.
struct BackwardCodes {
  DType dtype;        // of q and k: kE4M3 or kInt8; v is e4m3
  void const *q, *k;  // (batch, seqlen, heads, head_dim rounded up to 16), contiguous
  void const* v;      // (batch, heads_kv, channels, seqlen_k rounded up to 16), permuted as in Fp8Params
  int v_channels;     // rows of a head of v
  ScaleRef q_scale;   // groups of q_group_rows rows
  ScaleRef k_scale;   // groups of k_group_rows keys: a multiple of 128, or all
  int q_group_rows, k_group_rows;
  float const *v_scale, *v_mean;  // (batch, heads_kv, head_dim); v_mean may be null
  // (batch, heads_q, seqlen_q): of every row, what was taken from its scores before softmax_scale, but is in
  // lse; and (batch, heads_kv, head_dim): its derivative by q. Null: nothing was.
  float const *lse_shift, *k_mean;
  bool rotated;  // q and k are, by these signs (QuantizeRowsParams)
  uint8_t signs[32];
};

struct BackwardParams {
  DType dtype;
  int tile;           // row of kBackwardTiles (common/tile_table.h) that the call runs on
  TensorRef q;        // (batch, seqlen_q, heads_q, head_dim)
  TensorRef k, v;     // (batch, seqlen_k, heads_kv, head_dim). With codes q, k and v are scratch
  TensorRef out;      // as q: the forward's output
  TensorRef dout;     // as q: its gradient
  TensorRef dq;       // as q, written
  TensorRef dk;       // as k, written
  TensorRef dv;       // as v, written
  float const* lse;   // (batch, heads_q, seqlen_q), contiguous: the forward's
  float const* dlse;  // the same: its gradient; null: zero
  // Scratch, 16-byte aligned, of the sizes that backward_workspace gives.
  float* dq_sum;  // dQ in FP32
  float* rows;    // two numbers a query row, with codes three
  int* turns;
  int batch, seqlen_q, seqlen_k, heads_q, heads_kv, head_dim;
  float softmax_scale;
  bool causal;                 // bottom-right aligned
  bool deterministic;          // dQ is summed in a fixed order. dK and dV always are
  BackwardCodes const* codes;  // for tiles with factors, else null
};

struct BackwardWorkspace {
  int64_t dq_sum, rows;  // floats
  int64_t turns;         // integers
};

// For the row `tile` of kBackwardTiles.
BackwardWorkspace backward_workspace(int tile, int batch, int seqlen_q, int heads_q);

// Needs 16-byte aligned pointers and strides, head_dim a multiple of 8 and at most the tile's, on the current
// device. Gradients of rows that see no key, and of keys that no row sees, are zero.
Status run_backward(BackwardParams const& params, CUstream_st* stream);

// Whether this binary holds the kernels for (dtype, row of kBackwardTiles).
bool has_backward(DType dtype, int tile);

}  // namespace hopper_fa
