// Finds the instance a call asks for and runs it.
#include "hopper_fa/backward.h"

#include <initializer_list>

#include "backward/instance.h"
#include "common/block_range.h"

namespace hopper_fa {
namespace {

struct Instance {
  DType dtype;
  int tile;
  decltype(&launch_backward<DType::kBF16, 0>) launch;
};

#define HOPPER_FA_BACKWARD_INSTANCE(dtype, head_dim, variant)  \
  {dtype_token::dtype, backward_tile_index(head_dim, variant), \
   &launch_backward<dtype_token::dtype, backward_tile_index(head_dim, variant)>},
constexpr Instance kInstances[] = {
#include "backward_instances.inc"
    {DType::kE4M3, -1, nullptr}};

Instance const* find(DType dtype, int tile) {
  for (Instance const& i : kInstances)
    if (i.dtype == dtype && i.tile == tile && i.launch) return &i;
  return nullptr;
}

bool misaligned(void const* data) { return reinterpret_cast<uintptr_t>(data) % 16 != 0; }

// Whether the codes are what the tile takes.
bool codes_fit(BackwardParams const& p) {
  BackwardTile const& t = kBackwardTiles[p.tile];
  if (!p.codes) return t.factors == Factors::kNone;
  BackwardCodes const& c = *p.codes;
  bool const rows = p.batch > 0 && p.heads_q > 0 && p.seqlen_q > 0, keys = p.batch > 0 && p.seqlen_k > 0;
  bool const blocks = c.q_group_rows % 64 == 0 || c.q_group_rows >= p.seqlen_q;
  return (t.factors == Factors::kRow || (t.factors == Factors::kBlock && blocks)) && is_8bit(c.dtype) &&
         c.q_group_rows > 0 && c.k_group_rows > 0 &&
         (c.k_group_rows % 128 == 0 || c.k_group_rows >= p.seqlen_k) && c.v_channels >= p.head_dim &&
         (!rows || (c.q && c.q_scale.data && !misaligned(c.q))) &&
         (!keys || (c.k && c.v && c.k_scale.data && c.v_scale && !misaligned(c.k) && !misaligned(c.v)));
}

}  // namespace

bool has_backward(DType dtype, int tile) { return find(dtype, tile) != nullptr; }

BackwardWorkspace backward_workspace(int tile, int batch, int seqlen_q, int heads_q) {
  BackwardTile const& t = kBackwardTiles[tile];
  int64_t const blocks = int64_t(batch) * heads_q * ceil_div(seqlen_q, t.block_m);
  return {blocks * t.block_m * t.head_dim, blocks * t.block_m * (t.factors == Factors::kNone ? 2 : 3),
          blocks * 2};
}

Status run_backward(BackwardParams const& p, CUstream_st* stream) {
  Instance const* const instance = find(p.dtype, p.tile);
  if (!instance) return Status::kNoInstance;
  if (p.batch < 0 || p.seqlen_q < 0 || p.seqlen_k < 0 || p.heads_kv < 1 || p.heads_q % p.heads_kv != 0 ||
      p.head_dim < 8 || p.head_dim % 8 != 0 || p.head_dim > kBackwardTiles[p.tile].head_dim ||
      (p.batch > 0 && p.heads_q > 0 && p.seqlen_q > 0 &&
       (!p.turns || misaligned(p.dq_sum) || misaligned(p.rows))))
    return Status::kInvalidArgument;
  if (!codes_fit(p)) return Status::kInvalidArgument;
  // Frameworks put any address into a tensor without elements.
  if (p.batch > 0 && p.seqlen_q > 0)
    for (TensorRef const* t : {&p.q, &p.out, &p.dout, &p.dq})
      if (misaligned(t->data)) return Status::kInvalidArgument;
  if (p.batch > 0 && p.seqlen_k > 0)
    for (TensorRef const* t : {&p.k, &p.v, &p.dk, &p.dv})
      if (misaligned(t->data)) return Status::kInvalidArgument;
  if (p.batch == 0 || p.heads_q == 0 || (p.seqlen_q == 0 && p.seqlen_k == 0)) return Status::kOk;
  Device const device = hopper_device();
  Status const status = device.sms > 0 ? instance->launch(p, device, stream) : Status::kWrongDevice;
  if (status != Status::kOk) cudaGetLastError();  // reported once: the next call must not find it
  return status;
}

}  // namespace hopper_fa
