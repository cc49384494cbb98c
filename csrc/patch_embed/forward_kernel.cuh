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
// twice. At the end 16 rows of a warp at a time go through shared memory, in float32.
//
// Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, for the operation.
#pragma once

#include <climits>

#include "forward_rows.cuh"

namespace mmkernels::patch_forward {

constexpr int BLOCK_K = 32;  // values of a patch in one step
constexpr int STAGES = 3;
constexpr int THREADS = GROUP;  // one for each row, where rows are looked up
constexpr int WARP_TILE = 64;
constexpr int TILES = WARP_TILE / 16;

struct Stage {
  unsigned char pixels[BLOCK_M][BLOCK_K * 2];
  unsigned char weight[BLOCK_N][BLOCK_K * 2];
};

struct Shared {
  union {
    Stage stages[STAGES];
    Staged staged[THREADS / 32];
  };
  const void* patch[BLOCK_M];  // of each row
  int64_t pos[BLOCK_M], prefix[BLOCK_M];
  const void* weight[BLOCK_N];  // where each row of the weight starts; those beyond the last one repeat it
};

// Of a warp's 64 rows and 64 columns: fragments C.
using Products = float[TILES][WARP_TILE / 8][4];

__device__ __forceinline__ int warp_row() { return threadIdx.x / 64 * WARP_TILE; }
__device__ __forceinline__ int warp_column() { return threadIdx.x / 32 % 2 * WARP_TILE; }

// Thread i looks up row i of out and of the weight.
template <typename T>
__device__ __forceinline__ void find_rows(Shared& shared, const PatchForward& p, int m0, int n0) {
  const int thread = threadIdx.x;
  const Row row(p, m0 + thread);
  shared.patch[thread] = row.patch;
  shared.pos[thread] = row.pos;
  shared.prefix[thread] = row.prefix;
  shared.weight[thread] = static_cast<const T*>(p.weight) + min(n0 + thread, p.dim - 1) * p.stride_weight;
}

// A step's weights on their way to the stage; zeros beyond the part.
template <typename T, int P>
__device__ __forceinline__ void load_weight(Stage& stage, const Shared& shared, const PatchForward& p,
                                            int part, int part_values, int k) {
  constexpr int WORD = P == 16 ? 8 : 4;  // of one copy: a part of 196 starts at a multiple of 4
  constexpr int LANES = BLOCK_K / WORD, ROWS = THREADS / LANES;
  const int first = threadIdx.x % LANES * WORD, row = threadIdx.x / LANES;
  const bool valid = k + first < part_values;
  const int offset = valid ? part * part_values + k + first : 0;
  const uint32_t target = swizzled<BLOCK_K * 2>(shared_address(stage.weight), row, first * 2);
#pragma unroll
  for (int i = 0; i < BLOCK_N; i += ROWS) {
    const T* source = static_cast<const T*>(shared.weight[row + i]) + offset;
    copy_async<WORD * 2>(rows_below<BLOCK_K * 2>(target, i), source, valid);
  }
}

// acc += pixels weight^T of this warp, values k to k + 15 of the step.
template <typename T>
__device__ __forceinline__ void multiply(Products& acc, Stage& stage, int k) {
  const int lane = threadIdx.x % 32;
  const uint32_t a_tile =
      swizzled<BLOCK_K * 2>(shared_address(stage.pixels), warp_row() + lane % 16, k * 2 + lane / 16 * 16);
  const uint32_t b_tile = swizzled<BLOCK_K * 2>(
      shared_address(stage.weight), warp_column() + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2 * 16);
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

template <typename T, typename Pixel, int P>
__global__ void __launch_bounds__(THREADS, 2) patch_forward_kernel(const __grid_constant__ PatchForward p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared*>(memory);
  const int tiles_n = (p.dim + BLOCK_N - 1) / BLOCK_N;
  const int m0 = blockIdx.x / tiles_n * BLOCK_M;  // what shares pixels runs side by side
  const int n0 = blockIdx.x % tiles_n * BLOCK_N;
  find_rows<T>(shared, p, m0, n0);
  __syncthreads();

  using Loader = PixelLoader<T, Pixel, P, BLOCK_K>;
  Loader loader(p, shared.patch);
  typename Loader::Pieces pieces;
  const auto load = [&](Stage& stage) {
    load_weight<T, P>(stage, shared, p, loader.part, loader.part_values, loader.k);
    loader.load(shared_address(stage.pixels), pieces);
    loader.advance();
  };
  const int part_values = loader.part_values;
  const int steps = p.parts * ((part_values + BLOCK_K - 1) / BLOCK_K);
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) {
    if (i < steps) {
      load(shared.stages[i]);
      Loader::store(shared_address(shared.stages[i].pixels), pieces);
    }
    copy_async_commit();
  }
  Products acc = {};
  int part = 0, k = 0, current = 0, next = STAGES - 1;
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<STAGES - 2>();
    __syncthreads();  // this step's tiles are there, and no warp reads those of the step before
    const bool more = step + STAGES - 1 < steps;
    if (more) load(shared.stages[next]);
    copy_async_commit();
    multiply<T>(acc, shared.stages[current], 0);
    if (k + 16 < part_values) multiply<T>(acc, shared.stages[current], 16);
    if (more) Loader::store(shared_address(shared.stages[next].pixels), pieces);
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
  __syncthreads();  // all stages are free
  const int rows = p.batch * sample_rows(p);
#pragma unroll
  for (int m = 0; m < TILES; ++m) {
    const int row = warp_row() + m * 16;
    const Ends ends = {shared.pos + row, shared.prefix + row, m0 + row, rows - m0 - row};
    finish<T>(acc[m][0], shared.staged[threadIdx.x / 32], ends, p, n0 + warp_column());
  }
}

template <typename T, typename Pixel, int P>
cudaError_t launch(const PatchForward& p, cudaStream_t stream) {
  const int64_t rows = int64_t(p.batch) * sample_rows(p);
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
