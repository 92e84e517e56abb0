// From ForwardParams to a launch. Included by one generated translation unit an instance (instances.cmake).
#pragma once

#include <atomic>

#include "common/tensor_map.h"
#include "forward/instance.h"
#include "forward/kernel.cuh"

namespace hopper_fa {

template <DType kDType>
using ElementOf = std::conditional_t<kDType == DType::kBF16, cutlass::bfloat16_t, cutlass::half_t>;

template <DType kDType, int kTileIndex>
Status launch_forward(ForwardParams const& p, Device device, cudaStream_t stream) {
  using Traits = ForwardTraits<ElementOf<kDType>, kTileIndex>;
  constexpr int kSharedBytes = forward_shared_memory(Traits::kTile);

  ForwardArguments args;
  int const group = p.heads_q / p.heads_kv;
  args.warpgroups = choose_warpgroups(Traits::kWarpgroups, p.batch * p.heads_q, p.seqlen_q, device.sms);
  args.scheduler =
      make_tile_scheduler(p.batch, p.heads_q, group, p.seqlen_q, 64 * args.warpgroups,
                          int64_t(p.seqlen_k) * p.head_dim * 2 * sizeof(typename Traits::Element), p.causal);
  Status status = encode_tensor_map(args.q, p.q, kDType, p.head_dim, p.seqlen_q, p.heads_q, p.batch, 64);
  if (p.seqlen_k > 0) {  // without keys nothing is loaded, and TMA has no empty tensors
    if (status == Status::kOk)
      status = encode_tensor_map(args.k, p.k, kDType, p.head_dim, p.seqlen_k, p.heads_kv, p.batch,
                                 Traits::kBlockN);
    if (status == Status::kOk)
      status = encode_tensor_map(args.v, p.v, kDType, p.head_dim, p.seqlen_k, p.heads_kv, p.batch,
                                 Traits::kBlockN);
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

  auto const kernel = forward_kernel<Traits>;
  // The shared-memory limit is a property of (kernel, device), set on the first call on each device.
  static_assert(kCachedDevices == 64);
  static std::atomic<uint64_t> configured{0};
  uint64_t const bit = device.index < kCachedDevices ? uint64_t(1) << device.index : 0;
  if (!(configured.load(std::memory_order_relaxed) & bit)) {
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes) !=
        cudaSuccess)
      return Status::kLaunchError;
    configured.fetch_or(bit, std::memory_order_relaxed);
  }
  int const ctas = args.scheduler.num_tiles < device.sms ? args.scheduler.num_tiles : device.sms;
  kernel<<<ctas, Traits::kThreads, kSharedBytes, stream>>>(args);
  return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchError;
}

}  // namespace hopper_fa

#define HOPPER_FA_FORWARD_INSTANCE(dtype, head_dim, variant)                                              \
  template hopper_fa::Status hopper_fa::launch_forward<hopper_fa::dtype_token::dtype,                     \
                                                       hopper_fa::forward_tile_index(head_dim, variant)>( \
      hopper_fa::ForwardParams const&, hopper_fa::Device, cudaStream_t);
