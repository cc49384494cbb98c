// Attention's forward pass on wgmma and TMA, compute capability 9.0: the mathematics of forward_kernel.cuh.
//
// A block stays, and takes tile after tile of queries. One warp sends for q, k and v through rings of shared
// memory; each consumer warpgroup multiplies 64 rows of q by all keys that the tile walks:
//
//   s(j) = q k(j)^T                begins before the products that follow
//   acc += p(j - 1) v(j - 1)       p from registers, runs under the softmax of s(j)
//   m, l, alpha, p(j) of s(j);     acc *= alpha once the product is done
//
// The warpgroups take turns in issuing these products, so that the tensor cores have one's while another
// exponentiates. A warpgroup passes over keys that none of its rows sees, and masks only tiles that some of
// them do not see in full.
//
// A NaN or Inf in a value is multiplied by the 0 of a row that may not see it. It shows in acc: such rows are
// marked in p.redo, and the portable kernel, launched behind this one, computes them again.
//
// Source: Shah et al., "FlashAttention-3", NeurIPS 2024, for the warpgroups' turns and the order of products.
#pragma once

#include "hopper_forward_tiles.cuh"

namespace mmkernels::hopper {

// The softmax of a warpgroup's thread: rows lane / 4 and lane / 4 + 8 of its warp's.
template <typename S>
struct State {
  float acc[S::HEAD_DIM / 2];  // fragment D
  float m[2];
  float l[2];  // this lane's share
};

// One arrival of each warp, whose lanes have all come so far: behind an instruction of the whole warp.
__device__ __forceinline__ void release(uint64_t& barrier) {
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// By one thread: k or v of the j-th tile of keys of some work, once its buffer is empty.
template <typename S>
__device__ __forceinline__ void load_tile(KeyTile<S>& tile, const CUtensorMap& map, uint64_t& full,
                                          uint64_t& empty, uint32_t parity, const Work<S>& work, int j) {
  barrier_wait(empty, parity ^ 1);
  barrier_arrive_expect(full, sizeof(tile));
  const int n0 = work.lo + j * S::BLOCK_N, kv_h = work.kv_h, b = work.b;
#pragma unroll
  for (int c = 0; c < S::COLUMN_TILES; ++c) tma_load(tile[c], map, full, c * COLUMNS, n0, kv_h, b);
}

template <typename S>
__device__ __forceinline__ void produce(Shared<S>& shared, const AttentionForward& p, const Maps& maps,
                                        const Order& order) {
  if (threadIdx.x == 0) {
    prefetch_descriptor(maps.q);
    prefetch_descriptor(maps.k);
    prefetch_descriptor(maps.v);
  }
  unsigned keys = 0;  // tiles of keys sent for
#pragma unroll 1
  for (unsigned tiles = 0; blockIdx.x + tiles * gridDim.x < unsigned(order.total); ++tiles) {
    Work<S>& work = shared.work[tiles % WORK_SLOTS];
    find_work(work, p, order, blockIdx.x + tiles * gridDim.x);
    if (threadIdx.x == 0) {
      barrier_wait(shared.q_empty, tiles % 2 ^ 1);
      barrier_arrive_expect(shared.q_full, sizeof(shared.q));
#pragma unroll
      for (int c = 0; c < S::COLUMN_TILES; ++c)
        tma_load(shared.q[c], maps.q, shared.q_full, c * COLUMNS, work.m0, work.h, work.b);
      // In the order in which they are waited for: k of a tile before v of the one before.
#pragma unroll 1
      for (int j = 0; j <= work.count; ++j) {
        const unsigned k = S::stage(keys + j), v = S::stage(keys + j - 1);
        if (j < work.count)
          load_tile<S>(shared.k[k], maps.k, shared.stages[k].k_full, shared.stages[k].k_empty,
                       S::parity(keys + j), work, j);
        if (j > 0)
          load_tile<S>(shared.v[v], maps.v, shared.stages[v].v_full, shared.stages[v].v_empty,
                       S::parity(keys + j - 1), work, j - 1);
      }
      keys += work.count;
    }
    __syncwarp();
  }
}

// A consumer warpgroup, from tile of queries to tile of queries.
template <typename S>
struct Consumer {
  using T = typename S::Element;
  static constexpr int HEAD_DIM = S::HEAD_DIM;
  using Scored = float[S::BLOCK_N / 2];                // fragment D of s, then of p
  using Probabilities = uint32_t[S::BLOCK_N / 16][4];  // fragments A

  Shared<S>& shared;
  const Scores scores;
  const int group = threadIdx.x / WARPGROUP - 1;
  unsigned tiles = 0;  // of queries done
  unsigned keys = 0;   // tiles of keys, all done but those of this walk

  // Named barriers: one for each warpgroup's turn, and one for its own warps.
  __device__ __forceinline__ void take_turn() { named_barrier_sync(1 + group, 2 * WARPGROUP); }
  __device__ __forceinline__ void pass_turn() {
    named_barrier_arrive(1 + (group + 1) % S::CONSUMERS, 2 * WARPGROUP);
  }
  __device__ __forceinline__ void sync_group() { named_barrier_sync(1 + S::CONSUMERS + group, WARPGROUP); }

  // s = q k^T, as a group of its own.
  __device__ __forceinline__ void multiply_qk(Scored& s, unsigned k_stage) {
    const uint64_t q = k_major(shared_address(shared.q[0][group * WARPGROUP_ROWS]));
    const uint64_t k = k_major(shared_address(shared.k[k_stage]));
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < HEAD_DIM; d += 16) {
      const int column = d % COLUMNS * sizeof(T), tile = d / COLUMNS;
      wgmma<T, Major::K>(s, advanced(q, tile * sizeof(shared.q[0]) + column),
                         advanced(k, tile * sizeof(shared.k[0][0]) + column), d > 0);
    }
    wgmma_commit();
  }

  // acc += p v, as a group of its own.
  __device__ __forceinline__ void multiply_pv(State<S>& state, const Probabilities& p, unsigned v_stage) {
    const uint64_t v = mn_major(shared_address(shared.v[v_stage]), sizeof(shared.v[0][0]));
    wgmma_fence();
#pragma unroll
    for (int n = 0; n < S::BLOCK_N; n += 16)
      wgmma<T, Major::MN>(state.acc, p[n / 16], advanced(v, n * COLUMNS * sizeof(T)), true);
    wgmma_commit();
  }

  __device__ __forceinline__ const Work<S>& work() const { return shared.work[tiles % WORK_SLOTS]; }
  __device__ __forceinline__ const KeyRange& range() const { return work().ranges[group]; }

  // The warpgroup's row, and its keys, that elements 2 * half and 2 * half + 1 of a fragment D lie in.
  __device__ __forceinline__ int row_of(int half) const {
    return group * WARPGROUP_ROWS + threadIdx.x % WARPGROUP / 32 * 16 + half * 8 + threadIdx.x % 32 / 4;
  }
  __device__ __forceinline__ int2 bounds_of(int half) const { return work().bounds[row_of(half)]; }

  // Scores from raw products: softcap, and -inf where a row does not see the key.
  __device__ __forceinline__ void finish_scores(Scored& s, int n0) {
    if constexpr (S::SOFTCAP) {
#pragma unroll
      for (float& x : s)  // outer * tanh(inner * x); 2^x is inf or 0 beyond
        x = scores.outer - __fdividef(2.0f * scores.outer, 1.0f + exp2_approx(x * scores.inner));
    }
    const int first = n0 + threadIdx.x % 4 * 2;
    if (n0 + S::BLOCK_N > range().full_hi) {
      const int end[2] = {bounds_of(0).y - first, bounds_of(1).y - first};
#pragma unroll
      for (int i = 0; i < S::BLOCK_N / 2; ++i)
        if (i / 4 * 8 + i % 2 >= end[i / 2 % 2]) s[i] = -INFINITY;
    }
    if (n0 < range().full_lo) {
      const int start[2] = {bounds_of(0).x - first, bounds_of(1).x - first};
#pragma unroll
      for (int i = 0; i < S::BLOCK_N / 2; ++i)
        if (i / 4 * 8 + i % 2 < start[i / 2 % 2]) s[i] = -INFINITY;
    }
  }

  // The running softmax: s becomes p; m and l move on. alpha is what acc has to be multiplied by.
  __device__ __forceinline__ void softmax(State<S>& state, Scored& s, float (&alpha)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& m = state.m[half];
      float top = m;
#pragma unroll
      for (int i = 2 * half; i < S::BLOCK_N / 2; i += 4) top = fmaxf(top, fmaxf(s[i], s[i + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float pivot = (top == -INFINITY ? 0.0f : top) * scores.c;  // -inf - -inf is NaN
      alpha[half] = exp2_approx(fmaf(m, scores.c, -pivot));
      m = top;
      float sum = 0.0f;
#pragma unroll
      for (int i = 2 * half; i < S::BLOCK_N / 2; i += 4) {
        s[i] = exp2_approx(fmaf(s[i], scores.c, -pivot));
        s[i + 1] = exp2_approx(fmaf(s[i + 1], scores.c, -pivot));
        sum += s[i] + s[i + 1];
      }
      state.l[half] = fmaf(state.l[half], alpha[half], sum);
    }
  }

  __device__ __forceinline__ void round(Probabilities& p, const Scored& s) {
#pragma unroll
    for (int i = 0; i < S::BLOCK_N / 4; ++i) p[i / 4][i % 4] = pack<T>(s[2 * i], s[2 * i + 1]);
  }

  // Lets pass `count` tiles of keys, which none of the rows sees.
  __device__ __forceinline__ void pass_over(int count) {
#pragma unroll 1
    for (; count > 0; --count, ++keys) {
      take_turn();
      pass_turn();
      barrier_wait(shared.stages[S::stage(keys)].k_full, S::parity(keys));
      barrier_wait(shared.stages[S::stage(keys)].v_full, S::parity(keys));
      __syncwarp();
      release(shared.stages[S::stage(keys)].k_empty);
      release(shared.stages[S::stage(keys)].v_empty);
    }
  }

  // `count` tiles of keys, from n0 on, into acc, m and l.
  __device__ __forceinline__ void walk(State<S>& state, int n0, int count) {
    Scored s;
    Probabilities p;
    float alpha[2];
    const unsigned last = keys + count;
#pragma unroll 1
    for (bool first = true; keys < last; first = false, n0 += S::BLOCK_N) {
      const unsigned k = S::stage(keys), v = S::stage(keys - 1);
      barrier_wait(shared.stages[k].k_full, S::parity(keys));
      take_turn();
      multiply_qk(s, k);
      if (first) {
        pass_turn();
        wgmma_wait<0>();
      } else {
        barrier_wait(shared.stages[v].v_full, S::parity(keys - 1));
        multiply_pv(state, p, v);
        pass_turn();
        wgmma_wait<1>();
      }
      pin(s);
      release(shared.stages[k].k_empty);
      finish_scores(s, n0);
      softmax(state, s, alpha);
      if (!first) {
        wgmma_wait<0>();
        pin(state.acc);
        release(shared.stages[v].v_empty);
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; ++i) state.acc[i] *= alpha[i / 2 % 2];
      }
      round(p, s);
      ++keys;
    }
    const unsigned v = S::stage(keys - 1);
    barrier_wait(shared.stages[v].v_full, S::parity(keys - 1));
    multiply_pv(state, p, v);
    wgmma_wait<0>();
    pin(state.acc);
    release(shared.stages[v].v_empty);
  }

  // Where this lane's row of matrices of columns d to d + 15 of out lies.
  __device__ __forceinline__ uint32_t out_address(int d) const {
    const int lane = threadIdx.x % 32, row = row_of(0) - lane / 4 + lane % 16;
    const int word = (d % COLUMNS / 8 + lane / 16) ^ (row % 8);
    return shared_address(&shared.out[d / COLUMNS][row][word * 8]);
  }

  // out and lse of this warpgroup's rows.
  __device__ __forceinline__ void store(State<S>& state, const AttentionForward& p, const Maps& maps) {
    const int lane = threadIdx.x % 32, b = work().b, h = work().h, m0 = work().m0;
    float factor[2];
    bool bad = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m0 + row_of(half);
      const float m = state.m[half];
      float l = state.l[half];
      l += __shfl_xor_sync(~0u, l, 1);
      l += __shfl_xor_sync(~0u, l, 2);
      const bool empty = bounds_of(half).y == 0 || (l == 0.0f && m == -INFINITY);
      factor[half] = l == 0.0f ? NAN : 1.0f / l;  // l is 0 only where scores are too large to add
      if (empty) factor[half] = 0.0f;
#pragma unroll
      for (int i = 2 * half; i < HEAD_DIM / 2; i += 4) {
        bad |= !empty && !(finite(state.acc[i]) && finite(state.acc[i + 1]));
        state.acc[i] = empty ? 0.0f : state.acc[i] * factor[half];
        state.acc[i + 1] = empty ? 0.0f : state.acc[i + 1] * factor[half];
      }
      if (lane % 4 == 0 && row < p.seqlen_q) {
        const float lse = empty ? -INFINITY : (m * scores.c + log2f(l == 0.0f ? NAN : l)) * LN2;
        p.lse[(int64_t(b) * p.heads + h) * p.seqlen_q + row] = lse;
      }
    }
    if (p.redo != nullptr) {
      bad = __any_sync(~0u, bad);
      const int tiles = (p.seqlen_q + REDO_ROWS - 1) / REDO_ROWS, tile = (m0 + row_of(0)) / REDO_ROWS;
      if (lane == 0 && tile < tiles) p.redo[(int64_t(b) * p.heads + h) * tiles + tile] = bad;
    }

    if (threadIdx.x % WARPGROUP == 0) tma_store_wait_read();
    sync_group();  // the tile before has left
#pragma unroll
    for (int d = 0; d < HEAD_DIM; d += 16) {
      uint32_t x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = pack<T>(state.acc[d / 2 + 2 * i], state.acc[d / 2 + 2 * i + 1]);
      store_matrices(out_address(d), x);
    }
    fence_async_proxy();
    sync_group();
    if (threadIdx.x % WARPGROUP == 0) {
#pragma unroll
      for (int c = 0; c < S::COLUMN_TILES; ++c)
        tma_store(maps.out, shared.out[c][group * WARPGROUP_ROWS], c * COLUMNS, m0 + group * WARPGROUP_ROWS,
                  h, b);
      tma_store_commit();
    }
  }

  __device__ __forceinline__ void consume(const AttentionForward& p, const Maps& maps, const Order& order) {
    if (group == S::CONSUMERS - 1) pass_turn();
#pragma unroll
    for (int d = HEAD_DIM; d < S::COLUMN_TILES * COLUMNS; d += 16)  // TMA reads them, and writes them nowhere
      store_matrices(out_address(d), {0, 0, 0, 0});
    for (; blockIdx.x + tiles * gridDim.x < unsigned(order.total); ++tiles) {
      barrier_wait(shared.q_full, tiles % 2);
      State<S> state;
#pragma unroll
      for (float& x : state.acc) x = 0.0f;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        state.m[half] = -INFINITY;
        state.l[half] = 0.0f;
      }
      int last = 0;
      if (range().hi > 0) {
        const int first = (range().lo - work().lo) / S::BLOCK_N;
        last = (range().hi - work().lo + S::BLOCK_N - 1) / S::BLOCK_N;
        pass_over(first);
        walk(state, work().lo + first * S::BLOCK_N, last - first);
      }
      __syncwarp();
      release(shared.q_empty);
      store(state, p, maps);
      pass_over(work().count - last);
    }
    if (group == 0) take_turn();                              // back, from the last warpgroup
    if (threadIdx.x % WARPGROUP == 0) tma_store_wait_read();  // before the block's memory is another's
  }
};

template <typename S>
__global__ void __launch_bounds__(S::THREADS, 1)
    attention_forward_kernel(const __grid_constant__ AttentionForward p, const __grid_constant__ Maps maps,
                             Scores scores, Order order) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<S>*>(memory);
  if (threadIdx.x == 0) {
    barrier_init(shared.q_full, 1);
    barrier_init(shared.q_empty, 4 * S::CONSUMERS);
    for (int i = 0; i < S::STAGES; ++i) {
      barrier_init(shared.stages[i].k_full, 1);
      barrier_init(shared.stages[i].v_full, 1);
      barrier_init(shared.stages[i].k_empty, 4 * S::CONSUMERS);
      barrier_init(shared.stages[i].v_empty, 4 * S::CONSUMERS);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < WARPGROUP) {
    give_registers<S::PRODUCER_REGISTERS>();
    if (threadIdx.x < 32) produce(shared, p, maps, order);
  } else {
    take_registers<S::CONSUMER_REGISTERS>();
    Consumer<S>{shared, scores}.consume(p, maps, order);
  }
#else
  __trap();  // compiled for another GPU than it is launched on
#endif
}

template <typename S>
cudaError_t launch_shape(const AttentionForward& p, cudaStream_t stream) {
  const int row_tiles = (p.seqlen_q + S::BLOCK_M - 1) / S::BLOCK_M;
  const int64_t total = int64_t(p.batch) * p.heads * row_tiles;
  if (total == 0) return cudaSuccess;
  if (total > INT_MAX) return cudaErrorInvalidConfiguration;
  constexpr bool BFLOAT16 = std::is_same_v<typename S::Element, __nv_bfloat16>;
  const int64_t head_dim = p.head_dim, row = p.heads * head_dim;
  const int64_t q_sizes[] = {head_dim, p.seqlen_q, p.heads, p.batch};
  const int64_t k_sizes[] = {head_dim, p.seqlen_k, p.kv_heads, p.batch};
  Maps maps;
  cudaError_t error;
  if ((error = make_tensor_map<4>(maps.q, p.q, BFLOAT16, q_sizes, {p.stride_qs, p.stride_qh, p.stride_qb},
                                  {COLUMNS, S::BLOCK_M, 1, 1})) ||
      (error = make_tensor_map<4>(maps.k, p.k, BFLOAT16, k_sizes, {p.stride_ks, p.stride_kh, p.stride_kb},
                                  {COLUMNS, S::BLOCK_N, 1, 1})) ||
      (error = make_tensor_map<4>(maps.v, p.v, BFLOAT16, k_sizes, {p.stride_vs, p.stride_vh, p.stride_vb},
                                  {COLUMNS, S::BLOCK_N, 1, 1})) ||
      (error = make_tensor_map<4>(maps.out, p.out, BFLOAT16, q_sizes, {row, head_dim, row * p.seqlen_q},
                                  {COLUMNS, WARPGROUP_ROWS, 1, 1})))
    return error;
  auto kernel = attention_forward_kernel<S>;
  constexpr int BYTES = sizeof(Shared<S>);
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
  if (error != cudaSuccess) return error;
  int device = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const Order order = {int(total), row_tiles, wave_of(p, 2)};
  Scores scores = scores_of(p);
  scores.inner *= 2.0f * LOG2E;  // tanh(x) = 1 - 2 / (1 + 2^(2 x log2(e)))
  kernel<<<std::min(processors, int(total)), S::THREADS, BYTES, stream>>>(p, maps, scores, order);
  return cudaGetLastError();
}

template <typename T, int HEAD_DIM>
cudaError_t launch_attention_forward(const AttentionForward& p, cudaStream_t stream) {
  return p.softcap > 0.0f ? launch_shape<Shape<T, HEAD_DIM, true>>(p, stream)
                          : launch_shape<Shape<T, HEAD_DIM, false>>(p, stream);
}

}  // namespace mmkernels::hopper
