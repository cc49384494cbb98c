// Attention's backward pass on wgmma and TMA, compute capability 9.0: the mathematics of backward_kernel.cuh.
//
// A block has two consumer warpgroups, each with a tile of 64 rows that stays in shared memory, and walks the
// tiles of 64 rows that move: warps of a third warpgroup send for them through a ring of shared memory. In
// the keys kernel keys stay and queries move, in the queries kernel the reverse; products of the scores are
// in shared memory, and their result is a left operand of the next products as it lies in registers:
//
//   keys      s^T = k q^T,  dp^T = v dout^T,  dv += p^T dout,  dk += ds^T q
//   queries   s = q k^T,    dp = dout v^T,    dq += ds k
//
// The right operands of the latter are the same tiles, read with rows and columns exchanged. dp is multiplied
// under the exponentials of s, dv under the differences of ds, dq under the next tile's; for all else the one
// warpgroup multiplies while the other does not. A tile that is hidden from a warpgroup's rows is passed over
// by it, and only tiles that are hidden in part are masked.
//
// A NaN or Inf in a key is multiplied by the 0 of a row that may not see it in ds k only. It shows in dq,
// which is looked at once; the block then walks its keys again, without such keys in that product.
//
// Where p.dq_sum is given the keys kernel makes dq, too (hopper_backward_sum.cuh), five products for seven;
// the queries kernel is left with tiles that such a key may have reached.
//
// Source: Shah et al., "FlashAttention-3", NeurIPS 2024, for scores transposed and sums by TMA.
#pragma once

#include "../hopper/tensor_map.h"
#include "hopper_backward.h"
#include "hopper_backward_keys.cuh"
#include "hopper_backward_queries.cuh"

namespace mmkernels::hopper {

// Boxes are a part of a tile.
template <typename T>
cudaError_t make_maps(BackwardMaps& maps, const AttentionBackward& p) {
  struct Tensor {
    CUtensorMap& map;
    const void* data;
    int64_t length, heads, stride_s, stride_h, stride_b;
  };
  const int64_t d = p.head_dim, q_row = p.heads * d, k_row = p.kv_heads * d;
  const int64_t q_batch = q_row * p.seqlen_q, k_batch = k_row * p.seqlen_k;
  const Tensor tensors[] = {
      {maps.q, p.q, p.seqlen_q, p.heads, p.stride_qs, p.stride_qh, p.stride_qb},
      {maps.k, p.k, p.seqlen_k, p.kv_heads, p.stride_ks, p.stride_kh, p.stride_kb},
      {maps.v, p.v, p.seqlen_k, p.kv_heads, p.stride_vs, p.stride_vh, p.stride_vb},
      {maps.dout, p.dout, p.seqlen_q, p.heads, p.stride_douts, p.stride_douth, p.stride_doutb},
      {maps.dq, p.dq, p.seqlen_q, p.heads, q_row, d, q_batch},
      {maps.dk, p.dk, p.seqlen_k, p.kv_heads, k_row, d, k_batch},
      {maps.dv, p.dv, p.seqlen_k, p.kv_heads, k_row, d, k_batch},
  };
  for (const Tensor& x : tensors) {
    const cudaError_t error =
        make_tensor_map<4>(x.map, x.data, std::is_same_v<T, __nv_bfloat16>, {d, x.length, x.heads, p.batch},
                           {x.stride_s, x.stride_h, x.stride_b}, {COLUMNS, ROWS, 1, 1});
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// A block for each 128 rows of each head.
template <class Shared, class Kernel>
cudaError_t launch(Kernel* kernel, int threads, int64_t heads, int length, const AttentionBackward& p,
                   const BackwardMaps& maps, cudaStream_t stream) {
  static_assert(sizeof(Shared) <= 227 << 10, "what a block may have of a multiprocessor");
  const int tiles = (length + GROUPS * ROWS - 1) / (GROUPS * ROWS);
  if (heads * tiles > INT_MAX) return cudaErrorInvalidConfiguration;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (error != cudaSuccess) return error;
  kernel<<<int(heads * tiles), threads, sizeof(Shared), stream>>>(p, maps, Scores(p), tiles);
  return cudaGetLastError();
}

template <typename T, int HEAD_DIM, bool SUM>
cudaError_t launch_keys(const AttentionBackward& p, const BackwardMaps& maps, cudaStream_t stream) {
  return launch<KeysShared<T, HEAD_DIM, SUM>>(attention_backward_keys_kernel<T, HEAD_DIM, SUM>, THREADS,
                                              int64_t(p.batch) * p.kv_heads, p.seqlen_k, p, maps, stream);
}

template <typename T, int HEAD_DIM>
cudaError_t launch_attention_backward(const AttentionBackward& p, cudaStream_t stream) {
  const int64_t heads = int64_t(p.batch) * p.heads;
  BackwardMaps maps;
  cudaError_t error = make_maps<T>(maps, p);
  if (error != cudaSuccess) return error;
  if (p.dq_sum == nullptr) {
    error = launch_keys<T, HEAD_DIM, false>(p, maps, stream);
  } else {
    error = launch_keys<T, HEAD_DIM, true>(p, maps, stream);
    if (error != cudaSuccess) return error;
    error = launch<Tile<T, HEAD_DIM>[GROUPS]>(attention_backward_round_kernel<T, HEAD_DIM>, CONSUMERS, heads,
                                              p.seqlen_q, p, maps, stream);
    if (p.start == nullptr) return error;
  }
  if (error != cudaSuccess) return error;
  return launch<QueriesShared<T, HEAD_DIM>>(attention_backward_queries_kernel<T, HEAD_DIM>, THREADS, heads,
                                            p.seqlen_q, p, maps, stream);
}

}  // namespace mmkernels::hopper
