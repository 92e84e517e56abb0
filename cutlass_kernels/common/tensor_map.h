// TMA descriptors of (batch, seqlen, heads, head_dim) tensors, encoded on the host.
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

// Boxes of box_rows rows by 64 16-bit columns (one 128-byte swizzle atom wide). What lies past seqlen or
// head_dim reads as zero: that is how odd lengths and head dims are padded.
inline Status encode_tensor_map(CUtensorMap& map, TensorRef const& t, DType dtype, int head_dim, int seqlen,
                                int heads, int batch, int box_rows) {
  auto const encode = tensor_map_encoder();
  if (!encode) return Status::kDriverError;
  cuuint64_t const sizes[4] = {cuuint64_t(head_dim), cuuint64_t(seqlen), cuuint64_t(heads),
                               cuuint64_t(batch)};
  // The stride of a dimension of size 1 is never used, and frameworks put anything there.
  auto const bytes = [](int64_t stride, int size) {
    return size > 1 ? cuuint64_t(stride) * 2 : cuuint64_t(16);
  };
  cuuint64_t const strides[3] = {bytes(t.row_stride, seqlen), bytes(t.head_stride, heads),
                                 bytes(t.batch_stride, batch)};
  cuuint32_t const box[4] = {64, cuuint32_t(box_rows), 1, 1};
  cuuint32_t const element_strides[4] = {1, 1, 1, 1};
  CUresult const result = encode(
      &map, dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
      t.data, sizes, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? Status::kOk : Status::kDriverError;
}

}  // namespace hopper_fa
