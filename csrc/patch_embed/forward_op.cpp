// The patch embedding's forward pass as an op: checks its tensors, fills the kernel's parameters and launches
// it.
#include "check.h"
#include "forward.h"
#include "ops.h"
#include "pixel_check.h"

namespace mmkernels {
namespace {

// The portable and the Hopper kernel of a patch size and dtype; null if this build has none.
struct Launchers {
  PatchForwardLauncher* portable;
  PatchForwardLauncher* hopper;
};

Launchers launchers(int64_t patch, bool bfloat16) {
#define MMKERNELS_LAUNCHERS(PATCH)                                                                          \
  bfloat16 ? Launchers{mmkernels_patch_forward_##PATCH##_bf16, mmkernels_patch_forward_sm90_##PATCH##_bf16} \
           : Launchers {                                                                                    \
    mmkernels_patch_forward_##PATCH##_fp16, mmkernels_patch_forward_sm90_##PATCH##_fp16                     \
  }
  switch (patch) {
    case 14:
      return MMKERNELS_LAUNCHERS(14);
    case 16:
      return MMKERNELS_LAUNCHERS(16);
    default:
      return {nullptr, nullptr};
  }
#undef MMKERNELS_LAUNCHERS
}

// x, part of what follows the product, holds the weight's dtype or float32: is it the latter?
bool check_tail(const char* name, const Tensor& x, int32_t device, ScalarType dtype) {
  const bool is_float = x.scalar_type() == ScalarType::Float;
  check_kind(name, x, device, is_float ? ScalarType::Float : dtype);
  check_copyable(name, x);
  return is_float;
}

}  // namespace

bool patch_embed_forward_built(int64_t patch, bool bfloat16) {
  return launchers(patch, bfloat16).portable != nullptr;
}

void patch_embed_forward(const Tensor& pixels, const Tensor& weight, const std::optional<Tensor>& bias,
                         const std::optional<Tensor>& pos, const std::optional<Tensor>& prefix,
                         const std::optional<Tensor>& scale, const Tensor& out, int64_t step_h,
                         int64_t step_w, int64_t pos_first, int64_t pos_stride, bool pos_prefix) {
  const int32_t device = pixels.get_device_index();
  const ScalarType dtype = weight.scalar_type();
  check_sizes("weight", weight, {-1, -1, -1, -1});
  const int64_t dim = weight.size(0), channels = weight.size(1);
  const int64_t patch = weight.size(2), row = weight.size(3);
  const PatchGrid grid = patch_grid(pixels, channels, patch, row, step_h, step_w, dtype);
  const int64_t prefix_rows = prefix.has_value() ? prefix->size(1) : 0;
  const int64_t sample_rows = prefix_rows + grid.h * grid.w;
  STD_TORCH_CHECK(dim % 8 == 0, "the weight has ", dim, " rows, no multiple of 8");
  check_sizes("out", out, {grid.batch * sample_rows, dim});
  check_kind("weight", weight, device, dtype);
  check_kind("out", out, device, dtype);
  check_copyable("out", out);
  const bool whole_rows =
      weight.stride(3) == 1 && weight.stride(2) == row && (channels == 1 || weight.stride(1) == patch * row);
  STD_TORCH_CHECK(whole_rows && weight.stride(0) % 4 == 0 && uintptr_t(weight.data_ptr()) % 16 == 0,
                  "weight must start at a multiple of 16 bytes, its rows be contiguous, and start at "
                  "multiples of 4 elements");
  STD_TORCH_CHECK(out.is_contiguous(), "out must be contiguous");

  PatchForward p = {};
  fill_grid(p, pixels, grid, step_h, step_w);
  p.weight = weight.data_ptr(), p.out = out.data_ptr();
  p.channels = int32_t(channels), p.row = int32_t(row), p.dim = int32_t(dim);
  p.prefix_rows = int32_t(prefix_rows);
  p.stride_weight = weight.stride(0), p.parts = 1;
  if (bias.has_value()) {
    check_sizes("bias", *bias, {dim});
    p.bias_float = check_tail("bias", *bias, device, dtype);
    p.bias = bias->data_ptr();
  }
  if (scale.has_value()) {
    check_kind("scale", *scale, device, ScalarType::Float);
    check_sizes("scale", *scale, {scale->size(0) == 1 ? 1 : channels});
    STD_TORCH_CHECK(scale->is_contiguous(), "scale must be contiguous");
    p.scale = static_cast<const float*>(scale->data_ptr());
    p.parts = int32_t(scale->size(0));
  }
  if (prefix.has_value()) {
    check_sizes("prefix", *prefix, {prefix->size(0) == 1 ? 1 : grid.batch, prefix_rows, dim});
    p.prefix_float = check_tail("prefix", *prefix, device, dtype);
    p.prefix = prefix->data_ptr();
    p.stride_prefix_b = prefix->size(0) == 1 ? 0 : prefix->stride(0);
    p.stride_prefix_p = prefix->stride(1);
  }
  if (pos.has_value()) {
    check_sizes("pos", *pos, {-1, dim});
    p.pos_float = check_tail("pos", *pos, device, dtype);
    const int64_t slots = pos_prefix ? sample_rows : grid.h * grid.w;
    const int64_t last = pos_first + (grid.batch - 1) * pos_stride + slots;
    STD_TORCH_CHECK(pos_first >= 0 && pos_stride >= 0 && last <= pos->size(0), "pos has ", pos->size(0),
                    " slots, not ", last);
    p.pos = pos->data_ptr();
    p.stride_pos = pos->stride(0);
    p.pos_first = int32_t(pos_first), p.pos_stride = int32_t(pos_stride), p.pos_prefix = pos_prefix;
  }

  const Launchers launch = launchers(patch, dtype == ScalarType::BFloat16);
  STD_TORCH_CHECK(launch.portable != nullptr, "this build has no kernel for patches of ", patch);
  const torch::stable::accelerator::DeviceGuard guard(device);
  cudaDeviceGetAttribute(&p.processors, cudaDevAttrMultiProcessorCount, device);
  const bool hopper = launch.hopper != nullptr && compute_capability(device) == 90 &&
                      p.stride_weight % 8 == 0 && (patch == 16 || !p.bytes);
  check_launch((hopper ? launch.hopper : launch.portable)(&p, current_stream(device)));
}

}  // namespace mmkernels
