// dk and dv of a tile of keys for each consumer warpgroup, summed over the query heads that share them. The
// products are explained in hopper_backward_kernel.cuh.
#pragma once

#include "hopper_backward_sum.cuh"

namespace mmkernels::hopper {

struct Nothing {};

// SUM: the kernel adds to dq, too.
template <typename T, int HEAD_DIM, bool SUM>
struct KeysShared {
  // Tiles of queries on their way or worked on.
  static constexpr int STAGES = SUM && HEAD_DIM > 64 ? 2 : 3;
  Tile<T, HEAD_DIM> k[GROUPS];  // at the end dk
  Tile<T, HEAD_DIM> v[GROUPS];  // at the end dv
  Tile<T, HEAD_DIM> q[STAGES];
  Tile<T, HEAD_DIM> dout[STAGES];
  std::conditional_t<SUM, SumShared<T, HEAD_DIM>, Nothing> sum;
  Queries queries[STAGES];
  Seen seen[STAGES][GROUPS];
  int tile[STAGES];  // of all tiles of queries
  // Full: all of a stage is written. Empty: all consumer warps have read it.
  uint64_t keys_full, full[STAGES], empty[STAGES];
};

// By one warp: the queries that some key of the block's needs, [x, y).
__device__ __forceinline__ int2 queries_of(const AttentionBackward& p, int b, int n0) {
  if (p.row_start == nullptr) return make_int2(0, p.seqlen_q);
  int lo = INT_MAX, hi = 0;
#pragma unroll
  for (int i = 0; i < GROUPS * ROWS; i += 32) {
    const int key = n0 + i + threadIdx.x;
    if (key < p.seqlen_k) {
      const int first = max(p.row_start[b * p.stride_row_start_b + key * p.stride_row_start_s], 0);
      const int last = min(p.row_end[b * p.stride_row_end_b + key * p.stride_row_end_s], p.seqlen_q);
      if (first < last) lo = min(lo, first), hi = max(hi, last);
    }
  }
  return make_int2(__reduce_min_sync(~0u, lo), __reduce_max_sync(~0u, hi));
}

// The producer warp: tile after tile of the queries of all heads that share the keys, but for those of which
// the mask leaves nothing.
template <typename T, int HEAD_DIM, bool SUM>
__device__ __forceinline__ void produce_queries(KeysShared<T, HEAD_DIM, SUM>& shared, const AttentionBackward& p,
                                                const BackwardMaps& maps, int b, int kv_h, int n0) {
  const int lane = threadIdx.x, groups = p.heads / p.kv_heads;
  if (lane == 0) {
    barrier_arrive_expect(shared.keys_full, sizeof(shared.k) + sizeof(shared.v));
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
      load_tile(shared.k[group], maps.k, shared.keys_full, n0 + group * ROWS, kv_h, b);
      load_tile(shared.v[group], maps.v, shared.keys_full, n0 + group * ROWS, kv_h, b);
    }
  }
  const int2 rows = queries_of(p, b, n0);
  Ring<shared.STAGES> ring;
  for (int h = kv_h * groups; h < (kv_h + 1) * groups; ++h)
    for (int m0 = rows.x / ROWS * ROWS; m0 < rows.y; m0 += ROWS) {
      const int i = ring.stage;
      barrier_wait(shared.empty[i], ring.parity ^ 1);
      unsigned some = 0, not_all = 0;  // a bit for each consumer warpgroup
#pragma unroll 1
      for (int row = lane; row < ROWS; row += 32) {
        const Query query(p, b, h, m0 + row);
        query.store(shared.queries[i], row);
        if (query.empty()) continue;  // its p is 0 wherever it goes
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) {
          const int first = n0 + group * ROWS, last = first + ROWS;
          if (query.bounds.x < last && query.bounds.y > first) some |= 1 << group;
          if (query.bounds.x > first || query.bounds.y < last) not_all |= 1 << group;
        }
      }
      some = __reduce_or_sync(~0u, some);
      if (some == 0) continue;
      not_all = __reduce_or_sync(~0u, not_all);
      if (lane < GROUPS)
        shared.seen[i][lane] = !(some >> lane & 1)     ? Seen::NOTHING
                               : (not_all >> lane & 1) ? Seen::SOME
                                                       : Seen::ALL;
      if (lane == 0) {
        if constexpr (SUM) shared.tile[i] = (b * p.heads + h) * sum_tiles(p) + m0 / ROWS;
        barrier_arrive_expect(shared.full[i], sizeof(shared.q[i]) + sizeof(shared.dout[i]));
        load_tile(shared.q[i], maps.q, shared.full[i], m0, h, b);
        load_tile(shared.dout[i], maps.dout, shared.full[i], m0, h, b);
      } else {
        barrier_arrive(shared.full[i]);
      }
      ring.advance();
    }
  barrier_wait(shared.empty[ring.stage], ring.parity ^ 1);
  if (lane < GROUPS) shared.seen[ring.stage][lane] = Seen::END;
  barrier_arrive(shared.full[ring.stage]);
}

// A consumer warpgroup: dk and dv of its tile of keys, from n0 on.
template <typename T, int HEAD_DIM, bool SUM>
__device__ __forceinline__ void consume_queries(KeysShared<T, HEAD_DIM, SUM>& shared, const BackwardMaps& maps,
                                                const Scores& scores, float* dq_sum, int b, int kv_h, int n0,
 int group) {
  Gradient<HEAD_DIM> dk, dv;
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 2; ++i) dk[i] = dv[i] = 0.0f;
  Operand p, ds;
  barrier_wait(shared.keys_full, 0);
  Ring<shared.STAGES> ring;
  uint32_t turn = 0;
  for (;; ring.advance(), turn ^= 1) {
    const int i = ring.stage;
    barrier_wait(shared.full[i], ring.parity);
    const Seen seen = shared.seen[i][group];
    if (seen == Seen::END) break;
    if (seen != Seen::NOTHING) {
      Products s, dp;
      wgmma_fence();
      multiply_transposed(s, shared.k[group], shared.q[i]);
      multiply_transposed(dp, shared.v[group], shared.dout[i]);
      wgmma_wait<1>();
      pin(s);
      exponentiate<true, T>(s, p, shared.queries[i], n0, scores, seen);
      wgmma_fence();
      multiply(dv, p, shared.dout[i]);
      wgmma_wait<1>();
      pin(dp);
      differentiate<true, T>(s, dp, ds, shared.queries[i], scores, seen);
      wgmma_fence();
      multiply(dk, ds, shared.q[i]);
      if constexpr (SUM) share_ds(shared.sum, ds, turn, group);
      wgmma_wait<0>();
    } else if constexpr (SUM) {
      share_ds(shared.sum, Operand{}, turn, group);
    }
    float* sum = SUM ? dq_sum + int64_t(shared.tile[i]) * ROWS * HEAD_DIM : nullptr;
    release(shared.empty[i]);
    if constexpr (SUM) take_turn(shared.sum, shared.k, sum, turn, group);
  }
  if constexpr (SUM) named_barrier_sync(CONSUMERS_BARRIER, CONSUMERS);  // nobody reads k any longer
  pin(dk);
  pin(dv);
  store_gradient(dk, rest_of_scale<T>(scores), shared.k[group], maps.dk, n0, kv_h, b);
  store_gradient(dv, 1.0f, shared.v[group], maps.dv, n0, kv_h, b);
  tma_store_wait_read();
}

template <typename T, int HEAD_DIM, bool SUM>
__global__ void __launch_bounds__(THREADS, 1)
    attention_backward_keys_kernel(const __grid_constant__ AttentionBackward p,
                                   const __grid_constant__ BackwardMaps maps, Scores scores, int tiles) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<KeysShared<T, HEAD_DIM, SUM>*>(memory);
  if (threadIdx.x == 0) {
    barrier_init(shared.keys_full, 1);
    for (int i = 0; i < shared.STAGES; ++i) {
      barrier_init(shared.full[i], 32);
      barrier_init(shared.empty[i], CONSUMERS / 32);
    }
    fence_barrier_init();
  }
  __syncthreads();
  // The tiles of a head run side by side; of a causal mask the first keys have the most work.
  const int head = blockIdx.x / tiles, n0 = blockIdx.x % tiles * GROUPS * ROWS;
  const int b = head / p.kv_heads, kv_h = head % p.kv_heads;
  if (threadIdx.x < WARPGROUP) {
    give_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x < 32) produce_queries(shared, p, maps, b, kv_h, n0);
  } else {
    take_registers<CONSUMER_REGISTERS>();
    const int group = threadIdx.x / WARPGROUP - 1;
    consume_queries(shared, maps, scores, p.dq_sum, b, kv_h, n0 + group * ROWS, group);
  }
#endif
}

}  // namespace mmkernels::hopper
