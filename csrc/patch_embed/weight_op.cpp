// The gradient of the patch embedding's weight as an op: checks its tensors, fills the kernel's parameters
// and launches it.
#include "check.h"
#include "ops.h"
#include "pixel_check.h"
#include "weight.h"

namespace mmkernels {
namespace {

// Null if this build has no such instance.
PatchWeightLauncher* patch_weight_launcher(int64_t patch, bool bfloat16) {
  switch (patch) {
    case 14:
      return bfloat16 ? mmkernels_patch_weight_14_bf16 : mmkernels_patch_weight_14_fp16;
    case 16:
      return bfloat16 ? mmkernels_patch_weight_16_bf16 : mmkernels_patch_weight_16_fp16;
    default:
      return nullptr;
  }
}

}  // namespace

bool patch_embed_weight_built(int64_t patch, bool bfloat16) {
  return patch_weight_launcher(patch, bfloat16) != nullptr;
}

void patch_embed_weight(const Tensor& dout, const Tensor& pixels, const std::optional<Tensor>& scale,
                        const Tensor& partial, const Tensor& dweight, int64_t step_h, int64_t step_w) {
  const int32_t device = pixels.get_device_index();
  const ScalarType dtype = dout.scalar_type();
  check_sizes("dweight", dweight, {-1, -1, -1, -1});
  const int64_t dim = dweight.size(0), channels = dweight.size(1), patch = dweight.size(2);
  const int64_t row = dweight.size(3);
  check_sizes("partial", partial, {-1, dim, channels, patch, row});
  const PatchGrid grid = patch_grid(pixels, channels, patch, row, step_h, step_w, dtype);
  check_sizes("dout", dout, {-1, dim});
  const int64_t patches = grid.batch * grid.h * grid.w, prefixes = dout.size(0) - patches;
  STD_TORCH_CHECK(grid.batch > 0 && prefixes >= 0 && prefixes % grid.batch == 0, "dout has ", dout.size(0),
                  " rows, which do not fit ", patches, " patches of ", grid.batch, " samples");
  STD_TORCH_CHECK(dim % 8 == 0, "the weight has ", dim, " rows, no multiple of 8");
  check_kind("dout", dout, device, dtype);
  check_kind("partial", partial, device, ScalarType::Float);
  check_kind("dweight", dweight, device, ScalarType::Float);
  for (const auto& [name, x] : {std::pair{"dout", &dout}, {"partial", &partial}, {"dweight", &dweight}})
    STD_TORCH_CHECK(x->is_contiguous() && uintptr_t(x->data_ptr()) % 16 == 0, name,
                    " must be contiguous and start at a multiple of 16 bytes");

  PatchWeight p = {};
  fill_grid(p, pixels, grid, step_h, step_w);
  p.dout = dout.data_ptr();
  p.partial = static_cast<float*>(partial.data_ptr()), p.dweight = static_cast<float*>(dweight.data_ptr());
  p.channels = int32_t(channels), p.row = int32_t(row), p.dim = int32_t(dim);
  p.prefix_rows = int32_t(prefixes / grid.batch);
  p.splits = int32_t(partial.size(0));
  if (scale.has_value()) {
    check_kind("scale", *scale, device, ScalarType::Float);
    check_sizes("scale", *scale, {channels});
    STD_TORCH_CHECK(scale->is_contiguous(), "scale must be contiguous");
    p.scale = static_cast<const float*>(scale->data_ptr());
  }

  PatchWeightLauncher* launch = patch_weight_launcher(patch, dtype == ScalarType::BFloat16);
  STD_TORCH_CHECK(launch != nullptr, "this build has no kernel for patches of ", patch);
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(launch(&p, current_stream(device)));
}

}  // namespace mmkernels
