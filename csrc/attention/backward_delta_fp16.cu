#include "backward_delta_kernel.cuh"

cudaError_t mmkernels_attention_delta_fp16(const mmkernels::AttentionDelta* params, cudaStream_t stream) {
  return mmkernels::launch_attention_delta<__half>(*params, stream);
}
