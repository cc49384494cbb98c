#include "hopper_forward_kernel.cuh"

cudaError_t mmkernels_patch_forward_sm90_14_bf16(const mmkernels::PatchForward* params, cudaStream_t stream) {
  return mmkernels::patch_forward::hopper::launch<__nv_bfloat16, 14>(*params, stream);
}
