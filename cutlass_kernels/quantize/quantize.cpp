// Checks a call and finds the instance that it asks for.
#include "hopper_fa/quantize.h"

#include "common/device.h"
#include "common/dtype_token.h"
#include "quantize/instance.h"
#include "quantize/layout.h"

namespace hopper_fa {
namespace {

#define HOPPER_FA_QUANTIZE_INSTANCE(dtype) quantize_instance<dtype_token::dtype>(),
constexpr QuantizeInstance kInstances[] = {
#include "quantize_instances.inc"
    {},  // a build may hold none: no entry has this one's launch functions
};

template <class Launch>
Launch find(DType dtype, Launch QuantizeInstance::* launch) {
  for (QuantizeInstance const& i : kInstances)
    if (i.dtype == dtype && i.*launch) return i.*launch;
  return nullptr;
}

bool sound(QuantizeInput const& in) {
  constexpr int kLongest = 0x7fffffff - 1024;  // so that rounding a length up to a tile cannot overflow
  return in.batch >= 0 && in.seqlen >= 0 && in.seqlen <= kLongest && in.heads >= 0 && in.head_dim >= 8 &&
         in.head_dim % 8 == 0 && in.head_dim <= kMaxHeadDim &&
         reinterpret_cast<uintptr_t>(in.x.data) % 16 == 0;
}

template <class Params, class Launch>
Status run(Params const& p, Launch QuantizeInstance::* member, bool arguments_fit, CUstream_st* stream) {
  Launch const launch = find(p.in.dtype, member);
  if (!launch) return Status::kNoInstance;
  if (!sound(p.in)) return Status::kInvalidArgument;
  if (p.in.batch == 0 || p.in.heads == 0) return Status::kOk;  // before null pointers of empty tensors matter
  if (!arguments_fit) return Status::kInvalidArgument;
  if (hopper_device().sms == 0) return Status::kWrongDevice;
  Status const status = launch(p, stream);
  if (status != Status::kOk) cudaGetLastError();  // reported once: the next call must not find it
  return status;
}

bool is_v_granularity(Granularity g) {
  return g == Granularity::kTensor || g == Granularity::kHead || g == Granularity::kChannel;
}

}  // namespace

bool has_quantize(DType dtype) { return find(dtype, &QuantizeInstance::v) != nullptr; }

int64_t quantize_v_workspace(int batch, int seqlen, int heads, int head_dim) {
  return int64_t(batch) * heads * ceil_div(seqlen, kStatsChunk) * head_dim;
}

Status run_token_stats(TokenStatsParams const& p, CUstream_st* stream) {
  bool const sampled = p.shift > 0;
  bool const granularity = sampled ? p.granularity == Granularity::kChannel : is_v_granularity(p.granularity);
  bool const outgrown = p.amax && sampled;
  bool const overlap = p.overlap != Overlap::kAll || !p.amax || p.granularity == Granularity::kChannel;
  bool const fits = p.shift >= 0 && p.shift <= 6 && (!p.amax || granularity) &&
                    outgrown == (p.outgrown != nullptr) && overlap;
  return run(p, &QuantizeInstance::token_stats, fits, stream);
}

Status run_quantize_rows(QuantizeRowsParams const& p, CUstream_st* stream) {
  bool const whole_groups = p.q_heads_per_kv >= 1 && (!p.queries || p.in.heads % p.q_heads_per_kv == 0);
  bool const block_fits =
      p.granularity != Granularity::kBlock || p.rows_per_block == 64 || p.rows_per_block == 128;
  bool const one_pass = p.granularity == Granularity::kNone || p.granularity == Granularity::kBlock ||
                        p.granularity == Granularity::kToken;
  bool const granularity = p.granularity != Granularity::kChannel &&
                           (p.granularity != Granularity::kGroup || p.queries) &&
                           (p.granularity != Granularity::kNone || p.out_dtype == DType::kE4M3);
  bool const out_dtype = p.out_dtype == DType::kE4M3 || p.out_dtype == DType::kInt8;
  bool const overlap = p.overlap != Overlap::kAll || !p.amax;
  return run(p, &QuantizeInstance::rows,
             whole_groups && block_fits && (one_pass || p.amax) && granularity && out_dtype && overlap,
             stream);
}

Status run_quantize_v(QuantizeVParams const& p, CUstream_st* stream) {
  bool const moves = p.in.dtype == DType::kE4M3;
  bool const fits = (p.amax ? is_v_granularity(p.granularity) : p.granularity == Granularity::kNone) &&
                    (moves ? !p.mean && !p.amax : p.scale != nullptr) &&
                    (p.mean || !p.smooth && !p.compensate) && (p.workspace || !p.compensate) &&
                    (!p.outgrown || p.amax && p.granularity == Granularity::kChannel) &&
                    (p.overlap == Overlap::kNone || !moves);
  return run(p, &QuantizeInstance::v, fits, stream);
}

}  // namespace hopper_fa
