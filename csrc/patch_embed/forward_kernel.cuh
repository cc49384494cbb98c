// The patch embedding's forward pass on mma.sync, sm_80 and later: pixels to finished tokens in one kernel.
//
// A block makes BLOCK_M rows of out, prefix tokens among them, and BLOCK_N of their values:
//
//   acc[m, n] = sum over k of pixels[patch m, k] weight[n, k]
//   out[m, n] = cast(acc + bias[n] + pos[m, n]), or the prefix token in place of acc + bias
//
// k runs through (c, h, w) as the weight does, without a gap: of a 14 x 14 patch of three channels 588
// values take 592 of the tensor cores'. Where in memory the patch of a row starts is found once; where a
// thread's piece of the patch lies advances by additions.
//
// Bytes enter the product as they are. With one std for all channels the sum is scaled at the end; with
// several each channel is a part, and after it acc is multiplied by the ratio of its scale to the next
// one's. What the mean contributes is in the bias.
//
// Four warps hold 64 x 64 products each. Tiles of three steps are in flight; their rows are 64 bytes, two to
// a line of the banks, with their 16-byte words permuted, so that neither copies nor ldmatrix meet a bank
// twice. At the end 16 rows of a warp at a time go through shared memory as float32, so that positions are
// read, and out is written, in whole lines.
//
// Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, for the operation.
#pragma once

#include <climits>

#include "forward_tiles.cuh"

namespace mmkernels::patch_forward {

constexpr int TILES = WARP_TILE / 16;

// Of a warp's 64 rows and 64 columns: fragments C.
using Products = float[TILES][WARP_TILE / 8][4];

__device__ __forceinline__ int warp_row() { return threadIdx.x / 64 * WARP_TILE; }
__device__ __forceinline__ int warp_column() { return threadIdx.x / 32 % 2 * WARP_TILE; }

// acc += pixels weight^T of this warp, values k to k + 15 of the step.
template <typename T>
__device__ __forceinline__ void multiply(Products& acc, Stage& stage, int k) {
  const int lane = threadIdx.x % 32;
  const uint32_t a_tile =
      swizzled(shared_address(stage.pixels), warp_row() + lane % 16, k * 2 + lane / 16 * 16);
  const uint32_t b_tile = swizzled(shared_address(stage.weight), warp_column() + lane / 16 * 8 + lane % 8,
                                   k * 2 + lane / 8 % 2 * 16);
  uint32_t a[TILES][4];
#pragma unroll
  for (int m = 0; m < TILES; ++m) load_matrices(a[m], a_tile + m * 16 * BLOCK_K * 2);
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    uint32_t b[4];  // columns 16 n to 16 n + 7 and the next 8
    load_matrices(b, b_tile + n * 16 * BLOCK_K * 2);
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
      mma<T>(acc[m][2 * n], a[m], b[0], b[1]);
      mma<T>(acc[m][2 * n + 1], a[m], b[2], b[3]);
    }
  }
}

template <typename T>
__device__ __forceinline__ float4 load_four(const T* x) {
  const uint2 raw = *reinterpret_cast<const uint2*>(x);
  float2 low, high;
  if constexpr (std::is_same_v<T, __half>) {
    low = __half22float2(reinterpret_cast<const __half2&>(raw.x));
    high = __half22float2(reinterpret_cast<const __half2&>(raw.y));
  } else {
    low = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(raw.x));
    high = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(raw.y));
  }
  return make_float4(low.x, low.y, high.x, high.y);
}

__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// bias[n : n + 4]
template <typename T>
__device__ __forceinline__ float4 load_bias(const PatchForward& p, int n) {
  if (p.bias == nullptr) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (p.bias_float) return *reinterpret_cast<const float4*>(static_cast<const float*>(p.bias) + n);
  return load_four(static_cast<const T*>(p.bias) + n);
}

// Four values of a row of out, from the products' sum and the bias.
template <typename T>
__device__ __forceinline__ void store_four(const Shared& shared, const PatchForward& p, int m0, int row,
                                           int n, float4 x) {
  if (shared.prefix[row] >= 0) x = load_four(static_cast<const T*>(p.prefix) + shared.prefix[row] + n);
  if (shared.pos[row] >= 0) x = x + load_four(static_cast<const T*>(p.pos) + shared.pos[row] + n);
  T* out = static_cast<T*>(p.out) + int64_t(m0 + row) * p.dim + n;
  *reinterpret_cast<uint2*>(out) = make_uint2(pack<T>(x.x, x.y), pack<T>(x.z, x.w));
}

// Rows of out from acc; all stages are free.
template <typename T>
__device__ __forceinline__ void finish(const Products& acc, Shared& shared, const PatchForward& p, int m0,
                                       int n0) {
  const int lane = threadIdx.x % 32, column = lane % 16 * 4;
  float(*staged)[STAGED_ROW] = shared.out[threadIdx.x / 32];
  const int n = n0 + warp_column() + column;
  const int rows = p.batch * (p.prefix_rows + p.grid_h * p.grid_w);
  const float4 bias = n < p.dim ? load_bias<T>(p, n) : float4{};
#pragma unroll
  for (int m = 0; m < TILES; ++m) {
#pragma unroll
    for (int j = 0; j < WARP_TILE / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<float2*>(&staged[lane / 4 + half * 8][j * 8 + lane % 4 * 2]) =
            make_float2(acc[m][j][2 * half], acc[m][j][2 * half + 1]);
    __syncwarp();
#pragma unroll
    for (int i = lane / 16; i < 16; i += 2) {
      const int row = warp_row() + m * 16 + i;
      if (m0 + row < rows && n < p.dim)
        store_four<T>(shared, p, m0, row, n, *reinterpret_cast<const float4*>(&staged[i][column]) + bias);
    }
    __syncwarp();
  }
}

template <typename T, typename Pixel, int P>
__global__ void __launch_bounds__(THREADS, 2) patch_forward_kernel(const __grid_constant__ PatchForward p) {
  extern __shared__ __align__(128) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared*>(memory);
  const int tiles_n = (p.dim + BLOCK_N - 1) / BLOCK_N;
  const int m0 = blockIdx.x / tiles_n * BLOCK_M;  // what shares pixels runs side by side
  const int n0 = blockIdx.x % tiles_n * BLOCK_N;
  find_rows(shared, p, m0, n0, p.channels * P * P);

  Loader<T, Pixel, P> loader(p, shared);
  const int part_values = loader.part_values;
  const int steps = p.parts * ((part_values + BLOCK_K - 1) / BLOCK_K);
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) {
    if (i < steps) {
      loader.load(shared.stages[i]);
      loader.store(shared.stages[i]);
    }
    copy_async_commit();
  }
  Products acc = {};
  int part = 0, k = 0, current = 0, next = STAGES - 1;
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<STAGES - 2>();
    __syncthreads();  // this step's tiles are there, and no warp reads those of the step before
    const bool more = step + STAGES - 1 < steps;
    if (more) loader.load(shared.stages[next]);
    copy_async_commit();
    multiply<T>(acc, shared.stages[current], 0);
    if (k + 16 < part_values) multiply<T>(acc, shared.stages[current], 16);
    if (more) loader.store(shared.stages[next]);
    current = current + 1 == STAGES ? 0 : current + 1;
    next = next + 1 == STAGES ? 0 : next + 1;
    k += BLOCK_K;
    if (k >= part_values) {
      k = 0;
      if (p.scale != nullptr) {
        const float scale = p.scale[part];
#pragma unroll
        for (int m = 0; m < TILES; ++m)
#pragma unroll
          for (int j = 0; j < WARP_TILE / 8; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[m][j][i] *= scale;
      }
      ++part;
    }
  }
  __syncthreads();
  finish<T>(acc, shared, p, m0, n0);
}

template <typename T, typename Pixel, int P>
cudaError_t launch(const PatchForward& p, cudaStream_t stream) {
  const int64_t rows = int64_t(p.batch) * (p.prefix_rows + p.grid_h * p.grid_w);
  const int64_t blocks = (rows + BLOCK_M - 1) / BLOCK_M * ((p.dim + BLOCK_N - 1) / BLOCK_N);
  if (blocks == 0) return cudaSuccess;
  if (rows > INT_MAX - BLOCK_M || blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  auto kernel = patch_forward_kernel<T, Pixel, P>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (error != cudaSuccess) return error;
  kernel<<<int(blocks), THREADS, sizeof(Shared), stream>>>(p);
  return cudaGetLastError();
}

// By the dtype of the pixels.
template <typename T, int P>
cudaError_t launch(const PatchForward& p, cudaStream_t stream) {
  return p.bytes ? launch<T, uint8_t, P>(p, stream) : launch<T, T, P>(p, stream);
}

}  // namespace mmkernels::patch_forward
