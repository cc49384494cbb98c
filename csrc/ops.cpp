// Registers the CUDA kernels with torch, as ops of their own that mmkernels/*/cuda.py calls.
//
// They take tensors that the caller allocated, check them and launch; who may call them with what is said
// in Python.
#include "ops.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(mmkernels_cuda, m) {
  m.def("attention_forward_built(int head_dim, bool bfloat16) -> bool");
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? start, Tensor? end, Tensor(a!) out, "
      "Tensor(b!) lse, Tensor(c!)? redo, float softmax_scale, float softcap) -> ()");
  m.def("attention_backward_built(int head_dim, bool bfloat16) -> bool");
  m.def("attention_delta(Tensor dout, Tensor out, Tensor? dlse, Tensor lse, Tensor(a!) delta) -> ()");
  m.def(
      "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor delta, "
      "Tensor? start, Tensor? end, Tensor? row_start, Tensor? row_end, Tensor(a!) dq, Tensor(b!) dk, "
      "Tensor(c!) dv, float softmax_scale, float softcap, Tensor(d!)? dq_sum=None, Tensor(e!)? redo=None) "
      "-> ()");
  m.def("patch_embed_forward_built(int patch, bool bfloat16) -> bool");
  m.def("patch_embed_weight_built(int patch, bool bfloat16) -> bool");
  m.def(
      "patch_embed_forward(Tensor pixels, Tensor weight, Tensor? bias, Tensor? pos, Tensor? prefix, "
      "Tensor? scale, Tensor(a!) out, int step_h, int step_w, int pos_first, int pos_stride, "
      "bool pos_prefix) -> ()");
  m.def(
      "patch_embed_weight(Tensor dout, Tensor pixels, Tensor? scale, Tensor(a!) partial, "
      "Tensor(b!) dweight, int step_h, int step_w) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mmkernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("attention_forward_built", TORCH_BOX(&mmkernels::attention_forward_built));
  m.impl("attention_backward_built", TORCH_BOX(&mmkernels::attention_backward_built));
  m.impl("patch_embed_forward_built", TORCH_BOX(&mmkernels::patch_embed_forward_built));
  m.impl("patch_embed_weight_built", TORCH_BOX(&mmkernels::patch_embed_weight_built));
}

STABLE_TORCH_LIBRARY_IMPL(mmkernels_cuda, CUDA, m) {
  m.impl("attention_forward", TORCH_BOX(&mmkernels::attention_forward));
  m.impl("attention_delta", TORCH_BOX(&mmkernels::attention_delta));
  m.impl("attention_backward", TORCH_BOX(&mmkernels::attention_backward));
  m.impl("patch_embed_forward", TORCH_BOX(&mmkernels::patch_embed_forward));
  m.impl("patch_embed_weight", TORCH_BOX(&mmkernels::patch_embed_weight));
}
