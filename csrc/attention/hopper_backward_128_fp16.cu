#include "hopper_backward_kernel.cuh"

cudaError_t mmkernels_attention_backward_sm90_128_fp16(const mmkernels::AttentionBackward* params,
                                                       cudaStream_t stream) {
  return mmkernels::hopper::launch_attention_backward<__half, 128>(*params, stream);
}
