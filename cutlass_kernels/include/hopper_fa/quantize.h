// The quantisation family's C++ face: 16-bit Q, K and V to 8-bit tensors and scales, bit for bit what
// hopper_fa/quantization.py computes. Each call puts its kernels into the stream and waits for nothing.
//
// Order of calls: run_token_stats for every tensor that is smoothed, and for V if it has scales;
// run_quantize_rows for Q and for K; run_quantize_v. What a call reads of another's output is named below.
#pragma once

#include "hopper_fa/types.h"

struct CUstream_st;

namespace hopper_fa {

// Which elements share a scale. kGroup: the query heads of one key/value head. kBlock: rows_per_block rows.
enum class Granularity : int { kNone, kTensor, kGroup, kHead, kBlock, kToken, kChannel };

// What of a call may happen while the calls before it in the stream still run.
//
// kLoads and kAll: the call before was one of this family, and inputs were there when the first of a row of
// such calls, which has kNone, had waited. kAll besides: what others of the family wrote that this call reads
// was there when the last one that does not have kAll had waited, and no call from that one on reads or
// writes what this one writes.
// Statistics take kLoads for kNone. V that is e4m3 has kNone.
enum class Overlap : int { kNone, kLoads, kAll };

// One (batch, seqlen, heads, head_dim) tensor: 16-byte aligned pointer and strides, last dimension
// contiguous.
struct QuantizeInput {
  DType dtype;
  TensorRef x;
  int batch, seqlen, heads, head_dim;  // head_dim a multiple of 8, at most 256
};

struct TokenStatsParams {
  QuantizeInput in;  // bf16 or fp16
  int shift;         // statistics are of one token in 2^shift, 0 to 6
  float* mean;       // (batch, heads, head_dim), written; null: not wanted
  // Written: the largest finite |x - mean|, or |x| without mean, as float bits; null: not wanted. kTensor:
  // one, kHead: (batch, heads), kChannel: (batch, heads, head_dim); of a sample kChannel only.
  uint32_t* amax;
  Granularity granularity;
  // For QuantizeVParams, where amax is of a sample; else null: (batch, heads, head_dim), set to 0.
  uint32_t* outgrown;
  Overlap overlap;  // not kAll with maxima that channels share
};

struct QuantizeRowsParams {
  QuantizeInput in;         // bf16 or fp16; Q or K
  DType out_dtype;          // e4m3 or int8
  bool queries;             // x is Q
  int q_heads_per_kv;       // query heads a key/value head
  Granularity granularity;  // not kChannel; kGroup for Q only, kNone with e4m3 only
  int rows_per_block;       // of kBlock: 64 or 128
  float const* mean;        // (batch, heads, head_dim), subtracted; null: no smoothing
  bool rotate;
  uint8_t signs[32];  // of the rotation: bit i of byte n set means that channel 8 n + i is negated
  // Q: K's mean, for products of the unsmoothed rows with it. K: Q's mean, for products of the smoothed rows
  // with those of all its query heads. (batch, heads of the other tensor, head_dim); null: none.
  float const* other_mean;
  float* dots;      // (batch, query heads, seqlen), written if there is other_mean
  uint32_t* amax;   // scratch of kTensor, kGroup and kHead: two integers a scale
  void* out;        // (batch, seqlen, heads, head_dim rounded up to 16), contiguous
  float* scale;     // (batch, heads, number of groups): 1, blocks or seqlen of them
  Overlap overlap;  // not kAll with scratch, which two passes share
};

struct QuantizeVParams {
  QuantizeInput in;  // bf16, fp16; or e4m3, whose bytes are only moved
  float* mean;       // (batch, heads, head_dim), of run_token_stats if smooth; null: neither of the two below
  bool smooth;       // it is subtracted from V
  bool compensate;   // then the mean of what rounding takes from V is added to it (to 0 if not smooth)
  uint32_t const* amax;  // of run_token_stats; null with kNone
  Granularity granularity;
  // Of run_token_stats, whose amax is of a sample: scales leave room above it, and channels that outgrow that
  // are rounded once more. null: amax is of every token. With it kChannel.
  uint32_t* outgrown;
  void* out;     // (batch, heads, tile_d + 1, seqlen rounded up to 16), keys permuted; tile_d: 64, 128 or 256
  float* scale;  // (batch, heads, head_dim), written; null for e4m3
  float* workspace;  // quantize_v_workspace floats; null without compensate
  Overlap overlap;
};

Status run_token_stats(TokenStatsParams const& params, CUstream_st* stream);
Status run_quantize_rows(QuantizeRowsParams const& params, CUstream_st* stream);
Status run_quantize_v(QuantizeVParams const& params, CUstream_st* stream);

// Floats of QuantizeVParams.workspace.
int64_t quantize_v_workspace(int batch, int seqlen, int heads, int head_dim);

// Whether this binary holds the kernels for an input type.
bool has_quantize(DType dtype);

}  // namespace hopper_fa
