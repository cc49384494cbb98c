// The patch embedding's forward pass: parameters and host launchers of the CUDA kernels.
//
// pixels (B, C, H, W) have a last stride of 1 and hold the weight's dtype or bytes; the rows of weight
// (D, C, P, R) are contiguous, R being P; where channels come last they count as one, in longer rows, R being
// P times the channels; bias (D); pos (slots, D) and prefix (1 or B, prefix_rows, D) have a last stride
// of 1; out (B * sample_rows, D) is contiguous, sample_rows = prefix_rows + grid_h grid_w. All hold the
// weight's dtype, where no flag says float32. Pointers of weight, bias, pos, prefix and out are multiples of
// 16 bytes, D and the strides of pos and prefix multiples of 8, stride_weight of 4. Copies of pixels are 16
// bytes long where P is 16, else two pixels: R, and where a patch starts, and each of its rows, are multiples
// of that. tests/patch_embed/cuda_harness.py repeats the struct.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace mmkernels {

struct PatchForward {
  const void* pixels;
  const void* weight;
  const void* bias;    // null: none
  const float* scale;  // (parts); null: all 1
  const void* pos;     // null: none
  const void* prefix;  // null: none
  void* out;
  // In elements.
  int64_t stride_xb, stride_xc, stride_xh;
  int64_t stride_weight;
  int64_t stride_pos, stride_prefix_b, stride_prefix_p;
  int32_t batch, channels, row, dim;       // row: R
  int32_t grid_h, grid_w, step_h, step_w;  // patches of a sample, and pixels from one to the next
  int32_t prefix_rows;
  int32_t pos_first, pos_stride;  // slot of the first sample's first row, slots from sample to sample
  int32_t parts;                  // 1 or C: after each of them the sums so far are multiplied by its scale
  int32_t processors;             // multiprocessors of the GPU
  bool bytes;                     // pixels are uint8
  bool bias_float, pos_float, prefix_float;  // float32, not of the weight's dtype
  bool pos_prefix;                           // the slots of a sample begin with its prefix
};

using PatchForwardLauncher = cudaError_t(const PatchForward*, cudaStream_t);

}  // namespace mmkernels

// One launcher per patch size and dtype; those for Hopper serve compute capability 9.0, rows of the weight
// that start at multiples of 16 bytes, and bytes in patches of 16. Weak: null where the build left the
// instance out.
extern "C" {
#define MMKERNELS_LAUNCHER(NAME) \
  __attribute__((weak, visibility("default"))) mmkernels::PatchForwardLauncher NAME
MMKERNELS_LAUNCHER(mmkernels_patch_forward_14_fp16);
MMKERNELS_LAUNCHER(mmkernels_patch_forward_14_bf16);
MMKERNELS_LAUNCHER(mmkernels_patch_forward_16_fp16);
MMKERNELS_LAUNCHER(mmkernels_patch_forward_16_bf16);
MMKERNELS_LAUNCHER(mmkernels_patch_forward_sm90_14_fp16);
MMKERNELS_LAUNCHER(mmkernels_patch_forward_sm90_14_bf16);
MMKERNELS_LAUNCHER(mmkernels_patch_forward_sm90_16_fp16);
MMKERNELS_LAUNCHER(mmkernels_patch_forward_sm90_16_bf16);
#undef MMKERNELS_LAUNCHER
}
