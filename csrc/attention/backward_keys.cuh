// dk and dv of a tile of keys, summed over the query heads that share them. The products are explained in
// backward_kernel.cuh.
#pragma once

#include "backward_tiles.cuh"

namespace mmkernels {

// dk and dv take most of the registers: HEAD_DIM of a thread's 255 for every row tile.
template <int HEAD_DIM>
using KeysBlock = BlockShape<4, HEAD_DIM == 64 ? 2 : 1, HEAD_DIM == 80 ? 64 : 32>;

// Held where registers are left.
template <typename T, int HEAD_DIM>
using StayingK = StayingRows<KeysBlock<HEAD_DIM>, T, HEAD_DIM, HEAD_DIM != 64>;
template <typename T, int HEAD_DIM>
using StayingV = StayingRows<KeysBlock<HEAD_DIM>, T, HEAD_DIM, HEAD_DIM != 64 && HEAD_DIM != 128>;

// What a block works on: keys from n0 of a head, the query heads from h that share them, and the tiles of
// queries to walk. It lies in shared memory, for there is no register to keep it in.
template <int HEAD_DIM>
struct KeysWork {
  int b, kv_h, h, n0;
  Walk<KeysBlock<HEAD_DIM>::COLS> walk;
};

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
  KeysWork<HEAD_DIM> work;
};

template <int HEAD_DIM>
struct KeysState {
  Gradient<KeysBlock<HEAD_DIM>, HEAD_DIM> dk;
  Gradient<KeysBlock<HEAD_DIM>, HEAD_DIM> dv;
};

// A tile is full if all of its rows see all of the keys; those without any key may run through it, for their
// p is 0. Full rows are the run of them around the middle of all rows. Ends with a barrier.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void find_work(KeysShared<T, HEAD_DIM>& shared, const AttentionBackward& p,
                                          int tiles, int wave) {
  using Block = KeysBlock<HEAD_DIM>;
  static_assert(Block::ROWS <= Block::THREADS);
  const BackwardPosition at(tiles, p.batch * p.kv_heads,
                            wave);  // of a causal mask the first keys have the most work
  const int b = at.head / p.kv_heads, kv_h = at.head % p.kv_heads, groups = p.heads / p.kv_heads;
  const int n0 = at.tile * Block::ROWS, n1 = min(n0 + Block::ROWS, p.seqlen_k), key = n0 + threadIdx.x;
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
  if (threadIdx.x == 0) shared.work = {b, kv_h, kv_h * groups, n0, {lo, hi, full_lo, full_hi, groups}};
  __syncthreads();
}

// Sends for the queries of a step. Rows that are not there see nothing.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void load_queries(KeysShared<T, HEAD_DIM>& shared, const AttentionBackward& p,
                                             int step) {
  using Block = KeysBlock<HEAD_DIM>;
  auto& stage = shared.stages[step % 2];
  const auto& at = shared.work;
  const int2 tile = at.walk.at(step);
  const int h = at.h + tile.x;
  const T* q = static_cast<const T*>(p.q) + at.b * p.stride_qb + h * p.stride_qh;
  load_tile<Block::THREADS, HEAD_DIM, Block::COLS>(stage.q, q, p.stride_qs, tile.y, at.walk.hi, p.head_dim);
  const T* dout = static_cast<const T*>(p.dout) + at.b * p.stride_doutb + h * p.stride_douth;
  load_tile<Block::THREADS, HEAD_DIM, Block::COLS>(stage.dout, dout, p.stride_douts, tile.y, at.walk.hi,
                                                   p.head_dim);
  const int local = threadIdx.x, row = tile.y + local;
  if (local < Block::COLS) {
    const bool valid = row < at.walk.hi;
    const int64_t place = (int64_t(at.b) * p.heads + h) * p.seqlen_q + row;
    copy_async_4(shared_address(&stage.queries.minus_lse[local]), p.lse + place, valid);
    copy_async_4(shared_address(&stage.queries.delta[local]), p.delta + place, valid);
    if (p.start == nullptr) {
      stage.queries.start[local] = 0;
      stage.queries.end[local] = valid ? p.seqlen_k : 0;
    } else if (step >= at.walk.full_steps) {
      const int32_t* start = p.start + at.b * p.stride_start_b + row * p.stride_start_s;
      copy_async_4(shared_address(&stage.queries.start[local]), start, valid);
      const int32_t* end = p.end + at.b * p.stride_end_b + row * p.stride_end_s;
      copy_async_4(shared_address(&stage.queries.end[local]), end, valid);
    }
  }
  copy_async_commit();
}

// Walks the full tiles or, MASKED, the ragged ones. The queries of the first one are on their way.
template <bool MASKED, typename T, int HEAD_DIM>
__device__ __forceinline__ void walk_queries(KeysState<HEAD_DIM>& state, KeysShared<T, HEAD_DIM>& shared,
                                             const StayingK<T, HEAD_DIM>& k, const StayingV<T, HEAD_DIM>& v,
                                             const AttentionBackward& p, const BackwardScores& scores) {
  using Block = KeysBlock<HEAD_DIM>;
  const auto& walk = shared.work.walk;
  for (int step = MASKED ? walk.full_steps : 0; step < (MASKED ? walk.steps : walk.full_steps); ++step) {
    auto& stage = shared.stages[step % 2];
    copy_async_wait<0>();
    if (threadIdx.x < Block::COLS) {  // what this thread has copied
      float& x = stage.queries.minus_lse[threadIdx.x];
      x = exponent_of_lse(x);
    }
    __syncthreads();  // the stage is there, and no warp reads the other one
    if (step + 1 < walk.steps) load_queries(shared, p, step + 1);
    Products<Block> s = {}, dp = {};
    multiply_transposed(s, k, stage.q);
    multiply_transposed(dp, v, stage.dout);
    score_gradient<T, Block, true, MASKED>(s, dp, stage.queries, shared.work.n0, scores);
    multiply<Block, HEAD_DIM, false, T>(state.dv, s, stage.dout);
    multiply<Block, HEAD_DIM, false, T>(state.dk, dp, stage.q);
  }
}

template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(KeysBlock<HEAD_DIM>::THREADS)
    attention_backward_keys_kernel(const __grid_constant__ AttentionBackward p, BackwardScores scores,
                                   int tiles, int wave) {
  using Block = KeysBlock<HEAD_DIM>;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<KeysShared<T, HEAD_DIM>*>(memory);
  const auto& at = shared.work;
  find_work(shared, p, tiles, wave);
  KeysState<HEAD_DIM> state = {};
  const T* p_k = static_cast<const T*>(p.k) + at.b * p.stride_kb + at.kv_h * p.stride_kh;
  load_tile<Block::THREADS, HEAD_DIM, Block::ROWS>(shared.k, p_k, p.stride_ks, at.n0, p.seqlen_k, p.head_dim);
  const T* p_v = static_cast<const T*>(p.v) + at.b * p.stride_vb + at.kv_h * p.stride_vh;
  load_tile<Block::THREADS, HEAD_DIM, Block::ROWS>(shared.v, p_v, p.stride_vs, at.n0, p.seqlen_k, p.head_dim);
  copy_async_commit();
  if (at.walk.steps > 0) load_queries(shared, p, 0);
  copy_async_wait<0>();
  __syncthreads();
  const StayingK<T, HEAD_DIM> k(shared.k);
  const StayingV<T, HEAD_DIM> v(shared.v);
  walk_queries<false>(state, shared, k, v, p, scores);
  walk_queries<true>(state, shared, k, v, p, scores);

  const int64_t offset = (int64_t(at.b) * p.seqlen_k * p.kv_heads + at.kv_h) * p.head_dim;
  const int64_t stride = int64_t(p.kv_heads) * p.head_dim;
  store_gradient<Block, HEAD_DIM, T>(state.dk, rest_of_scale<T>(scores), shared.k,
                                     static_cast<T*>(p.dk) + offset, stride, at.n0, p.seqlen_k, p.head_dim);
  store_gradient<Block, HEAD_DIM, T>(state.dv, 1.0f, shared.v, static_cast<T*>(p.dv) + offset, stride, at.n0,
                                     p.seqlen_k, p.head_dim);
}

}  // namespace mmkernels
