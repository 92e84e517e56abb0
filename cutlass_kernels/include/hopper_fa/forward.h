// The forward family's C++ face: O = softmax(scale * Q K^T) V and LSE, one launch, no synchronisation.
#pragma once

#include "hopper_fa/types.h"

struct CUstream_st;

namespace hopper_fa {

constexpr int kForwardWorkspaceInts = 2;

// What 8-bit inputs need besides; no scale is negative. Then v of ForwardParams is V transposed, (batch,
// heads_kv, tile's head dim
// + 1, keys), keys contiguous, permuted in groups of 16, a row of ones after the channels
// (hopper_fa/quantization.py, QuantizedQKV): its row_stride is that of channels.
struct Fp8Params {
  DType out_dtype;   // kBF16 or kFP16
  ScaleRef q_scale;  // groups of q_group_rows rows
  ScaleRef
      k_scale;  // groups of the tile's block_n keys, which share a scale or, by key_vectors, have one each
  int q_group_rows;
  float const* v_scale;     // (batch, heads_kv, head_dim), contiguous, 16-byte aligned
  float const* v_mean;      // the same: added to the output
  float const* lse_shift;   // (batch, heads_q, seqlen_q), or null: what smoothing K took out of every score
  float p_offset;           // P = exp2(score - maximum + p_offset)
  float rescale_threshold;  // log2 growth of the maximum that the output is not yet rescaled for
  // Tiles that flush: blocks of keys whose P V is one sum of the tensor core (forward/flush.cuh), and
  // scratch, forward_flush_floats for every multiprocessor, 16-byte aligned.
  int flush_interval;
  float* flush;
};

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
  bool causal;    // bottom-right aligned
  Fp8Params fp8;  // read only for 8-bit dtypes
  // Tiles with key_vectors: as fp8.k_scale, but by query head, and added to the dequantised scores before
  // softmax_scale. Data and strides of both are multiples of 16 bytes.
  ScaleRef key_bias;
};

// Needs 16-byte aligned pointers and strides, head_dim a multiple of 8 (of 16 for the rows of 8-bit Q and K)
// and at most the tile's, on the current device.
Status run_forward(ForwardParams const& params, CUstream_st* stream);

// Whether this binary holds the kernel for (dtype, row of kForwardTiles).
bool has_forward(DType dtype, int tile);

}  // namespace hopper_fa
