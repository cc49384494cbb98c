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
                        const Tensor& dv, double softmax_scale, double softcap);

}  // namespace mmkernels
