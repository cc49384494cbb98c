// Launchers that tell test_ops.py of their parameters, and stand-ins for what the ops ask of a GPU: CPU
// tensors pass for CUDA ones, on a device of whatever compute capability.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "attention/forward.h"
#include "attention/hopper_backward.h"
#include "patch_embed/forward.h"
#include "patch_embed/weight.h"

extern "C" {
#define SHOWN __attribute__((visibility("default")))
SHOWN int capability = 80;
SHOWN int launch_error = 0;
SHOWN void (*record)(const char* launcher, const void* parameters, size_t size, cudaStream_t stream);

#define RECORDER(TYPE, NAME)                                                 \
  cudaError_t NAME(const mmkernels::TYPE* parameters, cudaStream_t stream) { \
    record(#NAME, parameters, sizeof(*parameters), stream);                  \
    return cudaError_t(launch_error);                                        \
  }
#define BOTH_DTYPES(TYPE, NAME) \
  RECORDER(TYPE, NAME##_bf16)   \
  RECORDER(TYPE, NAME##_fp16)
#define ATTENTION(D)                                                  \
  BOTH_DTYPES(AttentionForward, mmkernels_attention_forward_##D)      \
  BOTH_DTYPES(AttentionForward, mmkernels_attention_forward_sm90_##D) \
  BOTH_DTYPES(AttentionBackward, mmkernels_attention_backward_##D)    \
  BOTH_DTYPES(AttentionBackward, mmkernels_attention_backward_sm90_##D)
#define PATCH(P)                                              \
  BOTH_DTYPES(PatchForward, mmkernels_patch_forward_##P)      \
  BOTH_DTYPES(PatchForward, mmkernels_patch_forward_sm90_##P) \
  BOTH_DTYPES(PatchWeight, mmkernels_patch_weight_##P)
ATTENTION(64)
ATTENTION(80)
ATTENTION(96)
ATTENTION(128)
BOTH_DTYPES(AttentionDelta, mmkernels_attention_delta)
PATCH(14)
PATCH(16)

int32_t aoti_torch_device_type_cuda() { return aoti_torch_device_type_cpu(); }
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle*) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = &capability;  // any pointer that the test can tell
  return AOTI_TORCH_SUCCESS;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? capability / 10
           : attribute == cudaDevAttrComputeCapabilityMinor ? capability % 10
                                                            : 4;  // multiprocessors
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "as the test wants it"; }
}
