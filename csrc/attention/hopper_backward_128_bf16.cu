#include "hopper_backward_kernel.cuh"

cudaError_t mmkernels_attention_backward_sm90_128_bf16(const mmkernels::AttentionBackward* params,
                                                       cudaStream_t stream) {
  return mmkernels::hopper::launch_attention_backward<__nv_bfloat16, 128>(*params, stream);
}
