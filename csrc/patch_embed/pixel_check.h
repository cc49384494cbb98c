// Checks of the pixels of an op, and the parameters that follow from them.
#pragma once

#include <climits>

#include "check.h"

namespace mmkernels {

struct PatchGrid {
  int64_t batch, h, w;
};

// The whole patches, C times `patch` rows of `row` values, of pixels (B, C, H, W) that hold `dtype` or bytes
// and can be copied in the kernels' pieces.
inline PatchGrid patch_grid(const Tensor& pixels, int64_t channels, int64_t patch, int64_t row,
                            int64_t step_h, int64_t step_w, ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "the weight must be float16 or bfloat16");
  const bool bytes = pixels.scalar_type() == ScalarType::Byte;
  check_sizes("pixels", pixels, {-1, channels, -1, -1});
  check_kind("pixels", pixels, pixels.get_device_index(), bytes ? ScalarType::Byte : dtype);
  const int64_t height = pixels.size(2), width = pixels.size(3);
  STD_TORCH_CHECK(step_h > 0 && step_w > 0 && height >= patch && row > 0 && width >= row,
                  "pixels hold no whole patch");
  const int64_t piece = patch == 16 ? (bytes ? 16 : 8) : 2;
  bool aligned = reinterpret_cast<uintptr_t>(pixels.data_ptr()) % (bytes ? piece : 2 * piece) == 0;
  for (int64_t dim = 0; dim < 3; ++dim)
    aligned = aligned && (pixels.size(dim) <= 1 || pixels.stride(dim) % piece == 0);
  STD_TORCH_CHECK(aligned && pixels.stride(3) == 1 && step_w % piece == 0 && row % piece == 0,
                  "patches must start at multiples of ", piece, " pixels, with a last stride of 1");
  const PatchGrid grid = {pixels.size(0), (height - patch) / step_h + 1, (width - row) / step_w + 1};
  STD_TORCH_CHECK(grid.batch * grid.h * grid.w < INT_MAX / 2, "there are too many patches");
  return grid;
}

// The fields that the forward pass and the weight's gradient share.
template <typename Parameters>
void fill_grid(Parameters& p, const Tensor& pixels, const PatchGrid& grid, int64_t step_h, int64_t step_w) {
  p.pixels = pixels.data_ptr();
  p.bytes = pixels.scalar_type() == ScalarType::Byte;
  p.stride_xb = pixels.stride(0), p.stride_xc = pixels.stride(1), p.stride_xh = pixels.stride(2);
  p.batch = int32_t(grid.batch), p.grid_h = int32_t(grid.h), p.grid_w = int32_t(grid.w);
  p.step_h = int32_t(step_h), p.step_w = int32_t(step_w);
}

}  // namespace mmkernels
