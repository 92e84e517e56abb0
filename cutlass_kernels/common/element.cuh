// CUTLASS's type of each element type.
#pragma once

#include <cutlass/numeric_types.h>

#include "hopper_fa/types.h"

namespace hopper_fa {

template <DType kDType>
struct ElementOf;
template <>
struct ElementOf<DType::kBF16> {
  using type = cutlass::bfloat16_t;
};
template <>
struct ElementOf<DType::kFP16> {
  using type = cutlass::half_t;
};
template <>
struct ElementOf<DType::kE4M3> {
  using type = cutlass::float_e4m3_t;
};
template <>
struct ElementOf<DType::kInt8> {
  using type = int8_t;
};

}  // namespace hopper_fa
