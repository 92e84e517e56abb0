// The names that instances.cmake uses for element types.
#pragma once

#include "hopper_fa/types.h"

namespace hopper_fa::dtype_token {

constexpr DType bf16 = DType::kBF16, fp16 = DType::kFP16, e4m3 = DType::kE4M3, int8 = DType::kInt8;

}  // namespace hopper_fa::dtype_token
