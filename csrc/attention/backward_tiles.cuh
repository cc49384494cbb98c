// What both kernels of the backward pass are made of: tiles, their products, and the gradient of a tile of
// scores. Some rows stay in a block (keys in one kernel, queries in the other); of all others, the moving
// ones, COLS come by at a time. A tile of scores is (staying rows, moving rows) in either kernel.
#pragma once

#include <algorithm>
#include <climits>
#include <cmath>

#include "backward.h"
#include "ptx.cuh"

namespace mmkernels {

template <int WARPS_, int ROW_TILES_, int COLS_>
struct BlockShape {
  static constexpr int WARPS = WARPS_;
  static constexpr int ROW_TILES = ROW_TILES_;  // of 16 staying rows, for a warp
  static constexpr int COLS = COLS_;
  static constexpr int THREADS = 32 * WARPS;
  static constexpr int ROWS = WARPS * ROW_TILES * 16;
};

// A row in shared memory is 16 bytes longer than the head, an odd number of 16-byte words: ldmatrix then
// meets every bank once. HEAD_DIM is a multiple of 16; what a head has less is 0.
template <typename T, int HEAD_DIM>
using Row = T[HEAD_DIM + 8];

// Fragments C of a warp: of its scores, and of its rows' gradient.
template <class Block>
using Products = float[Block::ROW_TILES][Block::COLS / 8][4];
template <class Block, int HEAD_DIM>
using Gradient = float[Block::ROW_TILES][HEAD_DIM / 8][4];

// Row and column of element `i` of fragment C in row tile `r` and column tile `n`.
template <class Block>
__device__ __forceinline__ int row_of(int r, int i) {
  return (threadIdx.x / 32 * Block::ROW_TILES + r) * 16 + threadIdx.x % 32 / 4 + i / 2 * 8;
}

__device__ __forceinline__ int col_of(int n, int i) { return n * 8 + threadIdx.x % 4 * 2 + i % 2; }

// Numbers that turn raw products into exponents of 2, and their gradients into those of dq and dk.
struct BackwardScores {
  float c;             // softmax_scale log2(e), or 1 with softcap
  float inner, outer;  // outer * tanh(inner * s); outer is 0 without softcap
  float softmax_scale;

  explicit BackwardScores(const AttentionBackward& p)
      : c(p.softmax_scale * LOG2E), inner(0.0f), outer(0.0f), softmax_scale(p.softmax_scale) {
    if (p.softcap > 0.0f) c = 1.0f, inner = p.softmax_scale / p.softcap, outer = p.softcap * LOG2E;
  }
};

// What a tile of scores needs to know of its queries.
template <int COUNT>
struct Queries {
  float minus_lse[COUNT];  // times log2(e); -inf where there is no key: the 2^-inf that such a row needs
  float delta[COUNT];
  int start[COUNT];
  int end[COUNT];
};

__device__ __forceinline__ float exponent_of_lse(float lse) {
  return lse == -INFINITY ? lse : lse == INFINITY ? NAN : -lse * LOG2E;
}

// Which tile of which head a block takes. Of all heads `wave` run side by side, tile by tile, so that what
// they stream stays in L2.
struct BackwardPosition {
  int tile, head;

  __device__ __forceinline__ BackwardPosition(int tiles, int heads, int wave) {
    const int first = blockIdx.x / (tiles * wave) * wave;
    const int size = min(wave, heads - first);
    const int rest = blockIdx.x - first * tiles;
    tile = rest / size;
    head = first + rest % size;
  }
};

// The moving rows [lo, hi) of each of `heads` heads in `count` tiles of COLS. Those in [full_lo, full_hi), of
// which nothing is hidden, are walked first.
template <int COLS>
struct Walk {
  int lo, hi, left, full, count;
  int full_steps, steps;  // of all heads

  __device__ __forceinline__ Walk(int first, int last, int full_lo, int full_hi, int heads)
      : lo(min(first, last)), hi(last) {
    left = (min(max(full_lo, lo), hi) - lo + COLS - 1) / COLS;
    full = max(min(full_hi, hi) - (lo + left * COLS), 0) / COLS;
    count = (hi - lo + COLS - 1) / COLS;
    full_steps = heads * full;
    steps = heads * count;
  }

  // Head (x) and first row (y) of a step.
  __device__ __forceinline__ int2 at(int step) const {
    if (step < full_steps) return make_int2(step / full, lo + (left + step % full) * COLS);
    const int rest = step - full_steps, ragged = count - full;
    const int index = rest % ragged;
    return make_int2(rest / ragged, lo + (index < left ? index : index + full) * COLS);
  }
};

// The block's smallest x and largest y.
template <int WARPS>
__device__ __forceinline__ int2 block_range(int2 (&ranges)[WARPS], int x, int y) {
  __syncthreads();  // nobody reads what an earlier call left
  const int2 warp = make_int2(__reduce_min_sync(~0u, x), __reduce_max_sync(~0u, y));
  if (threadIdx.x % 32 == 0) ranges[threadIdx.x / 32] = warp;
  __syncthreads();
  int2 range = ranges[0];
#pragma unroll
  for (int i = 1; i < WARPS; ++i) range = make_int2(min(range.x, ranges[i].x), max(range.y, ranges[i].y));
  return range;
}

// Copies x[row : row + ROWS] to `tile`, zeros beyond row `limit` and beyond the head. Eight lanes take 128
// bytes of a row, and the next ones after that if it is longer.
template <int THREADS, int HEAD_DIM, int ROWS, typename T>
__device__ __forceinline__ void load_tile(Row<T, HEAD_DIM>* tile, const T* x, int64_t stride, int row,
                                          int limit, int head_dim) {
  const int local = threadIdx.x / 8, dim = threadIdx.x % 8 * 8;
  uint32_t target = shared_address(&tile[local][dim]);
  const T* source = x + (row + local) * stride + dim;
#pragma unroll
  for (int i = 0; i < ROWS; i += THREADS / 8) {
#pragma unroll
    for (int d = 0; d < HEAD_DIM; d += 64)
      if (d + 64 <= HEAD_DIM || d + dim < HEAD_DIM) {
        const bool valid = row + local + i < limit && d + dim < head_dim;
        copy_async_16(target + d * sizeof(T), source + d, valid);
      }
    target += THREADS / 8 * sizeof(Row<T, HEAD_DIM>);
    source += THREADS / 8 * stride;
  }
}

// A warp's staying rows as fragments A. HELD: in registers, so that shared memory is read once and not for
// every tile of moving rows.
template <class Block, typename T, int HEAD_DIM, bool HELD>
struct StayingRows {
  uint32_t address;
  uint32_t held[HELD ? HEAD_DIM / 16 : 1][Block::ROW_TILES][4];

  // x has been loaded if it is HELD.
  __device__ __forceinline__ explicit StayingRows(const Row<T, HEAD_DIM>* x) {
    const int row = threadIdx.x / 32 * Block::ROW_TILES * 16 + threadIdx.x % 16;
    address = shared_address(&x[row][threadIdx.x % 32 / 16 * 8]);
    if constexpr (HELD)
#pragma unroll
      for (int d = 0; d < HEAD_DIM; d += 16)
#pragma unroll
        for (int r = 0; r < Block::ROW_TILES; ++r) load(held[d / 16][r], r, d);
  }

  __device__ __forceinline__ void load(uint32_t (&a)[4], int r, int d) const {
    load_matrices(a, address + r * 16 * sizeof(Row<T, HEAD_DIM>) + d * sizeof(T));
  }

  // Row tile r, dims d to d + 15.
  __device__ __forceinline__ void fragment(uint32_t (&a)[4], int r, int d) const {
    if constexpr (HELD)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = held[d / 16][r][i];
    else
      load(a, r, d);
  }
};

// s += x y^T: this warp's staying rows by all moving ones.
template <class Block, typename T, int HEAD_DIM, bool HELD>
__device__ __forceinline__ void multiply_transposed(Products<Block>& s,
                                                    const StayingRows<Block, T, HEAD_DIM, HELD>& x,
                                                    const Row<T, HEAD_DIM>* y) {
  const int lane = threadIdx.x % 32;
  const uint32_t right = shared_address(&y[lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]);
#pragma unroll
  for (int d = 0; d < HEAD_DIM; d += 16) {
    uint32_t a[Block::ROW_TILES][4];
#pragma unroll
    for (int r = 0; r < Block::ROW_TILES; ++r) x.fragment(a[r], r, d);
#pragma unroll
    for (int n = 0; n < Block::COLS; n += 16) {
      uint32_t b[4];  // moving rows n to n + 7 and n + 8 to n + 15
      load_matrices(b, right + n * sizeof(*y) + d * sizeof(T));
#pragma unroll
      for (int r = 0; r < Block::ROW_TILES; ++r) {
        mma<T>(s[r][n / 8], a[r], b[0], b[1]);
        mma<T>(s[r][n / 8 + 1], a[r], b[2], b[3]);
      }
    }
  }
}

// Two numbers, 0 where they are not finite.
template <typename T>
__device__ __forceinline__ uint32_t finite_pair(uint32_t x) {
  constexpr uint32_t EXPONENT = std::is_same_v<T, __half> ? 0x7c00 : 0x7f80;
  if ((x & EXPONENT) == EXPONENT) x &= 0xffff0000;
  if ((x >> 16 & EXPONENT) == EXPONENT) x &= 0x0000ffff;
  return x;
}

// gradient += s y, with s rounded to T. CLEAN: what is not finite in y counts as 0.
template <class Block, int HEAD_DIM, bool CLEAN = false, typename T>
__device__ __forceinline__ void multiply(Gradient<Block, HEAD_DIM>& gradient, const Products<Block>& s,
                                         const Row<T, HEAD_DIM>* y) {
  const uint32_t right = shared_address(&y[threadIdx.x % 16][threadIdx.x % 32 / 16 * 8]);
#pragma unroll
  for (int n = 0; n < Block::COLS; n += 16) {
    uint32_t a[Block::ROW_TILES][4];  // two fragments C side by side are a fragment A
#pragma unroll
    for (int r = 0; r < Block::ROW_TILES; ++r)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &s[r][n / 8 + i / 2][i % 2 * 2];
        a[r][i] = pack<T>(pair[0], pair[1]);
      }
#pragma unroll
    for (int d = 0; d < HEAD_DIM; d += 16) {
      uint32_t b[4];  // dims d to d + 7 and d + 8 to d + 15
      load_matrices_transposed(b, right + n * sizeof(*y) + d * sizeof(T));
      if constexpr (CLEAN)
#pragma unroll
        for (uint32_t& x : b) x = finite_pair<T>(x);
#pragma unroll
      for (int r = 0; r < Block::ROW_TILES; ++r) {
        mma<T>(gradient[r][d / 8], a[r], b[0], b[1]);
        mma<T>(gradient[r][d / 8 + 1], a[r], b[2], b[3]);
      }
    }
  }
}

// s becomes p and dp becomes ds, from raw products. KEYS: the staying rows are keys, the moving ones queries;
// else the reverse. first_key: of the tile. A hidden p and its ds are 0, even if what they come from is NaN.
template <typename T, class Block, bool KEYS, bool MASKED>
__device__ __forceinline__ void score_gradient(Products<Block>& s, Products<Block>& dp,
                                               const Queries<KEYS ? Block::COLS : Block::ROWS>& queries,
                                               int first_key, const BackwardScores& scores) {
#pragma unroll
  for (int r = 0; r < Block::ROW_TILES; ++r)
#pragma unroll
    for (int n = 0; n < Block::COLS / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) dp[r][n][i] -= queries.delta[KEYS ? col_of(n, i) : row_of<Block>(r, i)];
  if (scores.outer > 0.0f) {
#pragma unroll
    for (int r = 0; r < Block::ROW_TILES; ++r)
#pragma unroll
      for (int n = 0; n < Block::COLS / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float t = tanhf(scores.inner * s[r][n][i]);
          s[r][n][i] = scores.outer * t;
          dp[r][n][i] *= 1.0f - t * t;
        }
  }
#pragma unroll
  for (int r = 0; r < Block::ROW_TILES; ++r)
#pragma unroll
    for (int n = 0; n < Block::COLS / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = row_of<Block>(r, i), col = col_of(n, i);
        const int query = KEYS ? col : row, key = first_key + (KEYS ? row : col);
        float p = exp2_approx(fmaf(s[r][n][i], scores.c, queries.minus_lse[query]));
        float ds = p * dp[r][n][i];
        if constexpr (MASKED) {
          if ((key < queries.start[query]) | (key >= queries.end[query])) p = 0.0f;
          if (p == 0.0f) ds = 0.0f;
        }
        // float16 gets ds times softmax_scale, so that it overflows no sooner than dq and dk do.
        if constexpr (std::is_same_v<T, __half>) ds *= scores.softmax_scale;
        s[r][n][i] = p;
        dp[r][n][i] = ds;
      }
}

// What is left to multiply dq and dk with.
template <typename T>
__device__ __forceinline__ float rest_of_scale(const BackwardScores& scores) {
  return std::is_same_v<T, __half> ? 1.0f : scores.softmax_scale;
}

// factor * gradient to rows `first` and on of x, whose stride is given, as far as `limit`. It goes through
// `tile`, where this warp's rows are read by no other warp.
template <class Block, int HEAD_DIM, typename T>
__device__ __forceinline__ void store_gradient(const Gradient<Block, HEAD_DIM>& gradient, float factor,
                                               Row<T, HEAD_DIM>* tile, T* x, int64_t stride, int first,
                                               int limit, int head_dim) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int r = 0; r < Block::ROW_TILES; ++r)
#pragma unroll
    for (int d = 0; d < HEAD_DIM / 8; ++d)
#pragma unroll
      for (int i = 0; i < 4; i += 2)
        reinterpret_cast<uint32_t&>(tile[row_of<Block>(r, i)][col_of(d, i)]) =
            pack<T>(gradient[r][d][i] * factor, gradient[r][d][i + 1] * factor);
  __syncwarp();
  constexpr int ROWS = 16 * Block::ROW_TILES, CHUNKS = HEAD_DIM / 8;
#pragma unroll 1
  for (int index = lane; index < ROWS * CHUNKS; index += 32) {
    const int row = threadIdx.x / 32 * ROWS + index / CHUNKS, dim = index % CHUNKS * 8;
    if (first + row < limit && dim < head_dim)
      *reinterpret_cast<uint4*>(x + (first + row) * stride + dim) =
          reinterpret_cast<const uint4&>(tile[row][dim]);
  }
}

}  // namespace mmkernels
