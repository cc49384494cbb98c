// dq where the order of its sums is free: the keys kernel has ds, and needs one product more instead of
// computing scores anew. In turns a consumer warpgroup multiplies the block's ds, of all its keys, by k, and
// has the product added to a sum in global memory, which keeps the order of fragments. A last kernel rounds
// the sums.
#pragma once

#include "hopper_backward_tiles.cuh"

namespace mmkernels::hopper {

// What of dq a block of keys has to add for a tile of queries.
template <int HEAD_DIM>
using Fragments = float4[HEAD_DIM / 8][WARPGROUP];

template <typename T, int HEAD_DIM>
struct SumShared {
  // ds^T, (keys, queries): of this turn, and of the one before for who is late.
  Tile<T, ROWS> ds[2][GROUPS];
  Fragments<HEAD_DIM> dq[GROUPS];
};

// The sum of the tile of queries from m0 on of a head; a head has as many for each warpgroup.
template <int HEAD_DIM>
__device__ __forceinline__ Fragments<HEAD_DIM>& sum_of(const AttentionBackward& p, int head, int m0) {
  const int tiles = (p.seqlen_q + GROUPS * ROWS - 1) / (GROUPS * ROWS) * GROUPS;
  auto* sums = reinterpret_cast<Fragments<HEAD_DIM>*>(p.dq_sum);
  return sums[int64_t(head) * tiles + m0 / ROWS];
}

// By a consumer warpgroup: its ds^T to shared memory.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void share_ds(SumShared<T, HEAD_DIM>& shared, const Operand& ds, int turn,
                                         int group) {
  const int lane = threadIdx.x % 32, key = threadIdx.x % WARPGROUP / 32 * 16 + lane % 16;
#pragma unroll
  for (int m = 0; m < ROWS; m += 16)
    store_matrices(shared_address(swizzled(shared.ds[turn][group], key, m / 8 + lane / 16)), ds[m / 16]);
  fence_async_proxy();
}

// dq = ds k, or dq += ds k if `add`.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void multiply_ds(Gradient<HEAD_DIM>& dq, const Tile<T, ROWS>& ds,
                                            const Tile<T, HEAD_DIM>& k, bool add) {
  const uint64_t a = mn_major(shared_address(&ds), 0), b = mn_major(shared_address(&k), sizeof(k.parts[0]));
#pragma unroll
  for (int n = 0; n < ROWS; n += 16) {
    const int step = n * COLUMNS * sizeof(T);
    wgmma<T, Major::MN, Major::MN>(dq, advanced(a, step), advanced(b, step), add || n > 0);
  }
}

// By all consumers, in every turn: the warpgroup whose turn it is adds dq = ds k to `sum`.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void take_turn(SumShared<T, HEAD_DIM>& shared,
                                          const Tile<T, HEAD_DIM> (&k)[GROUPS], Fragments<HEAD_DIM>& sum,
                                          int turn, int group) {
  if (group != turn) return named_barrier_arrive(TURN_BARRIER + turn, CONSUMERS);
  named_barrier_sync(TURN_BARRIER + turn, CONSUMERS);
  Gradient<HEAD_DIM> dq;
  wgmma_fence();
  multiply_ds(dq, shared.ds[turn][0], k[0], false);
  multiply_ds(dq, shared.ds[turn][1], k[1], true);
  wgmma_commit();
  const int thread = threadIdx.x % WARPGROUP;
  if (thread == 0) tma_store_wait_read();
  sync_warpgroup();  // what was added before has been read
  wgmma_wait<0>();
  pin(dq);
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 8; ++i)
    shared.dq[group][i][thread] = make_float4(dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
  fence_async_proxy();
  sync_warpgroup();
  if (thread == 0) {
    bulk_add(&sum[0][0].x, shared.dq[group], sizeof(shared.dq[group]));
    tma_store_commit();
  }
}

// dq of a tile of queries for each of GROUPS warpgroups, from their sums. Marks in p.redo where a NaN or Inf
// in a key was multiplied by the 0 of a row that may not see it, or may have been.
template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(CONSUMERS, 1)
    attention_backward_round_kernel(const __grid_constant__ AttentionBackward p,
                                    const __grid_constant__ BackwardMaps maps, Scores scores, int tiles) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Tile<T, HEAD_DIM>(*)[GROUPS]>(memory);
  const int group = threadIdx.x / WARPGROUP;
  const int head = blockIdx.x / tiles, m0 = (blockIdx.x % tiles * GROUPS + group) * ROWS;
  const int b = head / p.heads, h = head % p.heads;
  const Fragments<HEAD_DIM>& sum = sum_of<HEAD_DIM>(p, head, m0);
  const float factor = rest_of_scale<T>(scores);
  Gradient<HEAD_DIM> dq;
  bool bad = false;
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 8; ++i) {
    const float4 x = sum[i][threadIdx.x % WARPGROUP];
    dq[4 * i] = x.x, dq[4 * i + 1] = x.y, dq[4 * i + 2] = x.z, dq[4 * i + 3] = x.w;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool empty = Query(p, b, h, m0 + row_of(2 * half)).minus_lse == -INFINITY;
#pragma unroll
    for (int i = 2 * half; i < HEAD_DIM / 2; i += 4)
#pragma unroll
      for (int j = i; j < i + 2; ++j) {
        bad |= !empty && !(fabsf(dq[j]) < INFINITY);
        dq[j] = empty ? 0.0f : dq[j] * factor;
      }
  }
  bad = __syncthreads_or(bad);
  if (threadIdx.x == 0 && p.start != nullptr) p.redo[blockIdx.x] = bad;
  store_gradient(dq, 1.0f, shared[group], maps.dq, m0, h, b);
  tma_store_wait_read();
#else
  __trap();  // compiled for another GPU than it is launched on
#endif
}

}  // namespace mmkernels::hopper
