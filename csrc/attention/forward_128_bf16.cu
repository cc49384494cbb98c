#include "forward_kernel.cuh"

cudaError_t mmkernels_attention_forward_128_bf16(const mmkernels::AttentionForward* params,
                                                 cudaStream_t stream) {
  return mmkernels::launch_attention_forward<__nv_bfloat16, 128>(*params, stream);
}
