// What both kernels of the Hopper backward pass are made of: tiles in shared memory, their products, and the
// gradient of a tile of scores. Each consumer warpgroup of a block has a tile of rows that stays (keys in one
// kernel, queries in the other); of all others, the moving ones, a tile comes by at a time. A tile of scores
// is (staying rows, moving rows) in either kernel.
#pragma once

#include <climits>
#include <cmath>

#include "../hopper/tma.cuh"
#include "../hopper/warpgroup.cuh"
#include "../hopper/wgmma.cuh"
#include "backward.h"

namespace mmkernels::hopper {

constexpr int ROWS = 64;     // of a tile
constexpr int COLUMNS = 64;  // of a part of a tile: 128 bytes
constexpr int GROUPS = 2;    // consumer warpgroups
static_assert(GROUPS * ROWS == SUM_ROWS);
constexpr int CONSUMERS = GROUPS * WARPGROUP;
constexpr int THREADS = WARPGROUP + CONSUMERS;  // the first warpgroup sends for what they need
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;

// Named barriers; 0 is __syncthreads.
enum Barrier {
  WARPGROUP_BARRIER = 1,  // and on: one for each warpgroup
  CONSUMERS_BARRIER = WARPGROUP_BARRIER + 1 + GROUPS,
  VOTE_BARRIER,
  TURN_BARRIER,  // and the next one
};

// Rows of a head. HEAD_DIM is a multiple of 16; what a head has less is 0.
template <typename T, int HEAD_DIM>
struct alignas(1024) Tile {
  static constexpr int PARTS = (HEAD_DIM + COLUMNS - 1) / COLUMNS;
  T parts[PARTS][ROWS][COLUMNS];
};

// Of a warpgroup: fragments D of scores and of a gradient, and scores rounded, as fragments A.
using Products = float[ROWS / 2];
template <int HEAD_DIM>
using Gradient = float[HEAD_DIM / 2];
using Operand = uint32_t[ROWS / 16][4];

// Tensors as (B, H, S, D) in boxes of a tile's part.
struct BackwardMaps {
  CUtensorMap q, k, v, dout, dq, dk, dv;
};

// Numbers that turn raw products into exponents of 2, and their gradients into those of dq and dk.
struct Scores {
  float c;  // softmax_scale log2(e), or 1 with softcap
  // With softcap x = outer tanh(s softmax_scale / softcap), which is outer - 2 outer / (1 + 2^(inner s)), to
  // some 2^-22 outer. The slope of tanh there is 1 - slope x^2, and p = 2^(x - lse) gives x again, to some
  // 2^-23 lse. hopper_takes_softcap says where both are good enough.
  float inner, outer, slope;
  float softmax_scale;

  explicit Scores(const AttentionBackward& p)
      : c(p.softmax_scale * LOG2E), inner(0.0f), outer(0.0f), slope(0.0f), softmax_scale(p.softmax_scale) {
    if (p.softcap > 0.0f) {
      c = 1.0f;
      inner = 2.0f * LOG2E * p.softmax_scale / p.softcap;
      outer = p.softcap * LOG2E;
      slope = 1.0f / (outer * outer);
    }
  }
};

// What a tile of scores needs to know of its queries.
struct Queries {
  float minus_lse[ROWS];  // times log2(e); -inf where there is no key: the 2^-inf that such a row needs
  float delta[ROWS];
  int2 bounds[ROWS];  // the keys that it sees, [x, y)
};

// How much of a tile of scores the mask leaves.
enum class Seen { NOTHING, SOME, ALL };

// One query, of which a row beyond the last has no key.
struct Query {
  float minus_lse, delta;
  int2 bounds;

  __device__ __forceinline__ Query(const AttentionBackward& p, int b, int h, int row)
      : minus_lse(-INFINITY), delta(0.0f), bounds(make_int2(0, 0)) {
    if (row >= p.seqlen_q) return;
    const int64_t place = (int64_t(b) * p.heads + h) * p.seqlen_q + row;
    const float lse = p.lse[place];
    delta = p.delta[place];
    int start = 0, end = p.seqlen_k;
    if (p.start != nullptr) {
      start = max(p.start[b * p.stride_start_b + row * p.stride_start_s], 0);
      end = min(p.end[b * p.stride_end_b + row * p.stride_end_s], p.seqlen_k);
    }
    if (start >= end) return;
    bounds = make_int2(start, end);
    if (lse != -INFINITY) minus_lse = lse == INFINITY ? NAN : -lse * LOG2E;
  }

  __device__ __forceinline__ bool empty() const { return bounds.x >= bounds.y; }

  __device__ __forceinline__ void store(Queries& queries, int row) const {
    queries.minus_lse[row] = minus_lse;
    queries.delta[row] = delta;
    queries.bounds[row] = bounds;
  }
};

// Row and column of element `i` of fragment D in the tile of this thread's warpgroup.
__device__ __forceinline__ int row_of(int i) {
  return threadIdx.x % WARPGROUP / 32 * 16 + i / 2 % 2 * 8 + threadIdx.x % 32 / 4;
}

__device__ __forceinline__ int column_of(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }

__device__ __forceinline__ void sync_warpgroup() {
  named_barrier_sync(WARPGROUP_BARRIER + threadIdx.x / WARPGROUP, WARPGROUP);
}

// One arrival of each warp, whose lanes have all come so far.
__device__ __forceinline__ void release(uint64_t& barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// Eight columns of a tile's row, where the swizzle has them.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ T* swizzled(Tile<T, HEAD_DIM>& tile, int row, int word) {
  return &tile.parts[word / 8][row][(word % 8 ^ row % 8) * 8];
}

// By one thread: rows `row` and on of a head to a tile, as bytes that `barrier` counts.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void load_tile(Tile<T, HEAD_DIM>& tile, const CUtensorMap& map, uint64_t& barrier,
                                          int row, int h, int b) {
#pragma unroll
  for (int part = 0; part < tile.PARTS; ++part)
    tma_load(tile.parts[part], map, barrier, part * COLUMNS, row, h, b);
}

// s = x y^T, as a group of its own.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void multiply_transposed(Products& s, const Tile<T, HEAD_DIM>& x,
                                                    const Tile<T, HEAD_DIM>& y) {
  const uint64_t a = k_major(shared_address(&x)), b = k_major(shared_address(&y));
  wgmma_fence();
#pragma unroll
  for (int d = 0; d < HEAD_DIM; d += 16) {
    const int step = d / COLUMNS * sizeof(x.parts[0]) + d % COLUMNS * sizeof(T);
    wgmma<T, Major::K>(s, advanced(a, step), advanced(b, step), d > 0);
  }
  wgmma_commit();
}

// gradient += s y, as a group of its own.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void multiply(Gradient<HEAD_DIM>& gradient, const Operand& s,
                                         const Tile<T, HEAD_DIM>& y) {
  const uint64_t b = mn_major(shared_address(&y), sizeof(y.parts[0]));
  wgmma_fence();
#pragma unroll
  for (int n = 0; n < ROWS; n += 16)
    wgmma<T, Major::MN>(gradient, s[n / 16], advanced(b, n * COLUMNS * sizeof(T)), true);
  wgmma_commit();
}

// p from finished scores, and rounded. KEYS: the staying rows are keys, the moving ones queries; else the
// reverse. first_key: of the tile. A hidden p is 0, even if what it comes from is NaN.
template <bool KEYS, bool MASKED, typename T>
__device__ __forceinline__ void exponentiate(Products& s, Operand& rounded, const Queries& queries,
                                             int first_key, const Scores& scores) {
#pragma unroll
  for (int i = 0; i < ROWS / 2; ++i) {
    const int row = row_of(i), column = column_of(i), query = KEYS ? column : row;
    s[i] = exp2_approx(fmaf(s[i], scores.c, queries.minus_lse[query]));
    if constexpr (MASKED) {
      const int2 bounds = queries.bounds[query];
      const int key = first_key + (KEYS ? row : column);
      if (key < bounds.x || key >= bounds.y) s[i] = 0.0f;
    }
  }
#pragma unroll
  for (int i = 0; i < ROWS / 4; ++i) rounded[i / 4][i % 4] = pack<T>(s[2 * i], s[2 * i + 1]);
}

// The same from raw products.
template <bool KEYS, typename T>
__device__ __forceinline__ void exponentiate(Products& s, Operand& rounded, const Queries& queries,
                                             int first_key, const Scores& scores, Seen seen) {
  if (scores.outer > 0.0f) {
#pragma unroll
    for (float& x : s)
      x = fmaf(-2.0f * scores.outer, reciprocal_approx(1.0f + exp2_approx(x * scores.inner)), scores.outer);
  }
  if (seen == Seen::SOME)
    exponentiate<KEYS, true, T>(s, rounded, queries, first_key, scores);
  else
    exponentiate<KEYS, false, T>(s, rounded, queries, first_key, scores);
}

// ds = p (dp - delta), times softcap's slope, rounded.
template <bool KEYS, typename T>
__device__ __forceinline__ void differentiate(const Products& p, Products& dp, Operand& rounded,
                                              const Queries& queries, const Scores& scores, Seen seen) {
#pragma unroll
  for (int i = 0; i < ROWS / 2; ++i) dp[i] -= queries.delta[KEYS ? column_of(i) : row_of(i)];
  if (scores.outer > 0.0f) {
#pragma unroll
    for (int i = 0; i < ROWS / 2; ++i) {
      const float x = log2_approx(p[i]) - queries.minus_lse[KEYS ? column_of(i) : row_of(i)];
      dp[i] *= fmaf(-x * scores.slope, x, 1.0f);
    }
  }
  if (seen == Seen::SOME || scores.outer > 0.0f) {
#pragma unroll
    for (int i = 0; i < ROWS / 2; ++i)
      if (p[i] == 0.0f) dp[i] = 0.0f;  // it may be NaN
  }
#pragma unroll
  for (int i = 0; i < ROWS / 4; ++i) {
    float ds[2] = {p[2 * i] * dp[2 * i], p[2 * i + 1] * dp[2 * i + 1]};
    // float16 gets ds times softmax_scale, so that it overflows no sooner than dq and dk do.
    if constexpr (std::is_same_v<T, __half>) ds[0] *= scores.softmax_scale, ds[1] *= scores.softmax_scale;
    rounded[i / 4][i % 4] = pack<T>(ds[0], ds[1]);
  }
}

// What is left to multiply dq and dk with.
template <typename T>
__device__ __forceinline__ float rest_of_scale(const Scores& scores) {
  return std::is_same_v<T, __half> ? 1.0f : scores.softmax_scale;
}

// factor * gradient to rows `row` and on of a head, through a tile that is this warpgroup's own.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void store_gradient(const Gradient<HEAD_DIM>& gradient, float factor,
                                               Tile<T, HEAD_DIM>& tile, const CUtensorMap& map, int row,
                                               int h, int b) {
  const int lane = threadIdx.x % 32;
  const int local = threadIdx.x % WARPGROUP / 32 * 16 + lane % 16;
  sync_warpgroup();  // none of the warps multiplies what is overwritten
#pragma unroll
  for (int d = 0; d < tile.PARTS * COLUMNS; d += 16) {  // TMA reads what is beyond the head, too
    uint32_t x[4] = {};
#pragma unroll
    for (int i = 0; i < 4 && d < HEAD_DIM; ++i)
      x[i] = pack<T>(gradient[d / 2 + 2 * i] * factor, gradient[d / 2 + 2 * i + 1] * factor);
    store_matrices(shared_address(swizzled(tile, local, d / 8 + lane / 16)), x);
  }
  fence_async_proxy();
  sync_warpgroup();
  if (threadIdx.x % WARPGROUP == 0) {
#pragma unroll
    for (int part = 0; part < tile.PARTS; ++part) tma_store(map, tile.parts[part], part * COLUMNS, row, h, b);
    tma_store_commit();
  }
}

}  // namespace mmkernels::hopper
