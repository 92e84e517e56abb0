// The seam between the dispatcher (host compiler) and the generated translation units (nvcc): one for each
// input type. The 16-bit ones have every kernel; e4m3 has the transposition of V only.
#pragma once

#include <cuda_runtime_api.h>

#include "hopper_fa/quantize.h"

namespace hopper_fa {

template <DType kIn>
Status launch_token_stats(TokenStatsParams const& params, cudaStream_t stream);
template <DType kIn>
Status launch_quantize_rows(QuantizeRowsParams const& params, cudaStream_t stream);
template <DType kIn>
Status launch_quantize_v(QuantizeVParams const& params, cudaStream_t stream);

struct QuantizeInstance {
  DType dtype;
  decltype(&launch_token_stats<DType::kBF16>) token_stats;
  decltype(&launch_quantize_rows<DType::kBF16>) rows;
  decltype(&launch_quantize_v<DType::kBF16>) v;
};

template <DType kIn>
constexpr QuantizeInstance quantize_instance() {
  if constexpr (kIn == DType::kE4M3)
    return {kIn, nullptr, nullptr, &launch_quantize_v<kIn>};
  else
    return {kIn, &launch_token_stats<kIn>, &launch_quantize_rows<kIn>, &launch_quantize_v<kIn>};
}

}  // namespace hopper_fa
