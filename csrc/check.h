// Checks of an op's arguments, and the stream to launch on, over LibTorch's stable ABI.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

// Hidden behind USE_CUDA in torch's header. Weak: a torch built for the CPU only has no such function.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** stream);

namespace mmkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// x has these sizes; one of -1 is not looked at.
inline void check_sizes(const char* name, const Tensor& x, std::initializer_list<int64_t> sizes) {
  const int64_t dims = sizes.size();
  STD_TORCH_CHECK(x.dim() == dims, name, " has ", x.dim(), " dimensions, not ", dims);
  int64_t dim = 0;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(size < 0 || x.size(dim) == size, name, " has size ", x.size(dim), " in dimension ", dim,
                    ", not ", size);
    ++dim;
  }
}

// x lies on `device` and holds `dtype`.
inline void check_kind(const char* name, const Tensor& x, int32_t device, ScalarType dtype) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == device, name, " is not on CUDA device ", device);
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, " has another dtype than this op takes");
}

// Sixteen bytes can be copied from any element whose place in the last dimension is a multiple of 8.
inline void check_copyable(const char* name, const Tensor& x) {
  const int64_t last = x.dim() - 1;
  bool aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 && x.stride(last) == 1;
  for (int64_t dim = 0; dim < last; ++dim) aligned = aligned && (x.size(dim) <= 1 || x.stride(dim) % 8 == 0);
  STD_TORCH_CHECK(aligned, name, " must start at a multiple of 16 bytes, with a last stride of 1 and all ",
                  "others multiples of 8");
}

// A step in a dimension of one element leads nowhere, and need not be aligned.
inline int64_t step(const Tensor& x, int64_t dim) { return x.size(dim) <= 1 ? 0 : x.stride(dim); }

// TMA takes boxes of x, which is also `copyable`.
inline bool boxable(const Tensor& x) {
  constexpr int64_t MAX_STRIDE = int64_t(1) << 39;  // elements of 16 bits
  for (int64_t dim = 0; dim + 1 < x.dim(); ++dim)
    if (x.size(dim) > 1 && (x.stride(dim) <= 0 || x.stride(dim) >= MAX_STRIDE)) return false;
  return true;
}

// 90 of 9.0.
inline int compute_capability(int32_t device) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return major * 10 + minor;
}

inline cudaStream_t current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch is built without CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
                  "torch has no current stream on CUDA device ", device);
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would find this error
  STD_TORCH_CHECK(false, "the kernel was not launched: ", cudaGetErrorString(error));
}

}  // namespace mmkernels
