// The ops that ops.cpp registers; each takes tensors that the caller allocated.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace mmkernels {

using torch::stable::Tensor;

// Does this build hold a forward kernel for the head dim and dtype?
bool attention_forward_built(int64_t head_dim, bool bfloat16);

void attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& start,
                       const std::optional<Tensor>& end, const Tensor& out, const Tensor& lse,
                       const std::optional<Tensor>& redo, double softmax_scale, double softcap);

// Does this build hold the backward kernels for the head dim and dtype?
bool attention_backward_built(int64_t head_dim, bool bfloat16);

void attention_delta(const Tensor& dout, const Tensor& out, const std::optional<Tensor>& dlse,
                     const Tensor& lse, const Tensor& delta);

void attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Tensor& lse, const Tensor& delta, const std::optional<Tensor>& start,
                        const std::optional<Tensor>& end, const std::optional<Tensor>& row_start,
                        const std::optional<Tensor>& row_end, const Tensor& dq, const Tensor& dk,
                        const Tensor& dv, double softmax_scale, double softcap,
                        const std::optional<Tensor>& dq_sum, const std::optional<Tensor>& redo);

// Does this build hold kernels for square patches of this size and the weight's dtype?
bool patch_embed_forward_built(int64_t patch, bool bfloat16);
bool patch_embed_weight_built(int64_t patch, bool bfloat16);

void patch_embed_forward(const Tensor& pixels, const Tensor& weight, const std::optional<Tensor>& bias,
                         const std::optional<Tensor>& pos, const std::optional<Tensor>& prefix,
                         const std::optional<Tensor>& scale, const Tensor& out, int64_t step_h,
                         int64_t step_w, int64_t pos_first, int64_t pos_stride, bool pos_prefix);

void patch_embed_weight(const Tensor& dout, const Tensor& pixels, const std::optional<Tensor>& scale,
                        const Tensor& partial, const Tensor& dweight, int64_t step_h, int64_t step_w);

}  // namespace mmkernels
