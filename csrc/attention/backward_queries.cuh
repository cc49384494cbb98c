// dq of a tile of queries of one head. The products are explained in backward_kernel.cuh.
#pragma once

#include "backward_tiles.cuh"

namespace mmkernels {

template <int HEAD_DIM>
using QueriesBlock = BlockShape<4, HEAD_DIM <= 96 ? 2 : 1, 32>;

template <typename T, int HEAD_DIM>
struct QueriesShared {
  using Block = QueriesBlock<HEAD_DIM>;
  // One is worked on while the other is on its way.
  struct Stage {
    Row<T, HEAD_DIM> k[Block::COLS];
    Row<T, HEAD_DIM> v[Block::COLS];
  };
  Row<T, HEAD_DIM> q[Block::ROWS];  // at the end dq
  Row<T, HEAD_DIM> dout[Block::ROWS];
  Queries<Block::ROWS> queries;  // start and end are 0 in a row without a key
  Stage stages[2];
  int2 ranges[Block::WARPS];
};

// What the block needs to know of each row into shared memory, and the tiles of keys to walk. Ends with a
// barrier.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ Walk<QueriesBlock<HEAD_DIM>::COLS> walk_of_queries(
    QueriesShared<T, HEAD_DIM>& shared, const AttentionBackward& p, int b, int h, int m0) {
  using Block = QueriesBlock<HEAD_DIM>;
  static_assert(Block::ROWS <= Block::THREADS);
  const int local = threadIdx.x, row = m0 + local;
  const bool valid = local < Block::ROWS && row < p.seqlen_q;
  int start = 0, end = valid ? p.seqlen_k : 0;
  if (valid && p.start != nullptr) {
    start = max(p.start[b * p.stride_start_b + row * p.stride_start_s], 0);
    end = min(p.end[b * p.stride_end_b + row * p.stride_end_s], p.seqlen_k);
  }
  const bool empty = start >= end;
  if (local < Block::ROWS) {
    const int64_t place = (int64_t(b) * p.heads + h) * p.seqlen_q + row;
    shared.queries.minus_lse[local] = exponent_of_lse(valid ? p.lse[place] : -INFINITY);
    shared.queries.delta[local] = valid ? p.delta[place] : 0.0f;
    shared.queries.start[local] = empty ? 0 : start;
    shared.queries.end[local] = empty ? 0 : end;
  }
  // Keys that some row sees, and that all rows but those without a key see.
  const int2 some = block_range(shared.ranges, empty ? INT_MAX : start, empty ? 0 : end);
  const int2 all = block_range(shared.ranges, empty ? INT_MAX : end, empty ? 0 : start);
  return {some.x, some.y, all.y, all.x, 1};
}

// k and v of the head of keys that the block walks.
template <typename T>
struct Keys {
  const T* k;
  const T* v;
  int64_t stride_ks, stride_vs;
  int head_dim;
};

template <typename T, int HEAD_DIM>
__device__ __forceinline__ void load_keys(QueriesShared<T, HEAD_DIM>& shared, const Keys<T>& keys,
                                          const Walk<QueriesBlock<HEAD_DIM>::COLS>& walk, int step) {
  using Block = QueriesBlock<HEAD_DIM>;
  auto& stage = shared.stages[step % 2];
  const int n0 = walk.at(step).y;
  load_tile<Block::THREADS, HEAD_DIM, Block::COLS>(stage.k, keys.k, keys.stride_ks, n0, walk.hi,
                                                   keys.head_dim);
  load_tile<Block::THREADS, HEAD_DIM, Block::COLS>(stage.v, keys.v, keys.stride_vs, n0, walk.hi,
                                                   keys.head_dim);
  copy_async_commit();
}

// Walks steps `first` to `last`; the keys of the first one are on their way, those after the last one are
// sent for, if there are any. CLEAN: without what is not finite in ds k.
template <bool MASKED, bool CLEAN, typename T, int HEAD_DIM>
__device__ __forceinline__ void walk_keys(Gradient<QueriesBlock<HEAD_DIM>, HEAD_DIM>& dq,
                                          QueriesShared<T, HEAD_DIM>& shared, const Keys<T>& keys,
                                          const Walk<QueriesBlock<HEAD_DIM>::COLS>& walk,
                                          const Scores& scores, int first, int last) {
  using Block = QueriesBlock<HEAD_DIM>;
  for (int step = first; step < last; ++step) {
    auto& stage = shared.stages[step % 2];
    copy_async_wait<0>();
    __syncthreads();  // the stage is there, and no warp reads the other one
    if (step + 1 < walk.steps()) load_keys(shared, keys, walk, step + 1);
    Products<Block> s = {}, dp = {};
    multiply_transposed<Block, HEAD_DIM, T>(s, shared.q, stage.k);
    multiply_transposed<Block, HEAD_DIM, T>(dp, shared.dout, stage.v);
    score_gradient<T, Block, false, MASKED>(s, dp, shared.queries, walk.at(step).y, scores);
    multiply<Block, HEAD_DIM, CLEAN, T>(dq, dp, stage.k);
  }
}

// Is dq not finite in a row that sees a key?
template <typename T, int HEAD_DIM>
__device__ __forceinline__ bool not_finite(const Gradient<QueriesBlock<HEAD_DIM>, HEAD_DIM>& dq,
                                           const QueriesShared<T, HEAD_DIM>& shared) {
  using Block = QueriesBlock<HEAD_DIM>;
  bool found = false;
#pragma unroll
  for (int r = 0; r < Block::ROW_TILES; ++r)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bool bad = false;
#pragma unroll
      for (int d = 0; d < HEAD_DIM / 8; ++d) bad |= !(fabsf(dq[r][d][i]) < INFINITY);
      found |= bad && shared.queries.end[row_of<Block>(r, i)] > 0;
    }
  return found;
}

template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(QueriesBlock<HEAD_DIM>::THREADS)
    attention_backward_queries_kernel(const __grid_constant__ AttentionBackward p, Scores scores, int tiles,
                                      int wave) {
  using Block = QueriesBlock<HEAD_DIM>;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<QueriesShared<T, HEAD_DIM>*>(memory);
  const Position at(tiles, p.batch * p.heads, wave);
  const int m0 = (tiles - 1 - at.tile) * Block::ROWS;  // of a causal mask the last rows have the most work
  const int b = at.head / p.heads, h = at.head % p.heads, kv_h = h / (p.heads / p.kv_heads);
  const Keys<T> keys = {static_cast<const T*>(p.k) + b * p.stride_kb + kv_h * p.stride_kh,
                        static_cast<const T*>(p.v) + b * p.stride_vb + kv_h * p.stride_vh, p.stride_ks,
                        p.stride_vs, p.head_dim};
  const auto walk = walk_of_queries(shared, p, b, h, m0);

  Gradient<Block, HEAD_DIM> dq = {};
  if (walk.steps() > 0) {
    const T* q = static_cast<const T*>(p.q) + b * p.stride_qb + h * p.stride_qh;
    const T* dout = static_cast<const T*>(p.dout) + b * p.stride_doutb + h * p.stride_douth;
    load_tile<Block::THREADS, HEAD_DIM, Block::ROWS>(shared.q, q, p.stride_qs, m0, p.seqlen_q, p.head_dim);
    load_tile<Block::THREADS, HEAD_DIM, Block::ROWS>(shared.dout, dout, p.stride_douts, m0, p.seqlen_q,
                                                     p.head_dim);
    load_keys(shared, keys, walk, 0);
  }
  walk_keys<false, false>(dq, shared, keys, walk, scores, 0, walk.full_steps());
  walk_keys<true, false>(dq, shared, keys, walk, scores, walk.full_steps(), walk.steps());
  if (p.start != nullptr && __syncthreads_or(not_finite(dq, shared))) {
#pragma unroll
    for (auto& tile : dq)
#pragma unroll
      for (auto& fragment : tile)
#pragma unroll
        for (float& x : fragment) x = 0.0f;
    load_keys(shared, keys, walk, 0);
    walk_keys<true, true>(dq, shared, keys, walk, scores, 0, walk.steps());
  }

#pragma unroll
  for (int r = 0; r < Block::ROW_TILES; ++r)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = row_of<Block>(r, i);
      const bool empty = shared.queries.end[row] == 0 || shared.queries.minus_lse[row] == -INFINITY;
#pragma unroll
      for (int d = 0; d < HEAD_DIM / 8; ++d) dq[r][d][i] = empty ? 0.0f : dq[r][d][i];
    }
  T* target = static_cast<T*>(p.dq) + (int64_t(b) * p.seqlen_q * p.heads + h) * p.head_dim;
  store_gradient<Block, HEAD_DIM, T>(dq, rest_of_scale<T>(scores), shared.q, target,
                                     int64_t(p.heads) * p.head_dim, m0, p.seqlen_q, p.head_dim);
}

}  // namespace mmkernels
