// Types every kernel family shares. Plain data: no torch, no Python, no CUTLASS.
#pragma once

#include <cstdint>

namespace hopper_fa {

// kE4M3 and kInt8 name the type of Q and K; V and P are e4m3 in both.
enum class DType : int { kBF16 = 0, kFP16 = 1, kE4M3 = 2, kInt8 = 3 };

constexpr bool is_8bit(DType dtype) { return dtype == DType::kE4M3 || dtype == DType::kInt8; }

// Why a call did not launch. kOk means the kernel is in the stream, not that it has finished.
enum class Status : int {
  kOk = 0,
  kNoInstance = 1,       // this binary holds no kernel for the (dtype, head dim, variant)
  kInvalidArgument = 2,  // a size, stride or alignment the caller should have refused
  kWrongDevice = 3,      // the current device is not compute capability 9.0
  kDriverError = 4,      // the driver refused a tensor map or has no entry point for it
  kLaunchError = 5,      // the CUDA runtime refused the launch
};

// Dequantisation factors of one tensor: group g of head h of batch entry b at data[b * batch_stride + h *
// head_stride + g * group_stride]. A stride of 0 shares factors. Fewer than 2^31.
struct ScaleRef {
  float const* data;
  int batch_stride, head_stride, group_stride;
};

// One (batch, seqlen, heads, head_dim) tensor. Strides count elements; the last dimension is contiguous.
struct TensorRef {
  void* data;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t head_stride;
};

}  // namespace hopper_fa
