// dq of a tile of queries for each consumer warpgroup. The products are explained in
// hopper_backward_kernel.cuh.
#pragma once

#include "hopper_backward_tiles.cuh"

namespace mmkernels::hopper {

// The keys that some of a tile's queries see, [lo, hi), and that all of them but those without a key see.
struct KeySpan {
  int lo = INT_MAX, hi = 0, full_lo = 0, full_hi = INT_MAX;

  __device__ __forceinline__ void add(const KeySpan& other) {
    lo = min(lo, other.lo);
    hi = max(hi, other.hi);
    full_lo = max(full_lo, other.full_lo);
    full_hi = min(full_hi, other.full_hi);
  }

  // Tiles from lo to a key.
  __device__ __forceinline__ int tiles(int key) const { return max(key - lo + ROWS - 1, 0) / ROWS; }

  __device__ __forceinline__ Seen seen(int n0) const {
    return n0 >= full_lo && n0 + ROWS <= full_hi ? Seen::ALL : Seen::SOME;
  }
};

constexpr int QUERIES_STAGES = 3;  // tiles of keys on their way or worked on

template <typename T, int HEAD_DIM>
struct QueriesShared {
  Tile<T, HEAD_DIM> q[GROUPS];  // at the end dq
  Tile<T, HEAD_DIM> dout[GROUPS];
  Tile<T, HEAD_DIM> k[QUERIES_STAGES];
  Tile<T, HEAD_DIM> v[QUERIES_STAGES];
  Queries queries[GROUPS];
  KeySpan spans[GROUPS * ROWS / 32];  // of 32 queries each
  // Full: TMA has written. Empty: all consumer warps have read.
  uint64_t full[QUERIES_STAGES], empty[QUERIES_STAGES];
};

// By the first GROUPS * ROWS threads, one for each of the block's queries.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void load_queries(QueriesShared<T, HEAD_DIM>& shared, const AttentionBackward& p,
                                             int b, int h, int m0) {
  const int row = threadIdx.x;
  const Query query(p, b, h, m0 + row);
  query.store(shared.queries[row / ROWS], row % ROWS);
  KeySpan span;
  if (!query.empty()) span = {query.bounds.x, query.bounds.y, query.bounds.x, query.bounds.y};
  span.lo = __reduce_min_sync(~0u, span.lo);
  span.hi = __reduce_max_sync(~0u, span.hi);
  span.full_lo = __reduce_max_sync(~0u, span.full_lo);
  span.full_hi = __reduce_min_sync(~0u, span.full_hi);
  if (row % 32 == 0) shared.spans[row / 32] = span;
}

// By one thread: tile after tile of keys, with the first of them the queries.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void load_tiles(QueriesShared<T, HEAD_DIM>& shared, Ring<QUERIES_STAGES>& ring,
                                           const BackwardMaps& maps, const KeySpan& span, int b, int h,
                                           int kv_h, int m0) {
#pragma unroll 1
  for (int n0 = span.lo; n0 < span.hi; n0 += ROWS, ring.advance()) {
    const int i = ring.stage;
    const bool first = n0 == span.lo;
    barrier_wait(shared.empty[i], ring.parity ^ 1);
    barrier_arrive_expect(shared.full[i], sizeof(shared.k[i]) + sizeof(shared.v[i]) +
                                              (first ? sizeof(shared.q) + sizeof(shared.dout) : 0));
    load_tile(shared.k[i], maps.k, shared.full[i], n0, kv_h, b);
    load_tile(shared.v[i], maps.v, shared.full[i], n0, kv_h, b);
    for (int group = 0; group < GROUPS && first; ++group) {
      load_tile(shared.q[group], maps.q, shared.full[i], m0 + group * ROWS, h, b);
      load_tile(shared.dout[group], maps.dout, shared.full[i], m0 + group * ROWS, h, b);
    }
  }
}

// By all consumers, each a part: zeros where a tile is not finite.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void clean(Tile<T, HEAD_DIM>& tile) {
  constexpr uint32_t EXPONENT = std::is_same_v<T, __half> ? 0x7c00 : 0x7f80;
  uint32_t* pairs = reinterpret_cast<uint32_t*>(tile.parts);
#pragma unroll 1
  for (int i = threadIdx.x - WARPGROUP; i < int(sizeof(tile) / sizeof(*pairs)); i += CONSUMERS) {
    uint32_t x = pairs[i];
    if ((x & EXPONENT) == EXPONENT) x &= 0xffff0000;
    if ((x >> 16 & EXPONENT) == EXPONENT) x &= 0x0000ffff;
    pairs[i] = x;
  }
}

// Is dq not finite in a row that sees a key?
template <size_t COUNT>
__device__ __forceinline__ bool not_finite(const float (&dq)[COUNT], const Queries& queries) {
  bool found = false;
#pragma unroll
  for (int i = 0; i < int(COUNT); ++i)
    found |= !(fabsf(dq[i]) < INFINITY) && queries.minus_lse[row_of(i)] != -INFINITY;
  return found;
}

// By the producer warp and all consumers: has one of them found that the keys must be walked again?
__device__ __forceinline__ bool walk_again(bool found) {
  return named_barrier_any(VOTE_BARRIER, 32 + CONSUMERS, found);
}

// Lets pass `count` tiles of keys, which none of a warpgroup's queries sees.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void pass_over(QueriesShared<T, HEAD_DIM>& shared, Ring<QUERIES_STAGES>& ring,
                                          int count) {
  for (; count > 0; --count, ring.advance()) {
    barrier_wait(shared.full[ring.stage], ring.parity);
    release(shared.empty[ring.stage]);
  }
}

// A consumer warpgroup: dq = ds k of its tile of queries. The product of a tile of keys begins behind those
// of the next scores, and runs under their softmax. CLEAN: what is not finite in k counts as 0.
template <bool CLEAN, typename T, int HEAD_DIM>
__device__ __forceinline__ void consume_keys(Gradient<HEAD_DIM>& dq, QueriesShared<T, HEAD_DIM>& shared,
                                             Ring<QUERIES_STAGES>& ring, const Scores& scores,
                                             const KeySpan& all, const KeySpan& own, int group) {
#pragma unroll
  for (float& x : dq) x = 0.0f;
  const int count = all.tiles(all.hi), first = CLEAN ? 0 : (own.lo - all.lo) / ROWS;
  const int last = CLEAN ? count : all.tiles(own.hi);
  if (first >= last) return pass_over(shared, ring, count);
  pass_over(shared, ring, first);
  const Queries& queries = shared.queries[group];
  Products s, dp;
  Operand p, ds;
  int before = 0;  // stage of the tile before this one
  for (int j = first; j < last; ++j, ring.advance()) {
    const int i = ring.stage, n0 = all.lo + j * ROWS;
    barrier_wait(shared.full[i], ring.parity);
    multiply_transposed(s, shared.q[group], shared.k[i]);
    multiply_transposed(dp, shared.dout[group], shared.v[i]);
    if (j > first) {
      multiply(dq, ds, shared.k[before]);
      wgmma_wait<2>();
    } else {
      wgmma_wait<1>();
    }
    pin(s);
    const Seen seen = CLEAN ? Seen::SOME : own.seen(n0);
    exponentiate<false, T>(s, p, queries, n0, scores, seen);
    wgmma_wait<0>();
    pin(dp);
    if (j > first) release(shared.empty[before]);
    before = i;
    differentiate<false, T>(s, dp, ds, queries, scores, seen);
    if constexpr (CLEAN) {
      named_barrier_sync(CONSUMERS_BARRIER, CONSUMERS);  // both have s
      clean(shared.k[i]);
      fence_async_proxy();
      named_barrier_sync(CONSUMERS_BARRIER, CONSUMERS);
    }
  }
  multiply(dq, ds, shared.k[before]);
  wgmma_wait<0>();
  pin(dq);
  release(shared.empty[before]);
  pass_over(shared, ring, count - last);
}

template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(THREADS, 1)
    attention_backward_queries_kernel(const __grid_constant__ AttentionBackward p,
                                      const __grid_constant__ BackwardMaps maps, Scores scores, int tiles) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<QueriesShared<T, HEAD_DIM>*>(memory);
  // The tiles of a head run side by side; of a causal mask the last queries have the most work.
  const int head = blockIdx.x / tiles, tile = tiles - 1 - blockIdx.x % tiles, m0 = tile * GROUPS * ROWS;
  if (p.redo != nullptr && !p.redo[head * tiles + tile]) return;
  const int b = head / p.heads, h = head % p.heads, kv_h = h / (p.heads / p.kv_heads);
  if (threadIdx.x == 0) {
    prefetch_descriptor(maps.q);
    prefetch_descriptor(maps.k);
    prefetch_descriptor(maps.v);
    prefetch_descriptor(maps.dout);
    for (int i = 0; i < QUERIES_STAGES; ++i) {
      barrier_init(shared.full[i], 1);
      barrier_init(shared.empty[i], CONSUMERS / 32);
    }
    fence_barrier_init();
  }
  if (threadIdx.x < GROUPS * ROWS) load_queries(shared, p, b, h, m0);
  __syncthreads();
  KeySpan all;
#pragma unroll
  for (const KeySpan& span : shared.spans) all.add(span);

  Ring<QUERIES_STAGES> ring;
  if (threadIdx.x < WARPGROUP) {
    give_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x >= 32) return;
    if (threadIdx.x == 0) load_tiles(shared, ring, maps, all, b, h, kv_h, m0);
    __syncwarp();
    if (p.start != nullptr && walk_again(false) && threadIdx.x == 0)
      load_tiles(shared, ring, maps, all, b, h, kv_h, m0);
    return;
  }
  take_registers<CONSUMER_REGISTERS>();
  const int group = threadIdx.x / WARPGROUP - 1;
  KeySpan own;
#pragma unroll
  for (int i = 0; i < ROWS / 32; ++i) own.add(shared.spans[group * ROWS / 32 + i]);
  Gradient<HEAD_DIM> dq;
  consume_keys<false>(dq, shared, ring, scores, all, own, group);
  if (p.start != nullptr && walk_again(not_finite(dq, shared.queries[group])))
    consume_keys<true>(dq, shared, ring, scores, all, own, group);
  const float factor = rest_of_scale<T>(scores);
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 2; ++i)
    dq[i] = shared.queries[group].minus_lse[row_of(i)] == -INFINITY ? 0.0f : dq[i] * factor;
  store_gradient(dq, 1.0f, shared.q[group], maps.dq, m0 + group * ROWS, h, b);
  tma_store_wait_read();
#else
  __trap();  // compiled for another GPU than it is launched on
#endif
}

}  // namespace mmkernels::hopper
