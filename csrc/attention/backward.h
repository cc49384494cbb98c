// Attention's backward pass: parameters and host launchers of the CUDA kernels.
//
// q and dout (B, Sq, Hq, D), k and v (B, Sk, Hkv, D) and out (B, Sq, Hq, D) have a last stride of 1; their
// pointers are multiples of 16 bytes and their other strides multiples of 8 elements. lse and
// delta (B, Hq, Sq), dq (B, Sq, Hq, D), dk and dv (B, Sk, Hkv, D) are contiguous. start and end (1 or B, Sq)
// bound the keys that a row sees; row_start and row_end (1 or B, Sk) the rows that may see a key: no row
// outside of them does. tests/attention/cuda_backward.py repeats the structs.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace mmkernels {

constexpr int SUM_ROWS = 128;

// dq, dk and dv from delta and the forward pass's lse.
struct AttentionBackward {
  const void* q;
  const void* k;
  const void* v;
  const void* dout;
  const float* lse;  // -inf in rows without a key
  const float* delta;
  const int32_t* start;  // with end: null if every row sees every key
  const int32_t* end;
  const int32_t* row_start;  // with row_end: null if all rows must be looked at
  const int32_t* row_end;
  void* dq;
  void* dk;
  void* dv;
  // For a Hopper kernel that may sum dq in any order, else null: zeros
  // (B, Hq, ceil(Sq / SUM_ROWS), SUM_ROWS x padded head dim), and (B, Hq, ceil(Sq / SUM_ROWS)) for tiles of
  // queries whose sums a NaN or Inf in a key may have reached that they must not see.
  float* dq_sum;
  int32_t* redo;
  // In elements.
  int64_t stride_qb, stride_qs, stride_qh;
  int64_t stride_kb, stride_ks, stride_kh;
  int64_t stride_vb, stride_vs, stride_vh;
  int64_t stride_doutb, stride_douts, stride_douth;
  int64_t stride_start_b, stride_start_s;
  int64_t stride_end_b, stride_end_s;
  int64_t stride_row_start_b, stride_row_start_s;
  int64_t stride_row_end_b, stride_row_end_s;
  int32_t batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim;
  float softmax_scale;  // above 0
  float softcap;        // 0: none
};

// delta = sum_d dout out - dlse, 0 in rows without a key.
struct AttentionDelta {
  const void* dout;
  const void* out;
  const float* dlse;  // (B, Hq, Sq), or null: 0
  const float* lse;
  float* delta;
  // In elements.
  int64_t stride_doutb, stride_douts, stride_douth;
  int64_t stride_outb, stride_outs, stride_outh;
  int64_t stride_dlse_b, stride_dlse_h, stride_dlse_s;
  int32_t batch, seqlen_q, heads, head_dim;
};

using AttentionBackwardLauncher = cudaError_t(const AttentionBackward*, cudaStream_t);
using AttentionDeltaLauncher = cudaError_t(const AttentionDelta*, cudaStream_t);

}  // namespace mmkernels

// One launcher per padded head dim and dtype, of delta per dtype. Weak: null where the build left the
// instance out.
extern "C" {
#define MMKERNELS_LAUNCHER(TYPE, NAME) __attribute__((weak, visibility("default"))) mmkernels::TYPE NAME
MMKERNELS_LAUNCHER(AttentionBackwardLauncher, mmkernels_attention_backward_64_fp16);
MMKERNELS_LAUNCHER(AttentionBackwardLauncher, mmkernels_attention_backward_64_bf16);
MMKERNELS_LAUNCHER(AttentionBackwardLauncher, mmkernels_attention_backward_80_fp16);
MMKERNELS_LAUNCHER(AttentionBackwardLauncher, mmkernels_attention_backward_80_bf16);
MMKERNELS_LAUNCHER(AttentionBackwardLauncher, mmkernels_attention_backward_96_fp16);
MMKERNELS_LAUNCHER(AttentionBackwardLauncher, mmkernels_attention_backward_96_bf16);
MMKERNELS_LAUNCHER(AttentionBackwardLauncher, mmkernels_attention_backward_128_fp16);
MMKERNELS_LAUNCHER(AttentionBackwardLauncher, mmkernels_attention_backward_128_bf16);
MMKERNELS_LAUNCHER(AttentionDeltaLauncher, mmkernels_attention_delta_fp16);
MMKERNELS_LAUNCHER(AttentionDeltaLauncher, mmkernels_attention_delta_bf16);
#undef MMKERNELS_LAUNCHER
}
