#include "backward_kernel.cuh"

cudaError_t mmkernels_attention_backward_128_fp16(const mmkernels::AttentionBackward* params,
                                                  cudaStream_t stream) {
  return mmkernels::launch_attention_backward<__half, 128>(*params, stream);
}
