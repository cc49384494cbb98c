// Attention's backward pass as ops: they check their tensors, fill the kernels' parameters and launch them.
#include <climits>

#include "check.h"
#include "hopper_backward.h"
#include "inputs.h"
#include "instances.h"
#include "ops.h"

namespace mmkernels {
namespace {

Launchers<AttentionBackwardLauncher> launchers(int64_t head_dim, bool bfloat16) {
  MMKERNELS_RETURN_LAUNCHERS(backward);
}

AttentionDeltaLauncher* attention_delta_launcher(bool bfloat16) {
  return bfloat16 ? mmkernels_attention_delta_bf16 : mmkernels_attention_delta_fp16;
}

void check_dtype(const char* name, const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, name,
                  " must be float16 or bfloat16");
}

// The pointer and strides of one of a mask's bounds, (1 or batch, length).
const int32_t* bound(const char* name, const std::optional<Tensor>& x, int32_t device, int64_t batch,
                     int64_t length, int64_t& stride_b, int64_t& stride_s) {
  if (!x.has_value()) return nullptr;
  check_kind(name, *x, device, ScalarType::Int);
  check_sizes(name, *x, {-1, length});
  STD_TORCH_CHECK(x->size(0) == 1 || x->size(0) == batch, name, " is of ", x->size(0),
                  " batch elements, not 1 or ", batch);
  stride_b = x->size(0) == 1 ? 0 : x->stride(0);
  stride_s = x->stride(1);
  return static_cast<const int32_t*>(x->data_ptr());
}

}  // namespace

bool attention_backward_built(int64_t head_dim, bool bfloat16) {
  return launchers(head_dim, bfloat16).portable != nullptr && attention_delta_launcher(bfloat16) != nullptr;
}

void attention_delta(const Tensor& dout, const Tensor& out, const std::optional<Tensor>& dlse,
                     const Tensor& lse, const Tensor& delta) {
  const int32_t device = out.get_device_index();
  const ScalarType dtype = out.scalar_type();
  check_dtype("out", out);
  check_sizes("out", out, {-1, -1, -1, -1});
  const int64_t batch = out.size(0), seqlen_q = out.size(1), heads = out.size(2), head_dim = out.size(3);
  check_sizes("dout", dout, {batch, seqlen_q, heads, head_dim});
  STD_TORCH_CHECK(head_dim % 8 == 0, "out has a head dim of ", head_dim, ", no multiple of 8");
  STD_TORCH_CHECK(seqlen_q < INT_MAX / 2, "a sequence is too long");
  for (const auto& [name, x] : {std::pair{"dout", &dout}, {"out", &out}}) {
    check_kind(name, *x, device, dtype);
    check_copyable(name, *x);
  }
  for (const auto& [name, x] : {std::pair{"lse", &lse}, {"delta", &delta}}) {
    check_kind(name, *x, device, ScalarType::Float);
    check_sizes(name, *x, {batch, heads, seqlen_q});
    STD_TORCH_CHECK(x->is_contiguous(), name, " must be contiguous");
  }

  AttentionDelta p = {};
  if (dlse.has_value()) {
    check_kind("dlse", *dlse, device, ScalarType::Float);
    check_sizes("dlse", *dlse, {batch, heads, seqlen_q});
    p.dlse = static_cast<const float*>(dlse->data_ptr());
    p.stride_dlse_b = dlse->stride(0), p.stride_dlse_h = dlse->stride(1), p.stride_dlse_s = dlse->stride(2);
  }
  p.dout = dout.data_ptr(), p.out = out.data_ptr();
  p.lse = static_cast<const float*>(lse.data_ptr());
  p.delta = static_cast<float*>(delta.data_ptr());
  p.stride_doutb = step(dout, 0), p.stride_douts = step(dout, 1), p.stride_douth = step(dout, 2);
  p.stride_outb = step(out, 0), p.stride_outs = step(out, 1), p.stride_outh = step(out, 2);
  p.batch = int32_t(batch), p.seqlen_q = int32_t(seqlen_q), p.heads = int32_t(heads);
  p.head_dim = int32_t(head_dim);

  AttentionDeltaLauncher* launch = attention_delta_launcher(dtype == ScalarType::BFloat16);
  STD_TORCH_CHECK(launch != nullptr, "this build has no kernel for delta in this dtype");
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(launch(&p, current_stream(device)));
}

void attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Tensor& lse, const Tensor& delta, const std::optional<Tensor>& start,
                        const std::optional<Tensor>& end, const std::optional<Tensor>& row_start,
                        const std::optional<Tensor>& row_end, const Tensor& dq, const Tensor& dk,
                        const Tensor& dv, double softmax_scale, double softcap,
                        const std::optional<Tensor>& dq_sum, const std::optional<Tensor>& redo) {
  const int32_t device = q.get_device_index();
  const ScalarType dtype = q.scalar_type();
  check_dtype("q", q);
  check_sizes("q", q, {-1, -1, -1, -1});
  const int64_t batch = q.size(0), seqlen_q = q.size(1), heads = q.size(2), head_dim = q.size(3);
  check_sizes("k", k, {batch, -1, -1, head_dim});
  const int64_t seqlen_k = k.size(1), kv_heads = k.size(2);
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "q has ", heads, " heads, no multiple of k's ",
                  kv_heads);
  STD_TORCH_CHECK(seqlen_q < INT_MAX / 2 && seqlen_k < INT_MAX / 2, "a sequence is too long");
  for (const auto& [name, x] : {std::pair{"dout", &dout}, {"dq", &dq}})
    check_sizes(name, *x, {batch, seqlen_q, heads, head_dim});
  for (const auto& [name, x] : {std::pair{"v", &v}, {"dk", &dk}, {"dv", &dv}})
    check_sizes(name, *x, {batch, seqlen_k, kv_heads, head_dim});
  for (const auto& [name, x] :
       {std::pair{"dout", &dout}, {"q", &q}, {"k", &k}, {"v", &v}, {"dq", &dq}, {"dk", &dk}, {"dv", &dv}}) {
    check_kind(name, *x, device, dtype);
    check_copyable(name, *x);
  }
  for (const auto& [name, x] : {std::pair{"lse", &lse}, {"delta", &delta}}) {
    check_kind(name, *x, device, ScalarType::Float);
    check_sizes(name, *x, {batch, heads, seqlen_q});
  }
  for (const auto& [name, x] :
       {std::pair{"lse", &lse}, {"delta", &delta}, {"dq", &dq}, {"dk", &dk}, {"dv", &dv}})
    STD_TORCH_CHECK(x->is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(start.has_value() == end.has_value(), "start and end go together");
  STD_TORCH_CHECK(row_start.has_value() == row_end.has_value(), "row_start and row_end go together");

  AttentionBackward p = {};
  p.start = bound("start", start, device, batch, seqlen_q, p.stride_start_b, p.stride_start_s);
  p.end = bound("end", end, device, batch, seqlen_q, p.stride_end_b, p.stride_end_s);
  p.row_start =
      bound("row_start", row_start, device, batch, seqlen_k, p.stride_row_start_b, p.stride_row_start_s);
  p.row_end = bound("row_end", row_end, device, batch, seqlen_k, p.stride_row_end_b, p.stride_row_end_s);
  fill_inputs(p, q, k, v, softmax_scale, softcap);
  p.dout = dout.data_ptr();
  p.lse = static_cast<const float*>(lse.data_ptr());
  p.delta = static_cast<const float*>(delta.data_ptr());
  p.dq = dq.data_ptr(), p.dk = dk.data_ptr(), p.dv = dv.data_ptr();
  p.stride_doutb = step(dout, 0), p.stride_douts = step(dout, 1), p.stride_douth = step(dout, 2);

  const auto launch = launchers(head_dim, dtype == ScalarType::BFloat16);
  STD_TORCH_CHECK(launch.portable != nullptr, "this build has no kernel for a head dim of ", head_dim);
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const bool hopper = launch.hopper != nullptr && compute_capability(device) == 90 &&
                      hopper_takes_softcap(p.softcap) && q.numel() > 0 && k.numel() > 0 && boxable(dout) &&
                      boxable(q) && boxable(k) && boxable(v);
  if (hopper && dq_sum.has_value()) {
    STD_TORCH_CHECK(redo.has_value(), "dq_sum and redo go together");
    const int64_t tiles = (seqlen_q + SUM_ROWS - 1) / SUM_ROWS, padded = head_dim == 72 ? 80 : head_dim;
    check_kind("dq_sum", *dq_sum, device, ScalarType::Float);
    check_sizes("dq_sum", *dq_sum, {batch, heads, tiles, SUM_ROWS * padded});
    check_kind("redo", *redo, device, ScalarType::Int);
    check_sizes("redo", *redo, {batch, heads, tiles});
    STD_TORCH_CHECK(dq_sum->is_contiguous() && redo->is_contiguous(), "dq_sum and redo must be contiguous");
    p.dq_sum = static_cast<float*>(dq_sum->data_ptr());
    p.redo = static_cast<int32_t*>(redo->data_ptr());
  }
  check_launch((hopper ? launch.hopper : launch.portable)(&p, stream));
}

}  // namespace mmkernels
