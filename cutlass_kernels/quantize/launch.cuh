// From the parameter structs to launches. Included by one generated translation unit an input type
// (instances.cmake).
#pragma once

#include <cstring>

#include "common/device.h"
#include "quantize/finish_v.cuh"
#include "quantize/instance.h"
#include "quantize/quantize_v.cuh"
#include "quantize/rows.cuh"
#include "quantize/token_stats.cuh"
#include "quantize/transpose_v.cuh"

namespace hopper_fa {

// Grids are flat, at most 2^31 - 1 CTAs. kNone: the kernel need not wait itself.
// CTAs may begin before the launches before it end: see Overlap.
template <class Arguments>
Status launch(void (*kernel)(Arguments), int64_t ctas, int threads, int shared, cudaStream_t stream,
              Arguments const& args, int cluster = 1, Overlap overlap = Overlap::kLoads) {
  if (ctas > 0x7fffffff) return Status::kInvalidArgument;
  if (shared > 48 * 1024 &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared) != cudaSuccess)
    return Status::kLaunchError;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = overlap != Overlap::kNone;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster, attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(ctas), config.blockDim = threads;
  config.dynamicSmemBytes = shared, config.stream = stream;
  config.attrs = attributes, config.numAttrs = cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, args) == cudaSuccess ? Status::kOk : Status::kLaunchError;
}

// NOTE: those of a single row, head or batch entry may be anything, and kernels form addresses past the last
// one of it, of 16 aligned bytes, which they do not read.
template <class Arguments>
void set_strides(Arguments& args, QuantizeInput const& in) {
  args.batch_stride = in.batch > 1 ? in.x.batch_stride : 0;
  args.row_stride = in.seqlen > 1 ? in.x.row_stride : 0;
  args.head_stride = in.heads > 1 ? in.x.head_stride : 0;
}

// Of a head's tiles, those that each CTA of a persistent grid takes, or each cluster.
inline int head_tiles_of_cta(int head_tiles, int heads, int ctas_a_sm, int cluster = 1) {
  return ceil_div(head_tiles, max_int(1, hopper_device().sms * ctas_a_sm / cluster / heads));
}

// Strides of V's maxima, (batch, head, channel) of which a granularity shares some.
template <class Arguments>
void set_amax_strides(Arguments& args, Granularity granularity, int heads, int head_dim) {
  args.amax_channel = granularity == Granularity::kChannel;
  args.amax_head = args.amax_channel ? head_dim : granularity == Granularity::kHead;
  args.amax_batch = heads * args.amax_head;
}

template <DType kIn>
Status launch_token_stats(TokenStatsParams const& p, cudaStream_t stream) {
  QuantizeInput const& in = p.in;
  TokenStatsArguments args;
  args.x = static_cast<uint16_t const*>(in.x.data);
  set_strides(args, in);
  args.shift = p.shift;
  args.tokens = in.seqlen >> args.shift, args.heads = in.heads, args.head_dim = in.head_dim;
  args.chunks = ceil_div(args.tokens, kStatsChunk);
  args.mean = p.mean;
  args.smooth = p.mean != nullptr;
  args.amax = p.amax;
  set_amax_strides(args, p.granularity, in.heads, in.head_dim);
  args.outgrown = p.outgrown;
  args.overlap = p.overlap;

  int64_t const head_batches = int64_t(in.batch) * in.heads;
  if (p.amax && p.granularity != Granularity::kChannel) {
    size_t const scales = p.granularity == Granularity::kHead ? head_batches : 1;
    if (cudaMemsetAsync(p.amax, 0, scales * sizeof(uint32_t), stream) != cudaSuccess)
      return Status::kLaunchError;
  }
  int ctas = kStatsCtas;
  while (ctas > 1 && ctas / 2 >= args.chunks) ctas /= 2;
  int const threads = ceil_div(kStatsLanes * in.head_dim / 8, 32) * 32;
  int const shared = 8 * 16 * threads + kStatsLanes * in.head_dim * (p.amax ? 8 : 4);
  auto const kernel = p.amax ? token_stats_kernel<kIn, true> : token_stats_kernel<kIn, false>;
  return launch<TokenStatsArguments>(kernel, head_batches * ctas, threads, shared, stream, args, ctas);
}

struct RowsLaunch {
  void (*kernel)(RowsArguments);
  int threads, shared, cluster, ctas_a_sm;
};

template <DType kIn, DType kOut, int kColumns>
RowsLaunch rows_launch(int tile_rows) {
  constexpr int kLargest = rows_of_cta(kColumns);
  int const rows = min_int(tile_rows, kLargest);  // of a CTA
  return {quantize_rows_kernel<kIn, kOut, kColumns>, rows / WarpRows<kColumns>::kRows * 32,
          rows_shared_bytes<kColumns>(rows), tile_rows / rows, rows_min_ctas(kColumns) * (kLargest / rows)};
}

template <DType kIn, DType kOut>
RowsLaunch rows_launch(int columns, int tile_rows) {
  return columns == 64    ? rows_launch<kIn, kOut, 64>(tile_rows)
         : columns == 128 ? rows_launch<kIn, kOut, 128>(tile_rows)
                          : rows_launch<kIn, kOut, 256>(tile_rows);
}

template <DType kIn>
Status launch_quantize_rows(QuantizeRowsParams const& p, cudaStream_t stream) {
  QuantizeInput const& in = p.in;
  RowsArguments args;
  args.x = static_cast<uint16_t const*>(in.x.data);
  set_strides(args, in);
  args.seqlen = in.seqlen, args.heads = in.heads, args.head_dim = in.head_dim;
  args.mean = p.mean;
  args.rotate = p.rotate;
  std::memcpy(args.signs, p.signs, sizeof(args.signs));
  args.other_mean = p.other_mean;
  args.dots = p.dots;
  args.queries = p.queries;
  args.q_heads_per_kv = make_divisor(p.q_heads_per_kv);
  args.heads_kv = p.queries ? in.heads / p.q_heads_per_kv : in.heads;
  args.amax = p.amax;
  args.out = static_cast<uint8_t*>(p.out);
  args.scale = p.scale;

  Granularity const granularity = p.granularity;
  args.scale_of = granularity == Granularity::kToken   ? ScaleOf::kRow
                  : granularity == Granularity::kBlock ? ScaleOf::kTile
                  : granularity == Granularity::kNone  ? ScaleOf::kNone
                                                       : ScaleOf::kGiven;
  bool const given = args.scale_of == ScaleOf::kGiven;
  int const heads_a_amax = granularity == Granularity::kTensor  ? in.heads
                           : granularity == Granularity::kGroup ? p.q_heads_per_kv
                                                                : 1;
  args.heads_a_amax = make_divisor(heads_a_amax);
  int const amaxes = in.heads / heads_a_amax;  // of a batch entry
  args.amax_batch = granularity == Granularity::kTensor ? 0 : amaxes;
  args.overlap = p.overlap;

  int const columns = tile_columns(in.head_dim);
  args.tile_rows = granularity == Granularity::kBlock ? p.rows_per_block : 64;
  bool const one = given || args.scale_of == ScaleOf::kNone;
  if (in.seqlen == 0 && !one) return Status::kOk;  // one scale for all rows exists without rows too
  int const tiles = max_int(1, ceil_div(in.seqlen, args.tile_rows));
  args.tiles = make_quantize_tiles(in.heads, tiles);
  int64_t const count = int64_t(in.batch) * in.heads * tiles;
  if (count > 0x7fffffff) return Status::kInvalidArgument;
  RowsLaunch const with = p.out_dtype == DType::kInt8
                              ? rows_launch<kIn, DType::kInt8>(columns, args.tile_rows)
                              : rows_launch<kIn, DType::kE4M3>(columns, args.tile_rows);
  args.head_tiles = in.batch * tiles;
  args.cluster = with.cluster;
  args.cta_tiles = head_tiles_of_cta(args.head_tiles, in.heads, with.ctas_a_sm, with.cluster);
  int64_t const ctas = int64_t(in.heads) * ceil_div(args.head_tiles, args.cta_tiles) * with.cluster;
  auto const run = [&] {
    return launch<RowsArguments>(with.kernel, ctas, with.threads, with.shared, stream, args, with.cluster);
  };
  args.collect = given;
  if (given) {
    size_t const scales = granularity == Granularity::kTensor ? 1 : size_t(in.batch) * amaxes;
    if (cudaMemsetAsync(p.amax, 0, scales * 2 * sizeof(uint32_t), stream) != cudaSuccess)
      return Status::kLaunchError;
    Status const status = run();
    if (status != Status::kOk) return status;
    args.collect = false;
  }
  return run();
}

// V that is e4m3 already.
template <DType kIn>
Status launch_transpose_v(QuantizeVParams const& p, cudaStream_t stream) {
  QuantizeInput const& in = p.in;
  TransposeVArguments args;
  args.v = static_cast<uint8_t const*>(in.x.data);
  set_strides(args, in);
  args.seqlen = in.seqlen, args.heads = in.heads, args.head_dim = in.head_dim;
  args.groups = v_tile_groups(in.head_dim);
  int const tiles = ceil_div(in.seqlen, args.groups * kKeyGroup);
  if (tiles == 0) return Status::kOk;
  args.tiles = make_quantize_tiles(in.heads, tiles);
  args.out = static_cast<uint8_t*>(p.out);
  int const threads = ceil_div(args.groups * in.head_dim / 8, 32) * 32;
  int const shared = in.head_dim * args.groups * 16;
  return launch<TransposeVArguments>(transpose_v_kernel<kIn>, int64_t(in.batch) * in.heads * tiles, threads,
                                     shared, stream, args, 1, Overlap::kNone);
}

template <DType kIn>
Status launch_round_v(QuantizeVParams const& p, cudaStream_t stream) {
  QuantizeInput const& in = p.in;
  QuantizeVArguments args;
  args.v = static_cast<uint16_t const*>(in.x.data);
  set_strides(args, in);
  args.seqlen = in.seqlen, args.heads = in.heads, args.head_dim = in.head_dim;
  args.chunks = ceil_div(in.seqlen, kStatsChunk);
  int const columns = tile_columns(in.head_dim);
  int const tile_chunks = kVThreads / 32 * kVSlice / columns;
  int const tiles = max_int(1, ceil_div(args.chunks, tile_chunks));  // an empty sequence has scales
  args.tiles = make_quantize_tiles(in.heads, tiles);
  if (int64_t(in.batch) * tiles > 0x7fffffff) return Status::kInvalidArgument;
  args.head_tiles = in.batch * tiles;
  args.cta_tiles = head_tiles_of_cta(args.head_tiles, in.heads, kVCtas);
  args.mean = p.smooth ? p.mean : nullptr;
  args.amax = p.amax;
  set_amax_strides(args, p.granularity, in.heads, in.head_dim);
  args.out = static_cast<uint8_t*>(p.out);
  args.scale = p.scale;
  args.errors = p.compensate ? p.workspace : nullptr;
  args.mean_out = p.mean;
  args.overlap = p.overlap;
  args.outgrown = p.outgrown;
  auto const kernel = columns == 64    ? quantize_v_kernel<kIn, 64>
                      : columns == 128 ? quantize_v_kernel<kIn, 128>
                                       : quantize_v_kernel<kIn, 256>;
  int64_t const ctas = int64_t(in.heads) * ceil_div(args.head_tiles, args.cta_tiles);
  // NOTE: its second looks are loads of memory that does not change while a kernel runs, to the compiler,
  // which may place them before a wait; so with kNone the launch waits, not the kernel.
  Status const status =
      launch<QuantizeVArguments>(kernel, ctas, kVThreads, sizeof(VShared), stream, args, 1, args.overlap);
  if (status != Status::kOk || !p.outgrown && !p.compensate) return status;
  auto const finish = args.chunks <= 32 ? finish_v_kernel<kIn, 4> : finish_v_kernel<kIn, 32>;
  int64_t const slices = int64_t(in.batch) * in.heads * ceil_div(in.head_dim, kVSlice);
  return launch<QuantizeVArguments>(finish, slices, kVThreads, 0, stream, args);
}

template <DType kIn>
Status launch_quantize_v(QuantizeVParams const& p, cudaStream_t stream) {
  if constexpr (kIn == DType::kE4M3)
    return launch_transpose_v<kIn>(p, stream);
  else
    return launch_round_v<kIn>(p, stream);
}

}  // namespace hopper_fa

#define HOPPER_FA_QUANTIZE_V_INSTANCE(dtype)                                                        \
  template hopper_fa::Status hopper_fa::launch_quantize_v<dtype>(hopper_fa::QuantizeVParams const&, \
                                                                 cudaStream_t);
#define HOPPER_FA_QUANTIZE_16BIT_INSTANCE(dtype)                                                          \
  HOPPER_FA_QUANTIZE_V_INSTANCE(dtype)                                                                    \
  template hopper_fa::Status hopper_fa::launch_token_stats<dtype>(hopper_fa::TokenStatsParams const&,     \
                                                                  cudaStream_t);                          \
  template hopper_fa::Status hopper_fa::launch_quantize_rows<dtype>(hopper_fa::QuantizeRowsParams const&, \
                                                                    cudaStream_t);
#define HOPPER_FA_QUANTIZE_INSTANCE_bf16 HOPPER_FA_QUANTIZE_16BIT_INSTANCE(hopper_fa::DType::kBF16)
#define HOPPER_FA_QUANTIZE_INSTANCE_fp16 HOPPER_FA_QUANTIZE_16BIT_INSTANCE(hopper_fa::DType::kFP16)
#define HOPPER_FA_QUANTIZE_INSTANCE_e4m3 HOPPER_FA_QUANTIZE_V_INSTANCE(hopper_fa::DType::kE4M3)
#define HOPPER_FA_QUANTIZE_INSTANCE(dtype) HOPPER_FA_QUANTIZE_INSTANCE_##dtype
