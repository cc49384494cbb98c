// Attention's forward pass as an op: checks its tensors, fills the kernel's parameters and launches it.
#include <climits>

#include "check.h"
#include "forward.h"
#include "inputs.h"
#include "instances.h"
#include "ops.h"

namespace mmkernels {
namespace {

Launchers<AttentionForwardLauncher> launchers(int64_t head_dim, bool bfloat16) {
  MMKERNELS_RETURN_LAUNCHERS(forward);
}

}  // namespace

bool attention_forward_built(int64_t head_dim, bool bfloat16) {
  return launchers(head_dim, bfloat16).portable != nullptr;
}

void attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& start,
                       const std::optional<Tensor>& end, const Tensor& out, const Tensor& lse,
                       const std::optional<Tensor>& redo, double softmax_scale, double softcap) {
  const int32_t device = q.get_device_index();
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "q must be float16 or bfloat16");
  check_sizes("q", q, {-1, -1, -1, -1});
  const int64_t batch = q.size(0), seqlen_q = q.size(1), heads = q.size(2), head_dim = q.size(3);
  check_sizes("k", k, {batch, -1, -1, head_dim});
  const int64_t seqlen_k = k.size(1), kv_heads = k.size(2);
  check_sizes("v", v, {batch, seqlen_k, kv_heads, head_dim});
  check_sizes("out", out, {batch, seqlen_q, heads, head_dim});
  check_sizes("lse", lse, {batch, heads, seqlen_q});
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "q has ", heads, " heads, no multiple of k's ",
                  kv_heads);
  STD_TORCH_CHECK(seqlen_q < INT_MAX / 2 && seqlen_k < INT_MAX / 2, "a sequence is too long");
  for (const auto& [name, x] : {std::pair{"q", &q}, {"k", &k}, {"v", &v}, {"out", &out}}) {
    check_kind(name, *x, device, dtype);
    check_copyable(name, *x);
  }
  check_kind("lse", lse, device, ScalarType::Float);
  STD_TORCH_CHECK(out.is_contiguous() && lse.is_contiguous(), "out and lse must be contiguous");

  AttentionForward p = {};
  STD_TORCH_CHECK(start.has_value() == end.has_value(), "start and end go together");
  if (start.has_value()) {
    for (const auto& [name, x] : {std::pair{"start", &*start}, {"end", &*end}}) {
      check_kind(name, *x, device, ScalarType::Int);
      check_sizes(name, *x, {x->size(0) == 1 ? 1 : batch, seqlen_q});
    }
    p.start = static_cast<const int32_t*>(start->data_ptr());
    p.end = static_cast<const int32_t*>(end->data_ptr());
    p.stride_start_b = start->size(0) == 1 ? 0 : start->stride(0);
    p.stride_end_b = end->size(0) == 1 ? 0 : end->stride(0);
    p.stride_start_s = start->stride(1);
    p.stride_end_s = end->stride(1);
  }
  fill_inputs(p, q, k, v, softmax_scale, softcap);
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());

  const auto launch = launchers(head_dim, dtype == ScalarType::BFloat16);
  STD_TORCH_CHECK(launch.portable != nullptr, "this build has no kernel for a head dim of ", head_dim);
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const bool hopper = launch.hopper != nullptr && compute_capability(device) == 90 &&
                      hopper_takes_softcap(p.softcap) && seqlen_k > 0 && boxable(q) && boxable(k) &&
                      boxable(v);
  if (!hopper) return check_launch(launch.portable(&p, stream));
  if (p.start != nullptr) {
    STD_TORCH_CHECK(redo.has_value(), "with start, Hopper's kernel needs redo");
    check_kind("redo", *redo, device, ScalarType::Int);
    check_sizes("redo", *redo, {batch, heads, (seqlen_q + REDO_ROWS - 1) / REDO_ROWS});
    STD_TORCH_CHECK(redo->is_contiguous(), "redo must be contiguous");
    p.redo = static_cast<int32_t*>(redo->data_ptr());
  }
  check_launch(launch.hopper(&p, stream));
  if (p.redo != nullptr) check_launch(launch.portable(&p, stream));
}

}  // namespace mmkernels
