// Attention's forward pass on mma.sync, sm_80 and later: one kernel for every interval mask.
//
// A block takes BLOCK_M queries of one head and walks the keys that some of them see, BLOCK_N at a time,
// with the softmax computed on the way (m: running maximum, l: running sum):
//
//   m' = max(m, max_j s_j),  p_j = 2^(c (s_j - m')),  l' = l 2^(c (m - m')) + sum_j p_j
//   acc' = acc 2^(c (m - m')) + p v,    at the end    out = acc / l,  lse = (c m + log2(l)) ln(2)
//
// s are the raw products q k^T and c = softmax_scale log2(e); with softcap s is the finished logit times
// log2(e), and c = 1. The rows' bounds give the tiles: those that every row sees in full are walked first
// and without any masking, then the ragged ones at both ends; all others are never touched.
//
// A NaN or Inf in a value is multiplied by the 0 of a row that may not see it. Such a product shows in acc,
// which is looked at once, at the end; the block then walks its keys again, with such values taken out of
// the product and put back into the rows that do see them.
//
// Four warps hold 32 queries each, so a row lives in the four lanes of a quad. K and V have one tile of
// shared memory each: V of a tile is on its way during q k^T, K of the next tile during p v. A row there is
// 16 bytes longer than the head, an odd number of 16-byte words: ldmatrix then meets every bank once.
//
// Source: Dao, "FlashAttention-2", ICLR 2024; Milakov and Gimelshein, 2018, for the running softmax.
#pragma once

#include <climits>

#include "forward_tiles.cuh"

namespace mmkernels {

// s += q k^T of this warp's rows.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void multiply_qk(Products<HEAD_DIM>& s, Shared<T, HEAD_DIM>& shared) {
  constexpr int BYTES = sizeof(shared.k[0]);
  const int lane = threadIdx.x % 32;
  const uint32_t q = shared_address(&shared.q[threadIdx.x / 32 * ROW_TILES * 16 + lane % 16][lane / 16 * 8]);
  const uint32_t k = shared_address(&shared.k[lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]);
#pragma unroll
  for (int d = 0; d < HEAD_DIM; d += 16) {
    uint32_t a[ROW_TILES][4];
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) load_matrices(a[r], q + r * 16 * BYTES + d * sizeof(T));
#pragma unroll
    for (int n = 0; n < BLOCK_N<HEAD_DIM>; n += 16) {
      uint32_t b[4];  // keys n to n + 7 and n + 8 to n + 15
      load_matrices(b, k + n * BYTES + d * sizeof(T));
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
        mma<T>(s[r][n / 8], a[r], b[0], b[1]);
        mma<T>(s[r][n / 8 + 1], a[r], b[2], b[3]);
      }
    }
  }
}

// Leaves in v what is finite, or ones where it is not; each thread rewrites what it copied.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void rewrite_values(Shared<T, HEAD_DIM>& shared, Mode mode) {
  constexpr uint16_t EXPONENT = std::is_same_v<T, __half> ? 0x7c00 : 0x7f80;
  constexpr uint16_t ONE = std::is_same_v<T, __half> ? 0x3c00 : 0x3f80;
#pragma unroll 1
  for (int row = threadIdx.x / 8; row < BLOCK_N<HEAD_DIM>; row += THREADS / 8)
#pragma unroll 1
    for (int dim = threadIdx.x % 8 * 8; dim < HEAD_DIM; dim += 64)
#pragma unroll 1
      for (int i = 0; i < 8; ++i) {
        uint16_t& x = reinterpret_cast<uint16_t&>(shared.v[row][dim + i]);
        const bool bad = (x & EXPONENT) == EXPONENT;
        x = mode == Mode::COUNT ? (bad ? ONE : 0) : (bad ? 0 : x);
      }
}

// acc += p v of this warp's rows.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void multiply_pv(State<HEAD_DIM>& state, Products<HEAD_DIM>& p,
                                            Shared<T, HEAD_DIM>& shared) {
  const uint32_t v = shared_address(&shared.v[threadIdx.x % 16][threadIdx.x % 32 / 16 * 8]);
#pragma unroll
  for (int n = 0; n < BLOCK_N<HEAD_DIM>; n += 16) {
    uint32_t a[ROW_TILES][4];  // two fragments C side by side are a fragment A
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &p[r][n / 8 + i / 2][i % 2 * 2];
        a[r][i] = pack<T>(pair[0], pair[1]);
      }
#pragma unroll
    for (int d = 0; d < HEAD_DIM; d += 16) {
      uint32_t b[4];  // dims d to d + 7 and d + 8 to d + 15
      load_matrices_transposed(b, v + n * sizeof(shared.v[0]) + d * sizeof(T));
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
        mma<T>(state.acc[r][d / 8], a[r], b[0], b[1]);
        mma<T>(state.acc[r][d / 8 + 1], a[r], b[2], b[3]);
      }
    }
  }
}

// Scores from raw products: softcap, and -inf where a row does not see the key. To count: 1, and 0 there.
template <bool MASKED, typename T, int HEAD_DIM>
__device__ __forceinline__ void finish_scores(Products<HEAD_DIM>& s, Shared<T, HEAD_DIM>& shared,
                                              const Scores& scores, int n0, Mode mode) {
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r) {
    if (scores.outer > 0.0f) {
#pragma unroll
      for (int n = 0; n < BLOCK_N<HEAD_DIM> / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[r][n][i] = scores.outer * tanhf(scores.inner * s[r][n][i]);
    }
    if constexpr (MASKED) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int2 bounds = shared.bounds[row_of(r, 2 * half)];
        const unsigned first = n0 + threadIdx.x % 4 * 2 - bounds.x, length = bounds.y - bounds.x;
#pragma unroll
        for (int n = 0; n < BLOCK_N<HEAD_DIM> / 8; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& x = s[r][n][2 * half + i];
            if (mode == Mode::COUNT) x = 1.0f;
            if (first + n * 8 + i >= length) x = mode == Mode::COUNT ? 0.0f : -INFINITY;
          }
      }
    }
  }
}

// The running softmax: s becomes p; m, l and acc move on.
template <int HEAD_DIM>
__device__ __forceinline__ void softmax(State<HEAD_DIM>& state, Products<HEAD_DIM>& s, float c) {
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& m = state.m[r][half];
      float top = m;
#pragma unroll
      for (int n = 0; n < BLOCK_N<HEAD_DIM> / 8; ++n)
        top = fmaxf(top, fmaxf(s[r][n][2 * half], s[r][n][2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float pivot = top == -INFINITY ? 0.0f : top;  // -inf - -inf is NaN
      const float alpha = exp2_approx((m - pivot) * c);
      m = top;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < BLOCK_N<HEAD_DIM> / 8; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[r][n][i] = exp2_approx(fmaf(s[r][n][i], c, -pivot * c));
          sum += s[r][n][i];
        }
      state.l[r][half] = fmaf(state.l[r][half], alpha, sum);
#pragma unroll
      for (int d = 0; d < HEAD_DIM / 8; ++d) {
        state.acc[r][d][2 * half] *= alpha;
        state.acc[r][d][2 * half + 1] *= alpha;
      }
    }
}

// Walks tiles `first` to `last` of the block's; k of the first one is on its way, k of the tile after the
// last one is sent for, if there is one.
template <bool MASKED, typename T, int HEAD_DIM>
__device__ __forceinline__ void walk(State<HEAD_DIM>& state, Shared<T, HEAD_DIM>& shared, const Keys<T>& keys,
                                     const KeyTiles<HEAD_DIM>& tiles, const Scores& scores, Mode mode,
                                     int first, int last) {
  for (int index = first; index < last; ++index) {
    const int n0 = tiles.first_key(index);
    copy_async_wait<0>();
    __syncthreads();  // k is there, and no warp reads the v before it
    load_tile<HEAD_DIM, BLOCK_N<HEAD_DIM>>(shared.v, keys.v, keys.stride_vs, n0, tiles.hi, keys.head_dim);
    copy_async_commit();
    Products<HEAD_DIM> s = {};
    multiply_qk(s, shared);
    finish_scores<MASKED>(s, shared, scores, n0, mode);
    if (!MASKED || mode != Mode::COUNT) softmax(state, s, scores.c);
    copy_async_wait<0>();
    if (MASKED && mode != Mode::SOFTMAX) rewrite_values(shared, mode);
    __syncthreads();  // v is there, and no warp reads this k
    if (index + 1 < tiles.count) load_keys(shared, keys, tiles, index + 1);
    multiply_pv(state, s, shared);
  }
}

template <int HEAD_DIM>
__device__ __forceinline__ void reset(State<HEAD_DIM>& state) {
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      state.m[r][half] = -INFINITY;
      state.l[r][half] = 0.0f;
    }
#pragma unroll
    for (int d = 0; d < HEAD_DIM / 8; ++d)
#pragma unroll
      for (int i = 0; i < 4; ++i) state.acc[r][d][i] = 0.0f;
  }
}

// Is acc not finite in a row that sees a key?
template <typename T, int HEAD_DIM>
__device__ __forceinline__ bool not_finite(const State<HEAD_DIM>& state, Shared<T, HEAD_DIM>& shared) {
  bool found = false;
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bool bad = false;
#pragma unroll
      for (int d = 0; d < HEAD_DIM / 8; ++d) bad |= !finite(state.acc[r][d][i]);
      found |= bad && shared.bounds[row_of(r, i)].y > 0;
    }
  return found;
}

// out and lse of this warp's rows; out goes through the rows of q, which only this warp reads.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void store(State<HEAD_DIM>& state, Shared<T, HEAD_DIM>& shared,
                                      const AttentionForward& p, float c, Position at) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(r, 2 * half);
      const float m = state.m[r][half];
      float l = state.l[r][half];
      l += __shfl_xor_sync(~0u, l, 1);
      l += __shfl_xor_sync(~0u, l, 2);
      const bool empty = shared.bounds[row].y == 0 || (l == 0.0f && m == -INFINITY);
      const float factor = l == 0.0f ? NAN : 1.0f / l;  // l is 0 only where scores are too large to add
#pragma unroll
      for (int d = 0; d < HEAD_DIM / 8; ++d) {
        const float x = empty ? 0.0f : state.acc[r][d][2 * half] * factor;
        const float y = empty ? 0.0f : state.acc[r][d][2 * half + 1] * factor;
        reinterpret_cast<uint32_t&>(shared.q[row][d * 8 + lane % 4 * 2]) = pack<T>(x, y);
      }
      if (lane % 4 == 0 && at.m0 + row < p.seqlen_q) {
        const float lse = empty ? -INFINITY : (m * c + log2f(l == 0.0f ? NAN : l)) * LN2;
        p.lse[(int64_t(at.b) * p.heads + at.h) * p.seqlen_q + at.m0 + row] = lse;
      }
    }
  __syncwarp();
  constexpr int ROWS = 16 * ROW_TILES, CHUNKS = HEAD_DIM / 8;
  T* out = static_cast<T*>(p.out) + (int64_t(at.b) * p.seqlen_q * p.heads + at.h) * p.head_dim;
#pragma unroll 1
  for (int index = lane; index < ROWS * CHUNKS; index += 32) {
    const int row = threadIdx.x / 32 * ROWS + index / CHUNKS, dim = index % CHUNKS * 8;
    if (at.m0 + row < p.seqlen_q && dim < p.head_dim) {
      T* target = out + int64_t(at.m0 + row) * p.heads * p.head_dim + dim;
      *reinterpret_cast<uint4*>(target) = reinterpret_cast<const uint4&>(shared.q[row][dim]);
    }
  }
}

// NaN into out where acc counted a key.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void store_not_finite(const State<HEAD_DIM>& state, const AttentionForward& p,
                                                 Position at) {
  T* out = static_cast<T*>(p.out) + (int64_t(at.b) * p.seqlen_q * p.heads + at.h) * p.head_dim;
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int d = 0; d < HEAD_DIM / 8; ++d)
        if (state.acc[r][d][i] > 0.0f) {
          const int64_t row = at.m0 + row_of(r, i);
          T& x = out[row * p.heads * p.head_dim + d * 8 + threadIdx.x % 4 * 2 + i % 2];
          reinterpret_cast<uint16_t&>(x) = uint16_t(pack<T>(NAN, NAN));
        }
}

// Computed anew where it is needed again, not kept in registers.
__device__ __forceinline__ Position position(const AttentionForward& p, int row_tiles, int wave) {
  int block = blockIdx.x;
  asm volatile("" : "+r"(block));
  return Position(p, block, BLOCK_M, row_tiles, wave);
}

// Is one of this block's tiles of REDO_ROWS queries marked?
__device__ __forceinline__ bool marked(const AttentionForward& p, Position at) {
  const int tiles = (p.seqlen_q + REDO_ROWS - 1) / REDO_ROWS, tile = at.m0 / REDO_ROWS + threadIdx.x;
  const bool mine = threadIdx.x < BLOCK_M / REDO_ROWS && tile < tiles;
  return __syncthreads_or(mine && p.redo[(int64_t(at.b) * p.heads + at.h) * tiles + tile]);
}

// out and lse of BLOCK_M queries of one head.
template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(THREADS)
    attention_forward_kernel(const __grid_constant__ AttentionForward p, Scores scores, int row_tiles,
                             int wave) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<T, HEAD_DIM>*>(memory);
  const Position at = position(p, row_tiles, wave);
  if (p.redo != nullptr && !marked(p, at)) return;
  const int kv_h = at.h / (p.heads / p.kv_heads);
  const T* q = static_cast<const T*>(p.q) + at.b * p.stride_qb + at.h * p.stride_qh;
  const Keys<T> keys = {static_cast<const T*>(p.k) + at.b * p.stride_kb + kv_h * p.stride_kh,
                        static_cast<const T*>(p.v) + at.b * p.stride_vb + kv_h * p.stride_vh, p.stride_ks,
                        p.stride_vs, p.head_dim};

  const KeyTiles<HEAD_DIM> tiles = key_tiles(shared, p, at.b, at.m0);
  State<HEAD_DIM> state;
  reset(state);
  if (tiles.count > 0) {
    load_tile<HEAD_DIM, BLOCK_M>(shared.q, q, p.stride_qs, at.m0, p.seqlen_q, p.head_dim);
    load_keys(shared, keys, tiles, 0);
  }
  walk<false>(state, shared, keys, tiles, scores, Mode::SOFTMAX, 0, tiles.full);
  for (Mode mode = Mode::SOFTMAX;;) {
    const int begin = mode == Mode::SOFTMAX ? tiles.full : 0;
    walk<true>(state, shared, keys, tiles, scores, mode, begin, tiles.count);
    if (mode == Mode::COUNT) return store_not_finite<T>(state, p, position(p, row_tiles, wave));
    const bool bad = mode == Mode::SOFTMAX && p.start != nullptr && not_finite(state, shared);
    if (__syncthreads_or(bad)) {
      mode = Mode::CLEAN;
    } else {
      store(state, shared, p, scores.c, position(p, row_tiles, wave));
      if (mode == Mode::SOFTMAX) return;
      mode = Mode::COUNT;
    }
    reset(state);
    load_keys(shared, keys, tiles, 0);
  }
}

template <typename T, int HEAD_DIM>
cudaError_t launch_attention_forward(const AttentionForward& p, cudaStream_t stream) {
  const int row_tiles = (p.seqlen_q + BLOCK_M - 1) / BLOCK_M;
  const int64_t heads = int64_t(p.batch) * p.heads, blocks = heads * row_tiles;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  auto kernel = attention_forward_kernel<T, HEAD_DIM>;
  constexpr int BYTES = sizeof(Shared<T, HEAD_DIM>);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
  if (error != cudaSuccess) return error;
  kernel<<<int(blocks), THREADS, BYTES, stream>>>(p, scores_of(p), row_tiles, wave_of(p, sizeof(T)));
  return cudaGetLastError();
}

}  // namespace mmkernels
