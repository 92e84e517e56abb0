// TMA descriptors of 4-dimensional tensors, encoded on the host.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "hopper_fa/types.h"

namespace hopper_fa {

// NOTE: looked up at run time through the runtime library, so that importing the package needs no driver.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static decltype(&cuTensorMapEncodeTiled) const encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaError_t const error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                               cudaEnableDefault, &found);
    bool const ok = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return ok ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function) : nullptr;
  }();
  return encoder;
}

// Extents of a tensor behind a TensorRef. For Q and K columns are the head dim and rows the sequence.
struct TensorSizes {
  int columns, rows, heads, batch;
};

// Boxes of box_rows rows by box_columns columns: 128 or 64 bytes wide, swizzled in that width. What lies past
// the sizes reads as zero: that is how odd lengths and head dims are padded.
inline Status encode_tensor_map(CUtensorMap& map, TensorRef const& t, DType dtype, TensorSizes const& n,
                                int box_columns, int box_rows) {
  auto const encode = tensor_map_encoder();
  if (!encode) return Status::kDriverError;
  CUtensorMapDataType const type = dtype == DType::kBF16   ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                   : dtype == DType::kFP16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                           : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  int const element_bytes = is_8bit(dtype) ? 1 : 2;
  cuuint64_t const sizes[4] = {cuuint64_t(n.columns), cuuint64_t(n.rows), cuuint64_t(n.heads),
                               cuuint64_t(n.batch)};
  // The stride of a dimension of size 1 is never used, and frameworks put anything there.
  auto const bytes = [&](int64_t stride, int size) {
    return size > 1 ? cuuint64_t(stride) * element_bytes : cuuint64_t(16);
  };
  cuuint64_t const strides[3] = {bytes(t.row_stride, n.rows), bytes(t.head_stride, n.heads),
                                 bytes(t.batch_stride, n.batch)};
  cuuint32_t const box[4] = {cuuint32_t(box_columns), cuuint32_t(box_rows), 1, 1};
  cuuint32_t const element_strides[4] = {1, 1, 1, 1};
  auto const encoded = [&] {
    return encode(&map, type, 4, t.data, sizes, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  box_columns * element_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
  };
  if (encoded()) return Status::kOk;
  // NOTE: the driver encodes in a context only, and a thread may have none yet, as torch's does whose first
  // work is our backward. The runtime binds one when it is told the device again.
  int device;
  bool const bound = cudaGetDevice(&device) == cudaSuccess && cudaSetDevice(device) == cudaSuccess;
  return bound && encoded() ? Status::kOk : Status::kDriverError;
}

}  // namespace hopper_fa
