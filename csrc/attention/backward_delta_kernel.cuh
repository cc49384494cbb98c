// delta = sum_d dout out - dlse of every row, which attention's backward pass starts from: the gradient of
// lse enters there, and nowhere else. Rows without a key get 0, whatever dout holds in them.
//
// Eight lanes take a row, 16 bytes of both tensors each at a time. It reads every byte once, and has nothing
// else to wait for than memory.
#pragma once

#include <climits>
#include <cmath>

#include "backward.h"
#include "ptx.cuh"

namespace mmkernels {

constexpr int DELTA_THREADS = 128;
constexpr int DELTA_ROWS = DELTA_THREADS / 8;

// Of eight numbers each.
template <typename T>
__device__ __forceinline__ float sum_of_products(const T* x, const T* y) {
  const uint4 packed_x = *reinterpret_cast<const uint4*>(x), packed_y = *reinterpret_cast<const uint4*>(y);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 a = unpack<T>((&packed_x.x)[i]), b = unpack<T>((&packed_y.x)[i]);
    sum = fmaf(a.y, b.y, fmaf(a.x, b.x, sum));
  }
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(DELTA_THREADS) attention_delta_kernel(const AttentionDelta p, int tiles) {
  const int bh = blockIdx.x / tiles, b = bh / p.heads, h = bh % p.heads;
  const int row = blockIdx.x % tiles * DELTA_ROWS + threadIdx.x / 8;
  float delta = 0.0f;
  if (row < p.seqlen_q) {
    const T* dout =
        static_cast<const T*>(p.dout) + b * p.stride_doutb + h * p.stride_douth + row * p.stride_douts;
    const T* out = static_cast<const T*>(p.out) + b * p.stride_outb + h * p.stride_outh + row * p.stride_outs;
    for (int dim = threadIdx.x % 8 * 8; dim < p.head_dim; dim += 64)
      delta += sum_of_products(dout + dim, out + dim);
  }
#pragma unroll
  for (int lane = 4; lane > 0; lane /= 2) delta += __shfl_xor_sync(~0u, delta, lane);
  if (threadIdx.x % 8 == 0 && row < p.seqlen_q) {
    if (p.dlse != nullptr) delta -= p.dlse[b * p.stride_dlse_b + h * p.stride_dlse_h + row * p.stride_dlse_s];
    const int64_t place = int64_t(bh) * p.seqlen_q + row;
    p.delta[place] = p.lse[place] == -INFINITY ? 0.0f : delta;
  }
}

template <typename T>
cudaError_t launch_attention_delta(const AttentionDelta& p, cudaStream_t stream) {
  const int tiles = (p.seqlen_q + DELTA_ROWS - 1) / DELTA_ROWS;
  const int64_t blocks = int64_t(p.batch) * p.heads * tiles;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  attention_delta_kernel<T><<<int(blocks), DELTA_THREADS, 0, stream>>>(p, tiles);
  return cudaGetLastError();
}

}  // namespace mmkernels
