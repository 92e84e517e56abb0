// From ForwardParams to a launch. Included by one generated translation unit an instance (instances.cmake).
#pragma once

#include <atomic>

#include "common/tensor_map.h"
#include "forward/instance.h"
#include "forward/kernel.cuh"

namespace hopper_fa {

// 8-bit V comes transposed: rows are channels and ones, columns are keys in whole groups of 16. Of the 8 rows
// that a product of ones takes, TMA fills in the zeros.
template <class Traits>
Status encode_v_map(CUtensorMap& map, ForwardParams const& p) {
  if constexpr (Traits::kFp8)
    return encode_tensor_map(map, p.v, p.dtype,
                             {ceil_div(p.seqlen_k, 16) * 16, Traits::kTile.head_dim + 1, p.heads_kv, p.batch},
                             Traits::kBlockN, Traits::kVBoxRows);
  else
    return encode_tensor_map(map, p.v, p.dtype, {p.head_dim, p.seqlen_k, p.heads_kv, p.batch},
                             Traits::kSlabColumns, Traits::kBlockN);
}

// How many CTAs of the kernel the device holds at a time; 0 if the runtime refuses them. The first call on a
// device asks the runtime, and sets the kernel's limit of shared memory.
template <class Traits>
int fitting_ctas(cudaLaunchConfig_t const& config, Device device) {
  static std::atomic<int> known[kCachedDevices];  // 0: not asked yet
  bool const cached = device.index < kCachedDevices;
  if (int const fitting = cached ? known[device.index].load(std::memory_order_relaxed) : 0) return fitting;
  auto const kernel = forward_kernel<Traits>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(config.dynamicSmemBytes)) != cudaSuccess)
    return 0;
  if (cached) known[device.index].store(device.sms, std::memory_order_relaxed);
  return device.sms;
}

template <DType kDType, int kTileIndex>
Status launch_forward(ForwardParams const& p, Device device, cudaStream_t stream) {
  using Traits = ForwardTraits<kDType, kTileIndex>;

  typename Traits::Arguments args;
  int const group = p.heads_q / p.heads_kv;
  args.warpgroups = choose_warpgroups(Traits::kWarpgroups, p.batch * p.heads_q, p.seqlen_q, device.sms);
  args.scheduler =
      make_tile_scheduler(p.batch, p.heads_q, group, p.seqlen_q, 64 * args.warpgroups,
                          int64_t(p.seqlen_k) * p.head_dim * 2 * sizeof(typename Traits::Element), p.causal);
  Status status = encode_tensor_map(args.q, p.q, kDType, {p.head_dim, p.seqlen_q, p.heads_q, p.batch},
                                    Traits::kSlabColumns, 64);
  if (p.seqlen_k > 0) {  // without keys nothing is loaded, and TMA has no empty tensors
    if (status == Status::kOk)
      status = encode_tensor_map(args.k, p.k, kDType, {p.head_dim, p.seqlen_k, p.heads_kv, p.batch},
                                 Traits::kSlabColumns, Traits::kBlockN);
    if (status == Status::kOk) status = encode_v_map<Traits>(args.v, p);
  }
  if constexpr (Traits::kTile.store != Store::kPlain) {
    if (status == Status::kOk)
      status = encode_tensor_map(args.out_map, p.out, Traits::kFp8 ? p.fp8.out_dtype : kDType,
                                 {p.head_dim, p.seqlen_q, p.heads_q, p.batch}, 64, 16);
  }
  if (status != Status::kOk) return status;
  args.out = p.out.data;
  args.out_batch_stride = p.out.batch_stride;
  args.out_row_stride = p.out.row_stride;
  args.out_head_stride = p.out.head_stride;
  args.lse = p.lse;
  args.workspace = p.workspace;
  args.seqlen_q = p.seqlen_q;
  args.seqlen_k = p.seqlen_k;
  args.head_dim = p.head_dim;
  args.q_heads_per_kv = group;
  // NOTE: a zero scale would turn the mask's -inf into NaN; the smallest denormal leaves every finite score
  // at exp2(0) = 1 instead.
  float const scale = p.softmax_scale == 0.f ? 0x1p-149f : p.softmax_scale * 1.44269504088896341f;
  args.scale_log2 = scale < 0 ? -scale : scale;
  args.negate_scores = scale < 0;
  args.causal = p.causal;
  args.fp8 = p.fp8;
  args.softmax_scale = p.softmax_scale;
  args.heads_kv = p.heads_kv;
  if constexpr (Traits::kTile.key_vectors) args.key_bias = p.key_bias;
  // NOTE: measured: through TMA a tile's output keeps a Q stage, for which short tiles wait, 1 to 5% longer.
  args.plain_store = p.causal && int64_t(p.seqlen_k) * Traits::kHeadDim <= 65536;
  if constexpr (Traits::kFp8) {
    // NOTE: measured: where most blocks are masked or at a tile's end, turns cost 2 to 8%.
    int const blocks_without_turns = p.causal ? 8 : Traits::kHeadDim == 64 ? 4 : 0;
    args.turn_takers = p.seqlen_k <= blocks_without_turns * Traits::kBlockN ? 1 : args.warpgroups;
    if (Traits::kTile.flush && (p.fp8.flush_interval < 1 || !p.fp8.flush)) return Status::kInvalidArgument;
    int& shift = args.q_group_shift = 0;
    if (p.fp8.q_group_rows >= p.seqlen_q)
      shift = 31;
    else
      while (shift < 31 && (1 << shift) < p.fp8.q_group_rows) ++shift;
    if (shift < 31 && 1 << shift != p.fp8.q_group_rows) return Status::kInvalidArgument;
  }

  cudaLaunchConfig_t config = {};
  config.blockDim = Traits::kThreads;
  config.dynamicSmemBytes = forward_shared_memory(Traits::kTile);
  config.stream = stream;
  int const fitting = fitting_ctas<Traits>(config, device);
  if (fitting == 0) return Status::kLaunchError;
  config.gridDim = min_int(args.scheduler.num_tiles, fitting);
  return cudaLaunchKernelEx(&config, forward_kernel<Traits>, args) == cudaSuccess ? Status::kOk
                                                                                  : Status::kLaunchError;
}

}  // namespace hopper_fa

#define HOPPER_FA_FORWARD_INSTANCE(dtype, head_dim, variant)                                              \
  template hopper_fa::Status hopper_fa::launch_forward<hopper_fa::dtype_token::dtype,                     \
                                                       hopper_fa::forward_tile_index(head_dim, variant)>( \
      hopper_fa::ForwardParams const&, hopper_fa::Device, cudaStream_t);
