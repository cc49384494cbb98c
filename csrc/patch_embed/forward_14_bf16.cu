#include "forward_kernel.cuh"

cudaError_t mmkernels_patch_forward_14_bf16(const mmkernels::PatchForward* params, cudaStream_t stream) {
  return mmkernels::patch_forward::launch<__nv_bfloat16, 14>(*params, stream);
}
