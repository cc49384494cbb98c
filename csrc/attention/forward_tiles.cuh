// What a block of the forward kernel works on: its tiles in shared memory and registers, which keys it
// walks, and how tiles come from global memory. Numbers and layout are explained in forward_kernel.cuh.
#pragma once

#include <climits>

#include "forward_common.cuh"
#include "ptx.cuh"

namespace mmkernels {

constexpr int BLOCK_M = 128;
constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;  // one for each query, where bounds are read
constexpr int ROW_TILES = BLOCK_M / WARPS / 16;
// As many keys as leave registers for acc.
template <int HEAD_DIM>
constexpr int BLOCK_N = HEAD_DIM <= 80   ? 64
                        : HEAD_DIM <= 96 ? 48
                                         : 32;

// HEAD_DIM is a multiple of 16; what a head has less is 0.
template <typename T, int HEAD_DIM>
struct Shared {
  static constexpr int ROW = HEAD_DIM + 8;
  T q[BLOCK_M][ROW];  // at the end out
  T k[BLOCK_N<HEAD_DIM>][ROW];
  T v[BLOCK_N<HEAD_DIM>][ROW];
  int2 bounds[BLOCK_M];  // start, end; (0, 0) for a row without a key
  int4 ranges[WARPS];
};

// The tiles of keys that a block walks; those that every row sees in full come first.
template <int HEAD_DIM>
struct KeyTiles {
  int lo, hi;      // keys that some row sees
  int left, full;  // tiles before the full ones; the full ones
  int count;       // all

  // The first key of the tile that is walked as number `index`.
  __device__ __forceinline__ int first_key(int index) const {
    const int ragged = index - full;
    const int tile = index < full ? left + index : ragged < left ? ragged : index;
    return lo + tile * BLOCK_N<HEAD_DIM>;
  }
};

template <int HEAD_DIM>
struct State {
  float acc[ROW_TILES][HEAD_DIM / 8][4];  // fragments C
  float m[ROW_TILES][2];                  // of rows lane / 4 and lane / 4 + 8 of a tile
  float l[ROW_TILES][2];                  // this lane's share
};

// Of a warp's queries with a tile's keys: fragments C.
template <int HEAD_DIM>
using Products = float[ROW_TILES][BLOCK_N<HEAD_DIM> / 8][4];

// What the walk of the ragged tiles makes; the other two modes look at values that are not finite.
enum class Mode {
  SOFTMAX,  // acc, m and l
  CLEAN,    // the same, of the finite values only
  COUNT,    // acc: for each dim how many of the keys that a row sees are not finite
};

// Row of the block that element `i` of fragment C of row tile `r` lies in.
__device__ __forceinline__ int row_of(int r, int i) {
  return (threadIdx.x / 32 * ROW_TILES + r) * 16 + threadIdx.x % 32 / 4 + (i / 2) * 8;
}

// Copies x[row : row + ROWS] to `tile`, zeros beyond row `limit` and beyond the head. Eight lanes take 128
// bytes of a row, and the next ones after that if it is longer.
template <int HEAD_DIM, int ROWS, typename T>
__device__ __forceinline__ void load_tile(T (*tile)[HEAD_DIM + 8], const T* x, int64_t stride, int row,
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
    target += THREADS / 8 * (HEAD_DIM + 8) * sizeof(T);
    source += THREADS / 8 * stride;
  }
}

// Each row's bounds into shared memory, and the block's tiles from them. Ends with a barrier.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ KeyTiles<HEAD_DIM> key_tiles(Shared<T, HEAD_DIM>& shared,
                                                        const AttentionForward& p, int b, int m0) {
  const int2 bounds = row_bounds(p, b, m0 + threadIdx.x);
  const int start = bounds.x, end = bounds.y;
  const bool empty = start >= end;
  shared.bounds[threadIdx.x] = bounds;
  int4 range;  // keys that some row sees, and that all rows but those without a key see
  range.x = __reduce_min_sync(~0u, empty ? INT_MAX : start);
  range.y = __reduce_max_sync(~0u, empty ? 0 : end);
  range.z = __reduce_max_sync(~0u, empty ? 0 : start);
  range.w = __reduce_min_sync(~0u, empty ? INT_MAX : end);
  if (threadIdx.x % 32 == 0) shared.ranges[threadIdx.x / 32] = range;
  __syncthreads();
  range = shared.ranges[0];
#pragma unroll
  for (int warp = 1; warp < WARPS; ++warp) {
    const int4 other = shared.ranges[warp];
    range =
        make_int4(min(range.x, other.x), max(range.y, other.y), max(range.z, other.z), min(range.w, other.w));
  }
  KeyTiles<HEAD_DIM> tiles;
  tiles.lo = min(range.x, range.y);  // of rows without any key the empty range at 0
  tiles.hi = range.y;
  tiles.left = (min(range.z, tiles.hi) - tiles.lo + BLOCK_N<HEAD_DIM> - 1) / BLOCK_N<HEAD_DIM>;
  const int full_lo = tiles.lo + tiles.left * BLOCK_N<HEAD_DIM>;
  tiles.full = max(min(range.w, tiles.hi) - full_lo, 0) / BLOCK_N<HEAD_DIM>;
  tiles.count = (tiles.hi - tiles.lo + BLOCK_N<HEAD_DIM> - 1) / BLOCK_N<HEAD_DIM>;
  return tiles;
}

// k and v of one head of keys.
template <typename T>
struct Keys {
  const T* k;
  const T* v;
  int64_t stride_ks, stride_vs;
  int head_dim;
};

template <typename T, int HEAD_DIM>
__device__ __forceinline__ void load_keys(Shared<T, HEAD_DIM>& shared, const Keys<T>& keys,
                                          const KeyTiles<HEAD_DIM>& tiles, int index) {
  load_tile<HEAD_DIM, BLOCK_N<HEAD_DIM>>(shared.k, keys.k, keys.stride_ks, tiles.first_key(index), tiles.hi,
                                         keys.head_dim);
  copy_async_commit();
}

}  // namespace mmkernels
