// Finds the instance a call asks for and runs it.
#include "hopper_fa/forward.h"

#include "forward/instance.h"

namespace hopper_fa {
namespace {

struct Instance {
  DType dtype;
  int tile;
  decltype(&launch_forward<DType::kBF16, 0>) launch;
};

#define HOPPER_FA_FORWARD_INSTANCE(dtype, head_dim, variant)  \
  {dtype_token::dtype, forward_tile_index(head_dim, variant), \
   &launch_forward<dtype_token::dtype, forward_tile_index(head_dim, variant)>},
constexpr Instance kInstances[] = {
#include "forward_instances.inc"
};

Instance const* find(DType dtype, int tile) {
  for (Instance const& i : kInstances)
    if (i.dtype == dtype && i.tile == tile) return &i;
  return nullptr;
}

// Rows of 8-bit Q and K count one byte an element, so strides must be multiples of 16 elements.
bool misstrided(TensorRef const& t) { return (t.batch_stride | t.row_stride | t.head_stride) % 16 != 0; }

bool misaligned(void const* data, int bytes) { return reinterpret_cast<uintptr_t>(data) % bytes != 0; }

bool misaligned(TensorRef const& t) { return misaligned(t.data, 16); }

// Vectors of keys are copied 16 bytes at a time.
bool misaligned(ScaleRef const& s) {
  return misaligned(s.data, 16) || (s.batch_stride | s.head_stride | s.group_stride) % 4 != 0;
}

}  // namespace

bool has_forward(DType dtype, int tile) { return find(dtype, tile) != nullptr; }

Status run_forward(ForwardParams const& p, CUstream_st* stream) {
  Instance const* const instance = find(p.dtype, p.tile);
  if (!instance) return Status::kNoInstance;
  if (p.batch < 0 || p.seqlen_q < 0 || p.seqlen_k < 0 || p.heads_kv < 1 || p.heads_q % p.heads_kv != 0 ||
      p.head_dim < 8 || p.head_dim % 8 != 0 || p.head_dim > kForwardTiles[p.tile].head_dim ||
      misaligned(p.q) || misaligned(p.k) || misaligned(p.v) || misaligned(p.out) || !p.workspace)
    return Status::kInvalidArgument;
  if (is_8bit(p.dtype) &&
      (misstrided(p.q) || !p.fp8.q_scale.data || p.fp8.q_group_rows < 1 || is_8bit(p.fp8.out_dtype) ||
       !p.fp8.v_scale || !p.fp8.v_mean || misaligned(p.fp8.v_scale, 16) || misaligned(p.fp8.v_mean, 16) ||
       (p.seqlen_k > 0 && (misstrided(p.k) || misstrided(p.v) || !p.fp8.k_scale.data))))
    return Status::kInvalidArgument;
  if (kForwardTiles[p.tile].key_vectors && p.seqlen_k > 0 &&
      (!p.key_bias.data || misaligned(p.key_bias) || misaligned(p.fp8.k_scale)))
    return Status::kInvalidArgument;
  if (p.batch == 0 || p.heads_q == 0 || p.seqlen_q == 0) return Status::kOk;
  Device const device = hopper_device();
  Status const status = device.sms > 0 ? instance->launch(p, device, stream) : Status::kWrongDevice;
  if (status != Status::kOk) cudaGetLastError();  // reported once: the next call must not find it
  return status;
}

}  // namespace hopper_fa
