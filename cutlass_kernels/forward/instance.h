// The seam between the dispatcher (host compiler) and the generated translation units (nvcc).
#pragma once

#include <cuda_runtime_api.h>

#include "common/device.h"
#include "common/tile_table.h"
#include "hopper_fa/forward.h"

namespace hopper_fa {

template <DType kDType, int kTileIndex>
Status launch_forward(ForwardParams const& params, Device device, cudaStream_t stream);

namespace dtype_token {  // the names instances.cmake uses
constexpr DType bf16 = DType::kBF16, fp16 = DType::kFP16, e4m3 = DType::kE4M3, int8 = DType::kInt8;
}

}  // namespace hopper_fa
