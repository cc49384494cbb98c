// Attention's backward pass: host launchers of the kernels for compute capability 9.0. They want queries and
// keys, and strides that are not 0 where the size is above 1.
#pragma once

#include "backward.h"

// One for each padded head dim and dtype. Weak: null where the build left the instance out.
extern "C" {
#define MMKERNELS_LAUNCHER(NAME) \
  __attribute__((weak, visibility("default"))) mmkernels::AttentionBackwardLauncher NAME
MMKERNELS_LAUNCHER(mmkernels_attention_backward_sm90_64_fp16);
MMKERNELS_LAUNCHER(mmkernels_attention_backward_sm90_64_bf16);
MMKERNELS_LAUNCHER(mmkernels_attention_backward_sm90_80_fp16);
MMKERNELS_LAUNCHER(mmkernels_attention_backward_sm90_80_bf16);
MMKERNELS_LAUNCHER(mmkernels_attention_backward_sm90_96_fp16);
MMKERNELS_LAUNCHER(mmkernels_attention_backward_sm90_96_bf16);
MMKERNELS_LAUNCHER(mmkernels_attention_backward_sm90_128_fp16);
MMKERNELS_LAUNCHER(mmkernels_attention_backward_sm90_128_bf16);
#undef MMKERNELS_LAUNCHER
}
