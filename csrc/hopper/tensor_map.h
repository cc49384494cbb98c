// Descriptors of tensors for TMA, made on the host.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace mmkernels {

// The widest row of a swizzled box, and what consecutive rows of it are swizzled in.
constexpr int SWIZZLE_BYTES = 128;

// Describes a tensor of RANK dimensions, fastest first, of 16-bit elements, whose boxes are 128-byte
// swizzled. strides: of dimensions 1 and on, in elements, multiples of 8; that of a dimension of size 1 is
// free. The driver's function is asked for through the runtime, so that nothing links to the driver.
template <int RANK>
cudaError_t make_tensor_map(CUtensorMap& map, const void* data, bool bfloat16, const int64_t (&sizes)[RANK],
                            const int64_t (&strides)[RANK - 1], const int (&box)[RANK]) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  cuuint64_t extents[RANK], steps[RANK - 1];
  cuuint32_t boxes[RANK], ones[RANK];
  for (int dim = 0; dim < RANK; ++dim) {
    extents[dim] = sizes[dim];
    boxes[dim] = box[dim];
    ones[dim] = 1;
    if (dim > 0) steps[dim - 1] = sizes[dim] == 1 ? 16 : strides[dim - 1] * 2;
  }
  const CUresult result = encode(
      &map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, RANK,
      const_cast<void*>(data), extents, steps, boxes, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace mmkernels
