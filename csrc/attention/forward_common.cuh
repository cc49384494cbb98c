// What the forward kernels share: scores as exponents of 2, and the order in which tiles of queries run.
#pragma once

#include <algorithm>
#include <cmath>

#include "../ptx.cuh"
#include "forward.h"

namespace mmkernels {

// What turns raw products into exponents of 2.
struct Scores {
  float c;
  float inner, outer;  // outer * tanh(inner * s); outer is 0 without softcap
};

inline Scores scores_of(const AttentionForward& p) {
  if (p.softcap > 0.0f) return {1.0f, p.softmax_scale / p.softcap, p.softcap * LOG2E};
  return {p.softmax_scale * LOG2E, 0.0f, 0.0f};
}

__device__ __forceinline__ bool finite(float x) { return fabsf(x) < INFINITY; }

// The keys [x, y) that a row of queries sees; (0, 0) if it sees none, or is no row.
__device__ __forceinline__ int2 row_bounds(const AttentionForward& p, int b, int row) {
  if (row >= p.seqlen_q) return make_int2(0, 0);
  if (p.start == nullptr) return make_int2(0, p.seqlen_k);
  const int start = max(p.start[b * p.stride_start_b + row * p.stride_start_s], 0);
  const int end = min(p.end[b * p.stride_end_b + row * p.stride_end_s], p.seqlen_k);
  return start < end ? make_int2(start, end) : make_int2(0, 0);
}

// Of all heads `wave` run side by side, tile by tile, so that their keys stay in L2; of a causal mask the
// last rows have the most work and come first.
struct Position {
  int b, h, m0;

  __device__ __forceinline__ Position(const AttentionForward& p, int index, int block_m, int row_tiles,
                                      int wave) {
    const int first = index / (row_tiles * wave) * wave;
    const int size = min(wave, p.batch * p.heads - first);
    const int rest = index - first * row_tiles;
    const int head = first + rest % size;
    b = head / p.heads;
    h = head % p.heads;
    m0 = (row_tiles - 1 - rest / size) * block_m;
  }
};

// Keys and values of the heads in a wave take at most 0.6 of L2.
inline int wave_of(const AttentionForward& p, int element_bytes) {
  int device = 0, l2 = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device);
  const int64_t bytes = int64_t(p.seqlen_k) * p.head_dim * 2 * element_bytes;
  const int64_t key_heads = std::max<int64_t>(l2 * int64_t(6) / 10 / std::max<int64_t>(bytes, 1), 1);
  return int(std::min(key_heads * (p.heads / p.kv_heads), int64_t(p.batch) * p.heads));
}

}  // namespace mmkernels
