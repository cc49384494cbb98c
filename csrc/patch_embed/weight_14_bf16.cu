#include "weight_kernel.cuh"

cudaError_t mmkernels_patch_weight_14_bf16(const mmkernels::PatchWeight* params, cudaStream_t stream) {
  return mmkernels::patch_weight::launch<__nv_bfloat16, 14>(*params, stream);
}
