// dk and dv of a tile of keys, summed over the query heads that share them. The products are explained in
// backward_kernel.cuh.
#pragma once

#include "backward_tiles.cuh"

namespace mmkernels {

// dk and dv take 32 HEAD_DIM bytes of registers for every row tile.
template <int HEAD_DIM>
using KeysBlock = BlockShape<4, HEAD_DIM == 64 ? 2 : 1, HEAD_DIM == 80 ? 64 : 32>;

template <typename T, int HEAD_DIM>
struct KeysShared {
  using Block = KeysBlock<HEAD_DIM>;
  // One is worked on while the other is on its way.
  struct Stage {
    Row<T, HEAD_DIM> q[Block::COLS];
    Row<T, HEAD_DIM> dout[Block::COLS];
    Queries<Block::COLS> queries;  // start and end in ragged tiles only
  };
  Row<T, HEAD_DIM> k[Block::ROWS];  // at the end dk
  Row<T, HEAD_DIM> v[Block::ROWS];  // at the end dv
  Stage stages[2];
  int2 ranges[Block::WARPS];
};

template <int HEAD_DIM>
struct KeysState {
  Gradient<KeysBlock<HEAD_DIM>, HEAD_DIM> dk;
  Gradient<KeysBlock<HEAD_DIM>, HEAD_DIM> dv;
};

// What a block works on: keys from n0 of a head, and the query heads from h that share them. Of a causal mask
// the first keys have the most work and come first.
template <int HEAD_DIM>
struct KeysPosition {
  int b, kv_h, h, n0;

  __device__ __forceinline__ KeysPosition(const AttentionBackward& p, int tiles, int wave) {
    const Position at(tiles, p.batch * p.kv_heads, wave);
    b = at.head / p.kv_heads;
    kv_h = at.head % p.kv_heads;
    h = kv_h * (p.heads / p.kv_heads);
    n0 = at.tile * KeysBlock<HEAD_DIM>::ROWS;
  }
};

// The tiles of queries to walk for the keys from n0 of batch element b. A tile is full if all of its rows see
// all of the keys; those without any key may run through it, for their p is 0. Full rows are the run of them
// around the middle of all rows.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ Walk<KeysBlock<HEAD_DIM>::COLS> walk_of_keys(KeysShared<T, HEAD_DIM>& shared,
                                                                        const AttentionBackward& p, int b,
                                                                        int n0) {
  using Block = KeysBlock<HEAD_DIM>;
  static_assert(Block::ROWS <= Block::THREADS);
  const int n1 = min(n0 + Block::ROWS, p.seqlen_k), key = n0 + threadIdx.x;
  int lo = 0, hi = p.seqlen_q;
  if (p.row_start != nullptr) {
    int first = 0, last = 0;
    if (key < n1) {
      first = max(p.row_start[b * p.stride_row_start_b + key * p.stride_row_start_s], 0);
      last = min(p.row_end[b * p.stride_row_end_b + key * p.stride_row_end_s], p.seqlen_q);
    }
    const bool empty = first >= last;
    const int2 range = block_range(shared.ranges, empty ? INT_MAX : first, empty ? 0 : last);
    lo = min(range.x, range.y);
    hi = range.y;
  }
  int full_lo = lo, full_hi = hi;
  if (p.start != nullptr) {
    const int middle = (lo + hi) / 2;
#pragma unroll 4
    for (int row = lo + threadIdx.x; row < hi; row += Block::THREADS) {
      const int start = p.start[b * p.stride_start_b + row * p.stride_start_s];
      const int end = p.end[b * p.stride_end_b + row * p.stride_end_s];
      const bool partial = start < end && (start > n0 || end < n1);
      if (partial && row < middle) full_lo = max(full_lo, row + 1);
      if (partial && row >= middle) full_hi = min(full_hi, row);
    }
    const int2 range = block_range(shared.ranges, full_hi, full_lo);
    full_lo = range.y;
    full_hi = range.x;
  }
  return {lo, hi, full_lo, full_hi, p.heads / p.kv_heads};
}

// Sends for the queries of a step. Rows that are not there see nothing.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void load_queries(KeysShared<T, HEAD_DIM>& shared, const AttentionBackward& p,
                                             const Walk<KeysBlock<HEAD_DIM>::COLS>& walk, KeysPosition<HEAD_DIM> at, int step) {
  using Block = KeysBlock<HEAD_DIM>;
  auto& stage = shared.stages[step % 2];
  const int2 tile = walk.at(step);
  asm volatile("" : "+r"(at.b));  // what follows from it is computed anew, not kept in registers
  const int h = at.h + tile.x;
  const T* q = static_cast<const T*>(p.q) + at.b * p.stride_qb + h * p.stride_qh;
  load_tile<Block::THREADS, HEAD_DIM, Block::COLS>(stage.q, q, p.stride_qs, tile.y, walk.hi, p.head_dim);
  const T* dout = static_cast<const T*>(p.dout) + at.b * p.stride_doutb + h * p.stride_douth;
  load_tile<Block::THREADS, HEAD_DIM, Block::COLS>(stage.dout, dout, p.stride_douts, tile.y, walk.hi, p.head_dim);
  const int local = threadIdx.x, row = tile.y + local;
  if (local < Block::COLS) {
    const bool valid = row < walk.hi;
    const int64_t place = (int64_t(at.b) * p.heads + h) * p.seqlen_q + row;
    copy_async_4(shared_address(&stage.queries.minus_lse[local]), p.lse + place, valid);
    copy_async_4(shared_address(&stage.queries.delta[local]), p.delta + place, valid);
    if (p.start == nullptr) {
      stage.queries.start[local] = 0;
      stage.queries.end[local] = valid ? p.seqlen_k : 0;
    } else if (step >= walk.full_steps()) {
      const int32_t* start = p.start + at.b * p.stride_start_b + row * p.stride_start_s;
      copy_async_4(shared_address(&stage.queries.start[local]), start, valid);
      const int32_t* end = p.end + at.b * p.stride_end_b + row * p.stride_end_s;
      copy_async_4(shared_address(&stage.queries.end[local]), end, valid);
    }
  }
  copy_async_commit();
}

// Walks steps `first` to `last`; the queries of the first one are on their way, those after the last one are
// sent for, if there are any.
template <bool MASKED, typename T, int HEAD_DIM>
__device__ __forceinline__ void walk_queries(KeysState<HEAD_DIM>& state, KeysShared<T, HEAD_DIM>& shared,
                                             const AttentionBackward& p,
 const Walk<KeysBlock<HEAD_DIM>::COLS>& walk, const Scores& scores,
 KeysPosition<HEAD_DIM> at, int first, int last) {
  using Block = KeysBlock<HEAD_DIM>;
  for (int step = first; step < last; ++step) {
    auto& stage = shared.stages[step % 2];
    copy_async_wait<0>();
    if (threadIdx.x < Block::COLS) {  // what this thread has copied
      float& x = stage.queries.minus_lse[threadIdx.x];
      x = exponent_of_lse(x);
    }
    __syncthreads();  // the stage is there, and no warp reads the other one
    if (step + 1 < walk.steps()) load_queries(shared, p, walk, at, step + 1);
    Products<Block> s = {}, dp = {};
    multiply_transposed<Block, HEAD_DIM, T>(s, shared.k, stage.q);
    multiply_transposed<Block, HEAD_DIM, T>(dp, shared.v, stage.dout);
    score_gradient<T, Block, true, MASKED>(s, dp, stage.queries, at.n0, scores);
    multiply<Block, HEAD_DIM, false, T>(state.dv, s, stage.dout);
    multiply<Block, HEAD_DIM, false, T>(state.dk, dp, stage.q);
  }
}

template <typename T, int HEAD_DIM>
__device__ __forceinline__ void store_keys(const KeysState<HEAD_DIM>& state, KeysShared<T, HEAD_DIM>& shared,
                                           const AttentionBackward& p, const Scores& scores,
                                           KeysPosition<HEAD_DIM> at) {
  using Block = KeysBlock<HEAD_DIM>;
  const int64_t offset = (int64_t(at.b) * p.seqlen_k * p.kv_heads + at.kv_h) * p.head_dim;
  const int64_t stride = int64_t(p.kv_heads) * p.head_dim;
  store_gradient<Block, HEAD_DIM, T>(state.dk, rest_of_scale<T>(scores), shared.k,
                                     static_cast<T*>(p.dk) + offset, stride, at.n0, p.seqlen_k, p.head_dim);
  store_gradient<Block, HEAD_DIM, T>(state.dv, 1.0f, shared.v, static_cast<T*>(p.dv) + offset, stride, at.n0,
                                     p.seqlen_k, p.head_dim);
}

template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(KeysBlock<HEAD_DIM>::THREADS)
    attention_backward_keys_kernel(const __grid_constant__ AttentionBackward p, Scores scores, int tiles,
                                   int wave) {
  using Block = KeysBlock<HEAD_DIM>;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<KeysShared<T, HEAD_DIM>*>(memory);
  const KeysPosition<HEAD_DIM> at(p, tiles, wave);
  const auto walk = walk_of_keys(shared, p, at.b, at.n0);
  KeysState<HEAD_DIM> state = {};
  if (walk.steps() > 0) {
    const T* k = static_cast<const T*>(p.k) + at.b * p.stride_kb + at.kv_h * p.stride_kh;
    const T* v = static_cast<const T*>(p.v) + at.b * p.stride_vb + at.kv_h * p.stride_vh;
    load_tile<Block::THREADS, HEAD_DIM, Block::ROWS>(shared.k, k, p.stride_ks, at.n0, p.seqlen_k, p.head_dim);
    load_tile<Block::THREADS, HEAD_DIM, Block::ROWS>(shared.v, v, p.stride_vs, at.n0, p.seqlen_k, p.head_dim);
    load_queries(shared, p, walk, at, 0);
  }
  walk_queries<false>(state, shared, p, walk, scores, at, 0, walk.full_steps());
  walk_queries<true>(state, shared, p, walk, scores, at, walk.full_steps(), walk.steps());
  store_keys(state, shared, p, scores, KeysPosition<HEAD_DIM>(p, tiles, wave));
}

}  // namespace mmkernels
