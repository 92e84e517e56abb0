// The seam between the dispatcher (host compiler) and the generated translation units (nvcc).
#pragma once

#include <cuda_runtime_api.h>

#include "common/device.h"
#include "common/dtype_token.h"
#include "common/tile_table.h"
#include "hopper_fa/forward.h"

namespace hopper_fa {

template <DType kDType, int kTileIndex>
Status launch_forward(ForwardParams const& params, Device device, cudaStream_t stream);

}  // namespace hopper_fa
