#include "forward_kernel.cuh"

cudaError_t mmkernels_patch_forward_16_fp16(const mmkernels::PatchForward* params, cudaStream_t stream) {
  return mmkernels::patch_forward::launch<__half, 16>(*params, stream);
}
