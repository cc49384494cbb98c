#include "backward_delta_kernel.cuh"

cudaError_t mmkernels_attention_delta_bf16(const mmkernels::AttentionDelta* params, cudaStream_t stream) {
  return mmkernels::launch_attention_delta<__nv_bfloat16>(*params, stream);
}
