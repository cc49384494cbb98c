// dq of a tile of queries of one head. The products are explained in backward_kernel.cuh.
#pragma once

#include "backward_tiles.cuh"

namespace mmkernels {

template <int HEAD_DIM>
using QueriesBlock = BlockShape<4, HEAD_DIM <= 80 ? 2 : 1, 32>;

// q and dout; held where registers are left.
template <typename T, int HEAD_DIM>
using StayingQueries = StayingRows<QueriesBlock<HEAD_DIM>, T, HEAD_DIM, HEAD_DIM != 80>;

// What a block works on: queries from m0 of a head, and the tiles of keys to walk. It lies in shared memory,
// for there is no register to keep it in.
template <int HEAD_DIM>
struct QueriesWork {
  int b, h, kv_h, m0;
  Walk<QueriesBlock<HEAD_DIM>::COLS> walk;
};

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
  QueriesWork<HEAD_DIM> work;
};

// The block's work, and what it needs to know of each row. Ends with a barrier.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void find_work(QueriesShared<T, HEAD_DIM>& shared, const AttentionBackward& p,
                                          int tiles, int wave) {
  using Block = QueriesBlock<HEAD_DIM>;
  static_assert(Block::ROWS <= Block::THREADS);
  const BackwardPosition at(tiles, p.batch * p.heads, wave);
  const int m0 = (tiles - 1 - at.tile) * Block::ROWS;  // of a causal mask the last rows have the most work
  const int b = at.head / p.heads, h = at.head % p.heads;
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
  if (threadIdx.x == 0)
    shared.work = {b, h, h / (p.heads / p.kv_heads), m0, {some.x, some.y, all.y, all.x, 1}};
  __syncthreads();
}

// Sends for the keys of a step.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void load_keys(QueriesShared<T, HEAD_DIM>& shared, const AttentionBackward& p,
                                          int step) {
  using Block = QueriesBlock<HEAD_DIM>;
  auto& stage = shared.stages[step % 2];
  const auto& at = shared.work;
  const int n0 = at.walk.at(step).y;
  const T* k = static_cast<const T*>(p.k) + at.b * p.stride_kb + at.kv_h * p.stride_kh;
  load_tile<Block::THREADS, HEAD_DIM, Block::COLS>(stage.k, k, p.stride_ks, n0, at.walk.hi, p.head_dim);
  const T* v = static_cast<const T*>(p.v) + at.b * p.stride_vb + at.kv_h * p.stride_vh;
  load_tile<Block::THREADS, HEAD_DIM, Block::COLS>(stage.v, v, p.stride_vs, n0, at.walk.hi, p.head_dim);
  copy_async_commit();
}

enum class Tiles {
  FULL,
  RAGGED,
  CLEAN,  // all of them, as ragged ones, without what is not finite in ds k
};

// Walks some of the tiles. The keys of the first one are on their way.
template <Tiles TILES, typename T, int HEAD_DIM>
__device__ __forceinline__ void walk_keys(Gradient<QueriesBlock<HEAD_DIM>, HEAD_DIM>& dq,
                                          QueriesShared<T, HEAD_DIM>& shared,
                                          const StayingQueries<T, HEAD_DIM>& q,
                                          const StayingQueries<T, HEAD_DIM>& dout, const AttentionBackward& p,
                                          const BackwardScores& scores) {
  using Block = QueriesBlock<HEAD_DIM>;
  constexpr bool MASKED = TILES != Tiles::FULL, CLEAN = TILES == Tiles::CLEAN;
  const auto& walk = shared.work.walk;
  for (int step = TILES == Tiles::RAGGED ? walk.full_steps : 0;
       step < (MASKED ? walk.steps : walk.full_steps); ++step) {
    auto& stage = shared.stages[step % 2];
    copy_async_wait<0>();
    __syncthreads();  // the stage is there, and no warp reads the other one
    if (step + 1 < walk.steps) load_keys(shared, p, step + 1);
    Products<Block> s = {}, dp = {};
    multiply_transposed(s, q, stage.k);
    multiply_transposed(dp, dout, stage.v);
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
    attention_backward_queries_kernel(const __grid_constant__ AttentionBackward p, BackwardScores scores,
                                      int tiles, int wave) {
  using Block = QueriesBlock<HEAD_DIM>;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<QueriesShared<T, HEAD_DIM>*>(memory);
  const auto& at = shared.work;
  find_work(shared, p, tiles, wave);
  const T* p_q = static_cast<const T*>(p.q) + at.b * p.stride_qb + at.h * p.stride_qh;
  load_tile<Block::THREADS, HEAD_DIM, Block::ROWS>(shared.q, p_q, p.stride_qs, at.m0, p.seqlen_q, p.head_dim);
  const T* p_dout = static_cast<const T*>(p.dout) + at.b * p.stride_doutb + at.h * p.stride_douth;
  load_tile<Block::THREADS, HEAD_DIM, Block::ROWS>(shared.dout, p_dout, p.stride_douts, at.m0, p.seqlen_q,
                                                   p.head_dim);
  copy_async_commit();
  if (at.walk.steps > 0) load_keys(shared, p, 0);
  copy_async_wait<0>();
  __syncthreads();
  const StayingQueries<T, HEAD_DIM> q(shared.q), dout(shared.dout);

  Gradient<Block, HEAD_DIM> dq = {};
  walk_keys<Tiles::FULL>(dq, shared, q, dout, p, scores);
  walk_keys<Tiles::RAGGED>(dq, shared, q, dout, p, scores);
  if (p.start != nullptr && __syncthreads_or(not_finite(dq, shared))) {
#pragma unroll
    for (auto& tile : dq)
#pragma unroll
      for (auto& fragment : tile)
#pragma unroll
        for (float& x : fragment) x = 0.0f;
    load_keys(shared, p, 0);
    walk_keys<Tiles::CLEAN>(dq, shared, q, dout, p, scores);
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
  T* target = static_cast<T*>(p.dq) + (int64_t(at.b) * p.seqlen_q * p.heads + at.h) * p.head_dim;
  store_gradient<Block, HEAD_DIM, T>(dq, rest_of_scale<T>(scores), shared.q, target,
                                     int64_t(p.heads) * p.head_dim, at.m0, p.seqlen_q, p.head_dim);
}

}  // namespace mmkernels
