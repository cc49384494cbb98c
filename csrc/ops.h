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

}  // namespace mmkernels
