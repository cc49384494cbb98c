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
  unsigned marks[STAGES][ROWS / 32];  // of 32 queries: see `mark`
  int2 place[STAGES];                 // head among all, and first query
  int2 rows[GROUPS * ROWS / 32];      // queries that 32 keys need
  // Full: all of a stage is written. Empty: all consumer warps have read it.
  uint64_t keys_full, full[STAGES], empty[STAGES];
};

// By the first GROUPS * ROWS threads, one for each of the block's keys: the queries that they need.
template <typename T, int HEAD_DIM, bool SUM>
__device__ __forceinline__ void find_rows(KeysShared<T, HEAD_DIM, SUM>& shared, const AttentionBackward& p,
                                          int b, int n0) {
  const int key = n0 + threadIdx.x;
  int2 rows = make_int2(INT_MAX, 0);
  if (key < p.seqlen_k) {
    int first = 0, last = p.seqlen_q;
    if (p.row_start != nullptr) {
      first = max(p.row_start[b * p.stride_row_start_b + key * p.stride_row_start_s], 0);
      last = min(p.row_end[b * p.stride_row_end_b + key * p.stride_row_end_s], p.seqlen_q);
    }
    if (first < last) rows = make_int2(first, last);
  }
  rows = make_int2(__reduce_min_sync(~0u, rows.x), __reduce_max_sync(~0u, rows.y));
  if (threadIdx.x % 32 == 0) shared.rows[threadIdx.x / 32] = rows;
}

// The tiles of queries that a block of keys walks: those of all heads that share the keys.
struct QueryWalk {
  int lo, hi, steps;
  int h, m0;  // of this step

  template <size_t COUNT>
  __device__ __forceinline__ QueryWalk(const int2 (&rows)[COUNT], int kv_h, int groups)
      : lo(INT_MAX), hi(0), h(kv_h * groups) {
#pragma unroll
    for (const int2& x : rows) lo = min(lo, x.x), hi = max(hi, x.y);
    lo = lo / ROWS * ROWS;
    steps = lo < hi ? groups * ((hi - lo + ROWS - 1) / ROWS) : 0;
    m0 = lo;
  }

  __device__ __forceinline__ void advance() {
    m0 += ROWS;
    if (m0 >= hi) m0 = lo, ++h;
  }
};

// Bits that say of a query and each group's keys, from n0 on: it sees some of them; it sees not all of them.
// One that sees no key, or is beyond the last, sees not all: its product with an infinite key may be NaN.
__device__ __forceinline__ unsigned mark(const Query& query, int n0) {
  unsigned marks = 0;
  if (query.empty()) return ((1 << GROUPS) - 1) << GROUPS;
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
    const int first = n0 + group * ROWS, last = first + ROWS;
    if (query.bounds.x < last && query.bounds.y > first) marks |= 1 << group;
    if (query.bounds.x > first || query.bounds.y < last) marks |= 1 << (GROUPS + group);
  }
  return marks;
}

__device__ __forceinline__ Seen seen_of(const unsigned (&marks)[ROWS / 32], int group) {
  const unsigned all = marks[0] | marks[1];
  if (!(all >> group & 1)) return Seen::NOTHING;
  return all >> (GROUPS + group) & 1 ? Seen::SOME : Seen::ALL;
}

// By one thread: sends for k and v, and for q and dout step by step.
template <typename T, int HEAD_DIM, bool SUM>
__device__ __forceinline__ void load_tiles(KeysShared<T, HEAD_DIM, SUM>& shared, const BackwardMaps& maps,
                                           QueryWalk walk, int heads, int b, int kv_h, int n0) {
  barrier_arrive_expect(shared.keys_full, sizeof(shared.k) + sizeof(shared.v));
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
    load_tile(shared.k[group], maps.k, shared.keys_full, n0 + group * ROWS, kv_h, b);
    load_tile(shared.v[group], maps.v, shared.keys_full, n0 + group * ROWS, kv_h, b);
  }
  Ring<shared.STAGES> ring;
#pragma unroll 1
  for (int step = 0; step < walk.steps; ++step, walk.advance(), ring.advance()) {
    const int i = ring.stage;
    barrier_wait(shared.empty[i], ring.parity ^ 1);
    if (SUM) shared.place[i] = make_int2(b * heads + walk.h, walk.m0);
    barrier_arrive_expect(shared.full[i], sizeof(shared.q[i]) + sizeof(shared.dout[i]));
    load_tile(shared.q[i], maps.q, shared.full[i], walk.m0, walk.h, b);
    load_tile(shared.dout[i], maps.dout, shared.full[i], walk.m0, walk.h, b);
  }
}

// By ROWS threads, one for each query of a tile: what else the steps need of these.
template <typename T, int HEAD_DIM, bool SUM>
__device__ __forceinline__ void load_queries(KeysShared<T, HEAD_DIM, SUM>& shared, const AttentionBackward& p,
                                             QueryWalk walk, int b, int n0) {
  const int row = threadIdx.x % ROWS;
  Ring<shared.STAGES> ring;
  for (int step = 0; step < walk.steps; ++step, walk.advance(), ring.advance()) {
    asm volatile("" : "+r"(b));  // addresses are made anew, not kept in registers, of which there are few
    const Query query(p, b, walk.h, walk.m0 + row);
    const unsigned marks = __reduce_or_sync(~0u, mark(query, n0));
    const int i = ring.stage;
    barrier_wait(shared.empty[i], ring.parity ^ 1);
    query.store(shared.queries[i], row);
    if (row % 32 == 0) shared.marks[i][row / 32] = marks;
    release(shared.full[i]);
  }
}

// A consumer warpgroup: dk and dv of its tile of keys, from n0 on.
template <typename T, int HEAD_DIM, bool SUM>
__device__ __forceinline__ void consume_queries(KeysShared<T, HEAD_DIM, SUM>& shared,
                                                const AttentionBackward& p, const BackwardMaps& maps,
                                                const Scores& scores, int steps, int b, int kv_h, int n0,
                                                int group) {
  Gradient<HEAD_DIM> dk, dv;
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 2; ++i) dk[i] = dv[i] = 0.0f;
  Operand p_rounded, ds;
  barrier_wait(shared.keys_full, 0);
  Ring<shared.STAGES> ring;
  for (; steps > 0; --steps, ring.advance()) {
    const int i = ring.stage, turn = steps % 2;
    barrier_wait(shared.full[i], ring.parity);
    const Seen seen = seen_of(shared.marks[i], group);
    if (seen != Seen::NOTHING) {
      Products s, dp;
      multiply_transposed(s, shared.k[group], shared.q[i]);
      multiply_transposed(dp, shared.v[group], shared.dout[i]);
      wgmma_wait<1>();
      pin(s);
      exponentiate<true, T>(s, p_rounded, shared.queries[i], n0, scores, seen);
      multiply(dv, p_rounded, shared.dout[i]);
      wgmma_wait<1>();
      pin(dp);
      differentiate<true, T>(s, dp, ds, shared.queries[i], scores, seen);
      multiply(dk, ds, shared.q[i]);
      if constexpr (SUM) share_ds(shared.sum, ds, turn, group);
      wgmma_wait<0>();
    } else if constexpr (SUM) {
      share_ds(shared.sum, Operand{}, turn, group);
    }
    const int2 place = shared.place[i];
    release(shared.empty[i]);
    if constexpr (SUM) take_turn(shared.sum, shared.k, sum_of<HEAD_DIM>(p, place.x, place.y), turn, group);
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
    prefetch_descriptor(maps.q);
    prefetch_descriptor(maps.k);
    prefetch_descriptor(maps.v);
    prefetch_descriptor(maps.dout);
    barrier_init(shared.keys_full, 1);
    for (int i = 0; i < shared.STAGES; ++i) {
      barrier_init(shared.full[i], 1 + ROWS / 32);  // load_tiles, and the warps of load_queries
      barrier_init(shared.empty[i], CONSUMERS / 32);
    }
    fence_barrier_init();
  }
  // The tiles of a head run side by side; of a causal mask the first keys have the most work.
  const int head = blockIdx.x / tiles, n0 = blockIdx.x % tiles * GROUPS * ROWS;
  const int b = head / p.kv_heads, kv_h = head % p.kv_heads;
  if (threadIdx.x < GROUPS * ROWS) find_rows(shared, p, b, n0);
  __syncthreads();
  const QueryWalk walk(shared.rows, kv_h, p.heads / p.kv_heads);
  if (threadIdx.x < WARPGROUP) {
    give_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x < ROWS)
      load_queries(shared, p, walk, b, n0);
    else if (threadIdx.x == ROWS)
      load_tiles(shared, maps, walk, p.heads, b, kv_h, n0);
  } else {
    take_registers<CONSUMER_REGISTERS>();
    const int group = threadIdx.x / WARPGROUP - 1;
    consume_queries(shared, p, maps, scores, walk.steps, b, kv_h, n0 + group * ROWS, group);
  }
#else
  __trap();  // compiled for another GPU than it is launched on
#endif
}

}  // namespace mmkernels::hopper
