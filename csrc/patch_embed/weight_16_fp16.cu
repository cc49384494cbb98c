#include "weight_kernel.cuh"

cudaError_t mmkernels_patch_weight_16_fp16(const mmkernels::PatchWeight* params, cudaStream_t stream) {
  return mmkernels::patch_weight::launch<__half, 16>(*params, stream);
}
