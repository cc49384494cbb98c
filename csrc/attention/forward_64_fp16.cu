#include "forward_kernel.cuh"

cudaError_t mmkernels_attention_forward_64_fp16(const mmkernels::AttentionForward* params,
                                                cudaStream_t stream) {
  return mmkernels::launch_attention_forward<__half, 64>(*params, stream);
}
