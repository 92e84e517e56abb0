// The backward family's C++ face: dQ, dK and dV of O = softmax(scale * Q K^T) V; three launches, no
// synchronisation.
#pragma once

#include "hopper_fa/types.h"

struct CUstream_st;

namespace hopper_fa {

struct BackwardParams {
  DType dtype;
  int tile;           // row of kBackwardTiles (common/tile_table.h) that the call runs on
  TensorRef q;        // (batch, seqlen_q, heads_q, head_dim)
  TensorRef k, v;     // (batch, seqlen_k, heads_kv, head_dim)
  TensorRef out;      // as q: the forward's output
  TensorRef dout;     // as q: its gradient
  TensorRef dq;       // as q, written
  TensorRef dk;       // as k, written
  TensorRef dv;       // as v, written
  float const* lse;   // (batch, heads_q, seqlen_q), contiguous: the forward's
  float const* dlse;  // the same: its gradient; null: zero
  // Scratch, 16-byte aligned, of the sizes that backward_workspace gives.
  float* dq_sum;  // dQ in FP32
  float* rows;    // two numbers a query row
  int* turns;
  int batch, seqlen_q, seqlen_k, heads_q, heads_kv, head_dim;
  float softmax_scale;
  bool causal;         // bottom-right aligned
  bool deterministic;  // dQ is summed in a fixed order. dK and dV always are
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
