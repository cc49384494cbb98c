// The patch embedding's forward pass on wgmma and TMA, compute capability 9.0.
//
// The operation is that of forward_kernel.cuh, in tiles of BLOCK_M rows by BLOCK_N values. Blocks stay: each
// takes every gridDim.x-th tile. Of its three warpgroups one fetches and two multiply, in turns: while one of
// them finishes its tile, the other has the tensor cores, and the stages for the tile after that fill.
//
//   fetching   weights by TMA, pixels piece by piece as in forward_kernel.cuh, into a ring of STAGES
//   in turns   products of BLOCK_K values, 64 rows at a time; then bias, position, prefix, and out
//
// Pixels do not come by TMA: the rows of a tile are patches of a row of the grid, and go on in the next row
// or the next sample, past prefix tokens, at strides that no box follows. What the fetching threads have
// copied or stored becomes visible to wgmma by a proxy fence before they arrive at the stage's barrier: two
// steps after they were sent for, or of bytes one step, when the next ones are on their way to registers.
//
// Tiles of a stage have rows of 128 bytes, swizzled as TMA does. The fetching warpgroup gives registers to
// the other two, which hold 128 x 128 products each.
//
// Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, for the operation; NVIDIA, CUTLASS,
// "Efficient GEMM", for two warpgroups in turns.
#pragma once

#include <algorithm>
#include <climits>

#include "../hopper/tensor_map.h"
#include "../hopper/tma.cuh"
#include "../hopper/warpgroup.cuh"
#include "../hopper/wgmma.cuh"
#include "forward_rows.cuh"

namespace mmkernels::patch_forward::hopper {

constexpr int BLOCK_K = 64;  // values of a patch in one step
constexpr int STAGES = 5;
constexpr int CONSUMERS = 2;  // warpgroups that multiply; the one after them fetches
constexpr int THREADS = (CONSUMERS + 1) * WARPGROUP;
constexpr int WARPS = WARPGROUP / 32;
constexpr int PRODUCER_REGISTERS = 120, CONSUMER_REGISTERS = 192;  // of 168 that a thread starts with

// Named barriers: of each consumer, which it waits at for its turn, and of the producer's threads.
constexpr int TURN = 1, FETCHING = TURN + CONSUMERS;

struct Stage {
  unsigned char pixels[BLOCK_M][BLOCK_K * 2];
  unsigned char weight[BLOCK_N][BLOCK_K * 2];
};

struct Shared {
  Stage stages[STAGES];
  Staged staged[CONSUMERS * WARPS];
  int64_t pos[CONSUMERS * WARPS][32], prefix[CONSUMERS * WARPS][32];  // of each warp's rows
  const void* patch[2][BLOCK_M];                                      // of this tile and the next one
  uint64_t full[STAGES], empty[STAGES];
};

// The tiles of out, those that share pixels side by side; a block's i-th one.
struct Tiles {
  int columns, count;

  __host__ __device__ explicit Tiles(const PatchForward& p)
      : columns((p.dim + BLOCK_N - 1) / BLOCK_N),
        count((p.batch * sample_rows(p) + BLOCK_M - 1) / BLOCK_M * columns) {}

  __device__ __forceinline__ int index(int i) const { return blockIdx.x + i * gridDim.x; }
  __device__ __forceinline__ bool has(int i) const { return index(i) < count; }
  __device__ __forceinline__ int m0(int i) const { return index(i) / columns * BLOCK_M; }
  __device__ __forceinline__ int n0(int i) const { return index(i) % columns * BLOCK_N; }
};

// Fills the stages for all of the block's tiles.
template <typename T, typename Pixel, int P>
__device__ __forceinline__ void produce(Shared& shared, const PatchForward& p, const CUtensorMap& weight,
                                        const Tiles& tiles) {
  using Loader = PixelLoader<T, Pixel, P, BLOCK_K>;
  constexpr int LAG = Loader::BYTES ? 1 : 2;  // steps between sending for pixels and telling of them
  const int thread = threadIdx.x % GROUP;
  Ring<STAGES> sent, told;
  int underway = 0;
  typename Loader::Pieces pieces;  // of the step that was sent for last
  const auto tell = [&] {
    Loader::store(shared_address(shared.stages[told.stage].pixels), pieces);
    fence_async_proxy();
    __syncwarp();
    if (thread % 32 == 0) barrier_arrive(shared.full[told.stage]);
    told.advance();
    --underway;
  };
  for (int i = 0; tiles.has(i); ++i) {
    const void*(&patch)[BLOCK_M] = shared.patch[i % 2];
    patch[thread] = Row(p, tiles.m0(i) + thread).patch;
    named_barrier_sync(FETCHING, GROUP);
    Loader loader(p, patch);
    while (loader.part < p.parts) {
      barrier_wait(shared.empty[sent.stage], sent.parity ^ 1);
      Stage& stage = shared.stages[sent.stage];
      uint64_t& full = shared.full[sent.stage];
      if (thread == 0) {
        barrier_arrive_expect(full, sizeof(stage.weight));
        tma_load(stage.weight, weight, full, loader.part * loader.part_values + loader.k, tiles.n0(i));
      }
      typename Loader::Pieces next;
      loader.load(shared_address(stage.pixels), next);
      loader.advance();
      copy_async_commit();
      if (underway == LAG) {
        copy_async_wait<LAG>();
        tell();
      }
      pieces = next;
      sent.advance();
      ++underway;
    }
  }
  copy_async_wait<0>();
  while (underway > 0) tell();
}

// Of a warpgroup: rows 0 to 63 of the tile and the next 64.
using Products = float[BLOCK_M / 64][BLOCK_N / 2];

// acc += pixels weight^T of a stage, 16 values at a time.
template <typename T>
__device__ __forceinline__ void multiply(Products& acc, const Stage& stage, int k) {
  const uint64_t a = k_major(shared_address(stage.pixels) + k * 2);
  const uint64_t b = k_major(shared_address(stage.weight) + k * 2);
#pragma unroll
  for (int half = 0; half < BLOCK_M / 64; ++half)
    wgmma<T, Major::K>(acc[half], advanced(a, half * sizeof(stage.pixels) / 2), b, true);
}

template <int COUNT>
using Count = std::integral_constant<int, COUNT>;

// The products of the block's i-th tile; hands the tensor cores on when all of them are issued.
template <typename T, int P>
__device__ __forceinline__ void multiply_tile(Products& acc, Shared& shared, const PatchForward& p, int i,
                                              bool more) {
  const int part_values = part_size<P>(p);
  const int position = i * p.parts * ((part_values + BLOCK_K - 1) / BLOCK_K);
  Ring<STAGES> ring = {position % STAGES, uint32_t(position / STAGES & 1)};
  int last = -1;  // the stage whose products are under way
  const auto release = [&] {
    if (last >= 0 && threadIdx.x % 32 == 0) barrier_arrive(shared.empty[last]);
  };
  // Issues the products of the next stage, `count` times 16 values.
  const auto step = [&](auto count) {
    barrier_wait(shared.full[ring.stage], ring.parity);
    pin(acc[0]);
    pin(acc[1]);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < decltype(count)::value; ++j) multiply<T>(acc, shared.stages[ring.stage], j * 16);
    wgmma_commit();
    pin(acc[0]);
    pin(acc[1]);
    wgmma_wait<1>();
    release();
    last = ring.stage;
    ring.advance();
  };
#pragma unroll
  for (int half = 0; half < BLOCK_M / 64; ++half)
#pragma unroll
    for (int j = 0; j < BLOCK_N / 2; ++j) acc[half][j] = 0.0f;
  for (int part = 0; part < p.parts; ++part) {
    for (int k = 0; k + BLOCK_K <= part_values; k += BLOCK_K) step(Count<BLOCK_K / 16>());
    if constexpr (P == 14) {  // 196 C leave 4, 8, 12 or 16 values up to four channels
      const int rest = part_values % BLOCK_K;
      if (rest > 16)
        step(Count<BLOCK_K / 16>());
      else if (rest > 0)
        step(Count<1>());
    }
    if (part + 1 == p.parts && more) named_barrier_arrive(TURN + (i + 1) % CONSUMERS, CONSUMERS * WARPGROUP);
    wgmma_wait<0>();
    pin(acc[0]);
    pin(acc[1]);
    release();
    last = -1;
    if (p.scale != nullptr) {
      const float scale = p.scale[part];
#pragma unroll
      for (int half = 0; half < BLOCK_M / 64; ++half)
#pragma unroll
        for (int j = 0; j < BLOCK_N / 2; ++j) acc[half][j] *= scale;
    }
  }
}

// Every other tile of the block, by this warpgroup.
template <typename T, int P>
__device__ __forceinline__ void consume(Shared& shared, const PatchForward& p, const Tiles& tiles) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = p.batch * sample_rows(p);
  for (int i = threadIdx.x / WARPGROUP; tiles.has(i); i += CONSUMERS) {
    Products acc;
    if (i > 0) named_barrier_sync(TURN + i % CONSUMERS, CONSUMERS * WARPGROUP);
    multiply_tile<T, P>(acc, shared, p, i, tiles.has(i + 1));

    const int first = tiles.m0(i) + warp % WARPS * 16;  // of 16 rows; the other 16 lie 64 rows on
    const Row row(p, first + lane / 16 * 64 + lane % 16);
    shared.pos[warp][lane] = row.pos;
    shared.prefix[warp][lane] = row.prefix;
    __syncwarp();
#pragma unroll
    for (int half = 0; half < BLOCK_M / 64; ++half) {
      const Ends ends = {shared.pos[warp] + half * 16, shared.prefix[warp] + half * 16, first + half * 64,
                         rows - first - half * 64};
#pragma unroll
      for (int n = 0; n < BLOCK_N; n += STAGED_VALUES)
        finish<T>(acc[half] + n / 2, shared.staged[warp], ends, p, tiles.n0(i) + n);
    }
  }
}

template <typename T, typename Pixel, int P>
__global__ void __launch_bounds__(THREADS, 1)
    patch_hopper_forward_kernel(const __grid_constant__ PatchForward p,
                                const __grid_constant__ CUtensorMap weight) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    prefetch_descriptor(weight);
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(shared.full[stage], WARPS + 1);  // and one that announces the weights
      barrier_init(shared.empty[stage], WARPS);
    }
    fence_barrier_init();
  }
  __syncthreads();
  const Tiles tiles(p);
  if (threadIdx.x / WARPGROUP == CONSUMERS) {
    give_registers<PRODUCER_REGISTERS>();
    produce<T, Pixel, P>(shared, p, weight, tiles);
  } else {
    take_registers<CONSUMER_REGISTERS>();
    consume<T, P>(shared, p, tiles);
  }
#else
  __trap();  // without its architecture-specific instructions there is nothing to run
#endif
}

template <typename T, typename Pixel, int P>
cudaError_t launch(const PatchForward& p, cudaStream_t stream) {
  const int64_t values = int64_t(p.channels) * P * p.row, rows = int64_t(p.batch) * sample_rows(p);
  const int64_t columns = (p.dim + BLOCK_N - 1) / BLOCK_N;
  if (rows == 0 || columns == 0) return cudaSuccess;
  if (rows > INT_MAX - BLOCK_M || (rows / BLOCK_M + 1) * columns > INT_MAX / 2)
    return cudaErrorInvalidConfiguration;
  CUtensorMap weight;
  cudaError_t error = make_tensor_map<2>(weight, p.weight, std::is_same_v<T, __nv_bfloat16>, {values, p.dim},
                                         {p.stride_weight}, {BLOCK_K, BLOCK_N});
  if (error != cudaSuccess) return error;
  auto kernel = patch_hopper_forward_kernel<T, Pixel, P>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (error != cudaSuccess) return error;
  kernel<<<std::min(p.processors, Tiles(p).count), THREADS, sizeof(Shared), stream>>>(p, weight);
  return cudaGetLastError();
}

// By the dtype of the pixels. Bytes in patches of 14 start at any two of them: the portable kernel's.
template <typename T, int P>
cudaError_t launch(const PatchForward& p, cudaStream_t stream) {
  if constexpr (P == 16)
    if (p.bytes) return launch<T, uint8_t, P>(p, stream);
  return p.bytes ? cudaErrorNotSupported : launch<T, T, P>(p, stream);
}

}  // namespace mmkernels::patch_forward::hopper
