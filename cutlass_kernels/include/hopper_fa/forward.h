// The forward family's C++ face: O = softmax(scale * Q K^T) V and LSE, one launch, no synchronisation.
#pragma once

#include "hopper_fa/types.h"

struct CUstream_st;

namespace hopper_fa {

constexpr int kForwardWorkspaceInts = 2;

struct ForwardParams {
  DType dtype;
  int tile;        // row of kForwardTiles (common/tile_table.h) that the call runs on
  TensorRef q;     // (batch, seqlen_q, heads_q, head_dim)
  TensorRef k, v;  // (batch, seqlen_k, heads_kv, head_dim)
  TensorRef out;   // as q
  float* lse;      // (batch, heads_q, seqlen_q), contiguous
  int* workspace;  // kForwardWorkspaceInts zeros; zeros again when the kernel ends. One launch at a time may
                   // use it
  int batch, seqlen_q, seqlen_k, heads_q, heads_kv, head_dim;
  float softmax_scale;
  bool causal;  // bottom-right aligned
};

// Needs 16-byte aligned pointers and strides, head_dim a multiple of 8 and at most the tile's, on the current
// device.
Status run_forward(ForwardParams const& params, CUstream_st* stream);

// Whether this binary holds the kernel for (dtype, row of kForwardTiles).
bool has_forward(DType dtype, int tile);

}  // namespace hopper_fa
