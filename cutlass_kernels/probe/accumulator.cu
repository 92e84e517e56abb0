// One warpgroup a problem: WGMMA m64n8k32 on e4m3, step after step into the same FP32 accumulator. Written to
// be plain, not fast.
#include <cuda_runtime_api.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/numeric_types.h>

#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include "common/wgmma.cuh"
#include "hopper_fa/probe.h"

namespace hopper_fa {
namespace {

using namespace cute;
using Element = cutlass::float_e4m3_t;
using Mma = decltype(make_tiled_mma(SM90_64x8x32_F32E4M3E4M3_SS_TN<>{}));

constexpr int kM = 64, kN = 8, kStep = 32;

__global__ void __launch_bounds__(128)
    accumulator_probe_kernel(__grid_constant__ AccumulatorProbeParams const params) {
  using LayoutA = decltype(tile_to_shape(GMMA::Layout_K_SW32_Atom<Element>{}, Shape<Int<kM>, Int<kStep>>{}));
  using LayoutB = decltype(tile_to_shape(GMMA::Layout_K_SW32_Atom<Element>{}, Shape<Int<kN>, Int<kStep>>{}));
  __shared__ alignas(1024) uint8_t a_bytes[kM * kStep];
  __shared__ alignas(1024) uint8_t b_bytes[kN * kStep];
  Tensor a = make_tensor(make_smem_ptr(reinterpret_cast<Element*>(a_bytes)), LayoutA{});
  Tensor b = make_tensor(make_smem_ptr(reinterpret_cast<Element*>(b_bytes)), LayoutB{});
  int64_t const problem = blockIdx.x;
  auto const* const a_global = static_cast<Element const*>(params.a) + problem * kM * params.k;
  auto const* const b_global = static_cast<Element const*>(params.b) + problem * kN * params.k;
  auto const shape = make_layout(Shape<Int<kM>, Int<kN>>{}, LayoutRight{});
  Tensor c = make_tensor(make_gmem_ptr(params.c + problem * kM * kN), shape);
  Tensor d = make_tensor(make_gmem_ptr(params.d + problem * kM * kN), shape);

  auto const thread = Mma{}.get_slice(threadIdx.x);
  Tensor sum = partition_fragment_C(Mma{}, Shape<Int<kM>, Int<kN>>{});
  copy(thread.partition_C(c), sum);
  auto const operands = Mma{}.get_slice(0);
  for (int k = 0; k < params.k; k += kStep) {
    for (int i = threadIdx.x; i < kM * kStep; i += 128)
      a(i / kStep, i % kStep) = a_global[int64_t(i / kStep) * params.k + k + i % kStep];
    for (int i = threadIdx.x; i < kN * kStep; i += 128)
      b(i / kStep, i % kStep) = b_global[int64_t(i / kStep) * params.k + k + i % kStep];
    cutlass::arch::fence_view_async_shared();
    __syncthreads();
    issue_product(Mma{}, operands.make_fragment_A(operands.partition_A(a)),
                  operands.make_fragment_B(operands.partition_B(b)), sum, true);
    wait_product<0>(sum);
    __syncthreads();
  }
  copy(sum, thread.partition_C(d));
}

}  // namespace

Status run_accumulator_probe(AccumulatorProbeParams const& params, CUstream_st* stream) {
  if (params.k < kStep || params.k % kStep != 0 || params.problems < 0) return Status::kInvalidArgument;
  if (params.problems == 0) return Status::kOk;
  accumulator_probe_kernel<<<params.problems, 128, 0, stream>>>(params);
  return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchError;
}

}  // namespace hopper_fa
