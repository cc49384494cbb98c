#include "backward_kernel.cuh"

cudaError_t mmkernels_attention_backward_64_fp16(const mmkernels::AttentionBackward* params,
                                                 cudaStream_t stream) {
  return mmkernels::launch_attention_backward<__half, 64>(*params, stream);
}
