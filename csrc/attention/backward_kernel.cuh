// Attention's backward pass on mma.sync, sm_80 and later: two kernels for every interval mask, and no
// atomics, so every run gives the same bits.
//
// From lse of the forward pass and delta = sum_d dout out - dlse, with s and c as in forward_kernel.cuh:
//
//   p = 2^(c s - log2(e) lse),  ds = p (dout v^T - delta), times 1 - tanh^2 with softcap
//   dk = softmax_scale ds^T q,  dv = p^T dout     the keys kernel: a tile of keys walks the queries
//   dq = softmax_scale ds k                       the queries kernel: a tile of queries walks the keys
//
// The keys kernel computes s and dout v^T transposed, so that p^T and ds^T are fragments A of its products as
// they come. BackwardScores are computed twice, seven products where five would do: the price of sums in a
// fixed order.
//
// Tiles that every row sees in full are walked first and without any masking, then the ragged ones; all
// others are never touched. A NaN or Inf in a key is multiplied by the 0 of a row that may not see it only in
// ds k: it shows in dq, which is looked at once; the block then walks its keys again without such values.
//
// A warp's rows stay with it, in shared memory and their gradients in registers. What moves has two stages of
// shared memory: one is worked on while the other is on its way. No block takes more than the 99 KB of sm_86.
//
// Source: Dao, "FlashAttention-2", ICLR 2024.
#pragma once

#include "backward_keys.cuh"
#include "backward_queries.cuh"

namespace mmkernels {

// How many of `heads` heads run side by side: what they stream, `bytes` for every `unit` of them, takes at
// most 0.6 of L2.
inline int heads_in_flight(int64_t heads, int64_t unit, int64_t bytes) {
  int device = 0, l2 = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device);
  const int64_t units = std::max<int64_t>(l2 * int64_t(6) / 10 / std::max<int64_t>(bytes, 1), 1);
  return int(std::min(units * unit, heads));
}

// Launches one block for every tile of `rows` rows of every head.
template <class Block, class Shared, class Kernel>
cudaError_t launch_tiles(Kernel kernel, const AttentionBackward& p, int rows, int64_t heads, int64_t unit,
                         int64_t bytes, cudaStream_t stream) {
  const int tiles = (rows + Block::ROWS - 1) / Block::ROWS;
  const int64_t blocks = heads * tiles;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  constexpr int BYTES = sizeof(Shared);
  static_assert(BYTES <= 99 << 10);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
  if (error != cudaSuccess) return error;
  kernel<<<int(blocks), Block::THREADS, BYTES, stream>>>(p, BackwardScores(p), tiles,
                                                         heads_in_flight(heads, unit, bytes));
  return cudaGetLastError();
}

template <typename T, int HEAD_DIM>
cudaError_t launch_attention_backward(const AttentionBackward& p, cudaStream_t stream) {
  const int64_t batch = p.batch, groups = p.heads / p.kv_heads, row = 2 * p.head_dim * sizeof(T);
  const cudaError_t error = launch_tiles<KeysBlock<HEAD_DIM>, KeysShared<T, HEAD_DIM>>(
      attention_backward_keys_kernel<T, HEAD_DIM>, p, p.seqlen_k, batch * p.kv_heads, 1,
      groups * p.seqlen_q * row, stream);
  if (error != cudaSuccess) return error;
  return launch_tiles<QueriesBlock<HEAD_DIM>, QueriesShared<T, HEAD_DIM>>(
      attention_backward_queries_kernel<T, HEAD_DIM>, p, p.seqlen_q, batch * p.heads, groups,
      p.seqlen_k * row, stream);
}

}  // namespace mmkernels
