// Attention's forward pass: parameters and host launchers of the CUDA kernels.
//
// q (B, Sq, Hq, D), k (B, Sk, Hkv, D) and v (B, Sk, Hkv, D) have a last stride of 1; their pointers are
// multiples of 16 bytes and their other strides multiples of 8 elements. out (B, Sq, Hq, D) and
// lse (B, Hq, Sq) are contiguous. start and end (1 or B, Sq) bound the keys that a row sees.
// tests/cuda_harness.py repeats the struct.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace mmkernels {

constexpr int REDO_ROWS = 16;

struct AttentionForward {
  const void* q;
  const void* k;
  const void* v;
  const int32_t* start;  // with end: null if every row sees every key
  const int32_t* end;
  void* out;
  float* lse;
  // (B, Hq, ceil(Sq / REDO_ROWS)), or null: rows whose products a NaN or Inf in a value may have reached that
  // they must not see. A Hopper kernel writes 0 or 1 if there are bounds; the portable one then computes such
  // rows alone.
  int32_t* redo;
  // In elements.
  int64_t stride_qb, stride_qs, stride_qh;
  int64_t stride_kb, stride_ks, stride_kh;
  int64_t stride_vb, stride_vs, stride_vh;
  int64_t stride_start_b, stride_start_s;
  int64_t stride_end_b, stride_end_s;
  int32_t batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim;
  float softmax_scale;  // above 0
  float softcap;        // 0: none
};

using AttentionForwardLauncher = cudaError_t(const AttentionForward*, cudaStream_t);

}  // namespace mmkernels

// One launcher per padded head dim and dtype; those with sm90 run on compute capability 9.0 only, want keys,
// and strides that are not 0 where the size is above 1. Weak: null where the build left the instance out.
extern "C" {
#define MMKERNELS_LAUNCHER(NAME) \
  __attribute__((weak, visibility("default"))) mmkernels::AttentionForwardLauncher NAME
MMKERNELS_LAUNCHER(mmkernels_attention_forward_64_fp16);
MMKERNELS_LAUNCHER(mmkernels_attention_forward_64_bf16);
MMKERNELS_LAUNCHER(mmkernels_attention_forward_80_fp16);
MMKERNELS_LAUNCHER(mmkernels_attention_forward_80_bf16);
MMKERNELS_LAUNCHER(mmkernels_attention_forward_96_fp16);
MMKERNELS_LAUNCHER(mmkernels_attention_forward_96_bf16);
MMKERNELS_LAUNCHER(mmkernels_attention_forward_128_fp16);
MMKERNELS_LAUNCHER(mmkernels_attention_forward_128_bf16);
MMKERNELS_LAUNCHER(mmkernels_attention_forward_sm90_64_fp16);
MMKERNELS_LAUNCHER(mmkernels_attention_forward_sm90_64_bf16);
MMKERNELS_LAUNCHER(mmkernels_attention_forward_sm90_80_fp16);
MMKERNELS_LAUNCHER(mmkernels_attention_forward_sm90_80_bf16);
MMKERNELS_LAUNCHER(mmkernels_attention_forward_sm90_96_fp16);
MMKERNELS_LAUNCHER(mmkernels_attention_forward_sm90_96_bf16);
MMKERNELS_LAUNCHER(mmkernels_attention_forward_sm90_128_fp16);
MMKERNELS_LAUNCHER(mmkernels_attention_forward_sm90_128_bf16);
#undef MMKERNELS_LAUNCHER
}
