// The gradient of the patch embedding's weight on mma.sync, sm_80 and later, without atomics.
//
//   partial[s, d, v] = sum over patches m of share s of dout[m, d] pixels[m, v]
//   dweight[d, v]    = scale[c of v] * sum over s, in order, of partial[s, d, v]
//
// A block sums BLOCK_D values of a token by BLOCK_V of a patch, BLOCK_P patches at a time. Pixels are
// gathered as the forward pass does, bytes as bytes; what the mean of the channels contributes is the
// caller's. Here a thread's piece stays where it is in the patch, and the patches move on: the first warp
// looks up where they start, one step ahead of the copies.
//
// Tiles lie in shared memory as in global memory, patches in rows, and ldmatrix transposes both of them into
// fragments. Four warps hold 64 x 64 products each. Rows are 256 bytes, their 16-byte words permuted, so that
// ldmatrix meets every bank once. A quad stores 32 bytes of a row of `partial`, a whole sector.
//
// Source: the derivative of a linear map.
#pragma once

#include <climits>

#include "weight_tiles.cuh"

namespace mmkernels::patch_weight {

constexpr int TILES = WARP_TILE / 16;

// Of a warp's 64 values of a token and 64 of a patch: fragments C.
using Products = float[TILES][WARP_TILE / 8][4];

__device__ __forceinline__ int warp_row() { return threadIdx.x / 64 * WARP_TILE; }
__device__ __forceinline__ int warp_column() { return threadIdx.x / 32 % 2 * WARP_TILE; }

// acc += dout^T pixels of this warp, patches m to m + 15 of the step.
template <typename T>
__device__ __forceinline__ void multiply(Products& acc, Stage& stage, int m) {
  const int lane = threadIdx.x % 32;
  const uint32_t dout = shared_address(stage.dout), pixels = shared_address(stage.pixels);
  const int a_row = m + lane / 16 * 8 + lane % 8, a_byte = (warp_row() + lane / 8 % 2 * 8) * 2;
  const int b_row = m + lane % 16, b_byte = (warp_column() + lane / 16 * 8) * 2;
  uint32_t a[TILES][4];
#pragma unroll
  for (int d = 0; d < TILES; ++d)
    load_matrices_transposed(a[d], swizzled<ROW_BYTES>(dout, a_row, a_byte + d * 32));
#pragma unroll
  for (int v = 0; v < TILES; ++v) {
    uint32_t b[4];  // columns 16 v to 16 v + 7 and the next 8
    load_matrices_transposed(b, swizzled<ROW_BYTES>(pixels, b_row, b_byte + v * 32));
#pragma unroll
    for (int d = 0; d < TILES; ++d) {
      mma<T>(acc[d][2 * v], a[d], b[0], b[1]);
      mma<T>(acc[d][2 * v + 1], a[d], b[2], b[3]);
    }
  }
}

template <typename T, typename Pixel, int P>
__global__ void __launch_bounds__(THREADS, 2) patch_weight_kernel(const __grid_constant__ PatchWeight p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared*>(memory);
  const int values = p.channels * P * p.row;
  const int tiles_v = (values + BLOCK_V - 1) / BLOCK_V, tiles_d = (p.dim + BLOCK_D - 1) / BLOCK_D;
  const int tile = blockIdx.x % (tiles_v * tiles_d), split = blockIdx.x / (tiles_v * tiles_d);
  const int d0 = tile / tiles_v * BLOCK_D, v0 = tile % tiles_v * BLOCK_V;
  const Share share(p, split);
  const int steps = (share.last - share.first + BLOCK_P - 1) / BLOCK_P;

  Loader<T, Pixel, P> loader(p, d0, v0);
#pragma unroll
  for (int i = 0; i < STAGES; ++i) {
    // The places of the first steps one after the other, those of the last one for the loop.
    find_patches<T, Pixel>(shared.places[i % 2], p, share.first + i * BLOCK_P, share.last);
    __syncthreads();
    if (i == STAGES - 1) break;
    if (i < steps) {
      loader.load(shared.stages[i], shared.places[i % 2], share.last - share.first - i * BLOCK_P);
      loader.store(shared.stages[i]);
    }
    copy_async_commit();
  }
  Products acc = {};
  int current = 0, next = STAGES - 1;
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<STAGES - 2>();
    __syncthreads();  // this step's tiles are there, and no warp reads those of the step before
    const int ahead = step + STAGES - 1;
    const bool more = ahead < steps;
    const int m0 = share.first + ahead * BLOCK_P;
    if (more) loader.load(shared.stages[next], shared.places[ahead % 2], share.last - m0);
    copy_async_commit();
    find_patches<T, Pixel>(shared.places[(ahead + 1) % 2], p, m0 + BLOCK_P, share.last);
    multiply<T>(acc, shared.stages[current], 0);
    multiply<T>(acc, shared.stages[current], 16);
    if (more) loader.store(shared.stages[next]);
    current = current + 1 == STAGES ? 0 : current + 1;
    next = next + 1 == STAGES ? 0 : next + 1;
  }

  const int lane = threadIdx.x % 32;
  float* partial = p.partial + int64_t(split) * p.dim * values;
#pragma unroll
  for (int i = 0; i < TILES; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < WARP_TILE / 8; ++j) {
        const int d = d0 + warp_row() + i * 16 + lane / 4 + half * 8;
        const int v = v0 + warp_column() + j * 8 + lane % 4 * 2;
        if (d < p.dim && v < values)
          *reinterpret_cast<float2*>(partial + int64_t(d) * values + v) =
              make_float2(acc[i][j][2 * half], acc[i][j][2 * half + 1]);
      }
}

constexpr int REDUCE_THREADS = 256;

// Four values of dweight a thread: all of one channel, as P R is a multiple of 4.
template <int P>
__global__ void __launch_bounds__(REDUCE_THREADS)
    patch_weight_reduce_kernel(const __grid_constant__ PatchWeight p) {
  const int64_t size = int64_t(p.dim) * p.channels * P * p.row;
  const int64_t i = (int64_t(blockIdx.x) * REDUCE_THREADS + threadIdx.x) * 4;
  if (i >= size) return;
  float4 sum = {};
#pragma unroll 4
  for (int split = 0; split < p.splits; ++split) {
    const float4 x = *reinterpret_cast<const float4*>(p.partial + split * size + i);
    sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
  }
  const float scale = p.scale == nullptr ? 1.0f : p.scale[i / (P * p.row) % p.channels];
  *reinterpret_cast<float4*>(p.dweight + i) =
      make_float4(sum.x * scale, sum.y * scale, sum.z * scale, sum.w * scale);
}

template <typename T, typename Pixel, int P>
cudaError_t launch(const PatchWeight& p, cudaStream_t stream) {
  const int64_t size = int64_t(p.dim) * p.channels * P * p.row;
  const int64_t tiles_d = (p.dim + BLOCK_D - 1) / BLOCK_D;
  const int64_t tiles_v = (p.channels * P * p.row + BLOCK_V - 1) / BLOCK_V;
  const int64_t blocks = p.splits * tiles_d * tiles_v;
  const int64_t reduce_blocks = (size / 4 + REDUCE_THREADS - 1) / REDUCE_THREADS;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX || reduce_blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  auto kernel = patch_weight_kernel<T, Pixel, P>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (error != cudaSuccess) return error;
  kernel<<<int(blocks), THREADS, sizeof(Shared), stream>>>(p);
  patch_weight_reduce_kernel<P><<<int(reduce_blocks), REDUCE_THREADS, 0, stream>>>(p);
  return cudaGetLastError();
}

// By the dtype of the pixels.
template <typename T, int P>
cudaError_t launch(const PatchWeight& p, cudaStream_t stream) {
  return p.bytes ? launch<T, uint8_t, P>(p, stream) : launch<T, T, P>(p, stream);
}

}  // namespace mmkernels::patch_weight
