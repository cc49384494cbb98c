#include "hopper_forward_kernel.cuh"

cudaError_t mmkernels_patch_forward_sm90_14_fp16(const mmkernels::PatchForward* params, cudaStream_t stream) {
  return mmkernels::patch_forward::hopper::launch<__half, 14>(*params, stream);
}
