// The gradient of the patch embedding's weight: parameters and host launchers of the CUDA kernels.
//
// pixels (B, C, H, W) and R are as in forward.h; dout (B * sample_rows, D) is contiguous, sample_rows =
// prefix_rows + grid_h grid_w; partial (splits, D, C, P, R) and dweight (D, C, P, R) are contiguous float32.
// D is a multiple of 8, and the pointers but that of the pixels multiples of 16 bytes.
// tests/patch_embed/cuda_harness.py repeats the struct.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace mmkernels {

struct PatchWeight {
  const void* dout;
  const void* pixels;
  const float* scale;  // (C): of the pixels; null: all 1
  float* partial;
  float* dweight;
  int64_t stride_xb, stride_xc, stride_xh;  // in elements
  int32_t batch, channels, row, dim;        // row: R
  int32_t grid_h, grid_w, step_h, step_w;   // patches of a sample, and pixels from one to the next
  int32_t prefix_rows;
  int32_t splits;  // shares of the patches that are summed apart
  bool bytes;      // pixels are uint8
};

using PatchWeightLauncher = cudaError_t(const PatchWeight*, cudaStream_t);

}  // namespace mmkernels

// One launcher per patch size and dtype. Weak: null where the build left the instance out.
extern "C" {
#define MMKERNELS_LAUNCHER(NAME) \
  __attribute__((weak, visibility("default"))) mmkernels::PatchWeightLauncher NAME
MMKERNELS_LAUNCHER(mmkernels_patch_weight_14_fp16);
MMKERNELS_LAUNCHER(mmkernels_patch_weight_14_bf16);
MMKERNELS_LAUNCHER(mmkernels_patch_weight_16_fp16);
MMKERNELS_LAUNCHER(mmkernels_patch_weight_16_bf16);
#undef MMKERNELS_LAUNCHER
}
