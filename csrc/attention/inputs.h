// What the parameters of both of attention's passes hold of their inputs.
#pragma once

#include "check.h"

namespace mmkernels {

// q (B, Sq, Hq, D), k and v (B, Sk, Hkv, D), as checked.
template <typename Params>
void fill_inputs(Params& p, const Tensor& q, const Tensor& k, const Tensor& v, double softmax_scale,
                 double softcap) {
  p.q = q.data_ptr(), p.k = k.data_ptr(), p.v = v.data_ptr();
  p.stride_qb = step(q, 0), p.stride_qs = step(q, 1), p.stride_qh = step(q, 2);
  p.stride_kb = step(k, 0), p.stride_ks = step(k, 1), p.stride_kh = step(k, 2);
  p.stride_vb = step(v, 0), p.stride_vs = step(v, 1), p.stride_vh = step(v, 2);
  p.batch = int32_t(q.size(0)), p.seqlen_q = int32_t(q.size(1)), p.seqlen_k = int32_t(k.size(1));
  p.heads = int32_t(q.size(2)), p.kv_heads = int32_t(k.size(2)), p.head_dim = int32_t(q.size(3));
  p.softmax_scale = float(softmax_scale), p.softcap = float(softcap);
}

}  // namespace mmkernels
