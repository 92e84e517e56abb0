// From BackwardParams to launches. Included by one generated translation unit an instance (instances.cmake).
#pragma once

#include <atomic>

#include "backward/instance.h"
#include "backward/kernel.cuh"
#include "backward/rows.cuh"
#include "common/tensor_map.h"

namespace hopper_fa {

// Lets the main kernel have its shared memory; asked for once a device.
template <class Traits>
bool allow_shared_memory(Device device) {
  static std::atomic<bool> allowed[kCachedDevices];
  bool const cached = device.index < kCachedDevices;
  if (cached && allowed[device.index].load(std::memory_order_relaxed)) return true;
  if (cudaFuncSetAttribute(backward_kernel<Traits>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           Traits::kSharedBytes) != cudaSuccess)
    return false;
  if (cached) allowed[device.index].store(true, std::memory_order_relaxed);
  return true;
}

template <DType kDType, int kTileIndex>
Status launch_backward(BackwardParams const& p, Device device, cudaStream_t stream) {
  using Traits = BackwardTraits<kDType, kTileIndex>;

  BackwardArguments args;
  args.out = p.out, args.dout_rows = p.dout;
  args.dq = p.dq, args.dk = p.dk, args.dv = p.dv;
  args.lse = p.lse, args.dlse = p.dlse;
  args.seqlen_q = p.seqlen_q, args.seqlen_k = p.seqlen_k;
  args.head_dim = p.head_dim;
  args.heads_q = p.heads_q, args.q_heads_per_kv = p.heads_q / p.heads_kv;
  args.m_blocks = ceil_div(p.seqlen_q, Traits::kBlockM);
  args.n_blocks = ceil_div(p.seqlen_k, Traits::kBlockN);
  // NOTE: split tiles, which leave dQ in chunks one by one, lose up to 9% on long walks when they look in
  // every step whether their part is the first; all others gain.
  bool const store_first = p.deterministic || !Traits::kSplit || p.seqlen_q <= 2048;
  // Where nobody waits for the first part of a sum or for a turn, all begin at the same query block.
  args.group_size = store_first ? min_int(device.sms, kMaxGroup) : 1;
  args.scale_log2 = p.softmax_scale * 1.44269504088896341f;
  args.softmax_scale = p.softmax_scale;
  args.causal = p.causal;
  int64_t const row_blocks = int64_t(p.batch) * p.heads_q * args.m_blocks;
  args.bias = p.rows;
  args.delta = p.rows + row_blocks * Traits::kBlockM;
  args.dq_sum = p.dq_sum;
  if constexpr (Traits::kQuantized) {
    args.factor = args.delta + row_blocks * Traits::kBlockM;
    args.codes = *p.codes;
    args.wide_q = p.q, args.wide_k = p.k, args.wide_v = p.v;
  }
  args.turns = p.deterministic ? p.turns : nullptr;
  args.stored = store_first ? p.turns : nullptr;
  // Q, dO and dQ's sum of the query heads that read one key/value head.
  int64_t const head_bytes = int64_t(p.seqlen_q) * p.head_dim * 8 * args.q_heads_per_kv;
  args.scheduler = make_tile_scheduler(p.batch, p.heads_kv, 1, p.seqlen_k, Traits::kBlockN, head_bytes,
                                       p.causal, p.deterministic ? 1 : 16);
  if (row_blocks * Traits::kChunks > 0x7fffffff) return Status::kInvalidArgument;  // grids are flat

  Status status = Status::kOk;
  auto const encode = [&](CUtensorMap& map, TensorRef const& t, int rows, int heads, int box_rows) {
    if (status == Status::kOk && rows > 0)  // TMA has no empty tensors
      status = encode_tensor_map(map, t, kDType, {p.head_dim, rows, heads, p.batch}, 64, box_rows);
  };
  encode(args.q, p.q, p.seqlen_q, p.heads_q, Traits::kBlockM);
  encode(args.dout, p.dout, p.seqlen_q, p.heads_q, Traits::kBlockM);
  encode(args.k, p.k, p.seqlen_k, p.heads_kv, Traits::kBlockN);
  encode(args.v, p.v, p.seqlen_k, p.heads_kv, Traits::kBlockN);
  if (status != Status::kOk) return status;
  if (!allow_shared_memory<Traits>(device)) return Status::kLaunchError;

  if constexpr (Traits::kQuantized) {
    WidenGrid const grid = make_widen_grid(args, p.batch, p.heads_kv);
    if (grid.q + grid.k + grid.v > 0)
      widen<Traits><<<grid.q + grid.k + grid.v, kWidenThreads, 0, stream>>>(args, grid, p.batch, p.heads_kv);
  }
  if (row_blocks > 0) prepare_rows<Traits><<<unsigned(row_blocks), kRowThreads, 0, stream>>>(args);
  if (args.scheduler.num_tiles > 0)
    backward_kernel<Traits>
        <<<args.scheduler.num_tiles, Traits::kThreads, Traits::kSharedBytes, stream>>>(args);
  if (row_blocks > 0) {
    if constexpr (Traits::kQuantized)
      finish_quantized_dq<Traits><<<unsigned(row_blocks * (Traits::kBlockM / 64)), 128, 0, stream>>>(args);
    else
      finish_dq<Traits><<<unsigned(row_blocks * Traits::kChunks), 128, 0, stream>>>(args);
  }
  return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchError;
}

}  // namespace hopper_fa

#define HOPPER_FA_BACKWARD_INSTANCE(dtype, head_dim, variant)                                               \
  template hopper_fa::Status hopper_fa::launch_backward<hopper_fa::dtype_token::dtype,                      \
                                                        hopper_fa::backward_tile_index(head_dim, variant)>( \
      hopper_fa::BackwardParams const&, hopper_fa::Device, cudaStream_t);
