// What a block of the Hopper forward kernel works on: its shared memory, its tiles of queries in their order,
// and which keys they walk. Numbers and layout are explained in hopper_forward_kernel.cuh.
#pragma once

#include <climits>

#include "../hopper/tensor_map.h"
#include "../hopper/tma.cuh"
#include "../hopper/warpgroup.cuh"
#include "../hopper/wgmma.cuh"
#include "forward_common.cuh"

namespace mmkernels::hopper {

constexpr int WARPGROUP_ROWS = 64;
constexpr int COLUMNS = 64;  // of a tile in shared memory: 128 bytes

// HEAD_DIM is a multiple of 16; what a head has less is 0.
template <int HEAD_DIM>
struct Tiles {
  // Each consumer warpgroup holds 64 queries.
  static constexpr int CONSUMERS = HEAD_DIM <= 64 ? 3 : 2;
  static constexpr int PRODUCER_REGISTERS = CONSUMERS == 3 ? 56 : 40;
  static constexpr int CONSUMER_REGISTERS = CONSUMERS == 3 ? 152 : 232;
  static constexpr int THREADS = WARPGROUP * (CONSUMERS + 1);
  static constexpr int BLOCK_M = WARPGROUP_ROWS * CONSUMERS;
  static constexpr int BLOCK_N = CONSUMERS == 3 ? 96 : 128;
  static constexpr int STAGES = 2;
  static constexpr int COLUMN_TILES = (HEAD_DIM + COLUMNS - 1) / COLUMNS;
};

// The keys that a warpgroup's rows see, [lo, hi), and that all of them but those without a key see.
struct KeyRange {
  int lo, hi, full_lo, full_hi;
};

// How many tiles of queries ahead of the slowest warpgroup the producer may be, and one.
constexpr int WORK_SLOTS = 3;

// A tile of queries and the keys that it walks: `count` tiles from key `lo` on.
template <int HEAD_DIM>
struct Work {
  int b, h, m0;
  int lo, count;
  KeyRange ranges[Tiles<HEAD_DIM>::CONSUMERS];
  int2 bounds[Tiles<HEAD_DIM>::BLOCK_M];  // of each row
};

template <typename T, int HEAD_DIM>
struct Shared {
  using S = Tiles<HEAD_DIM>;
  T q[S::COLUMN_TILES][S::BLOCK_M][COLUMNS];
  T out[S::COLUMN_TILES][S::BLOCK_M][COLUMNS];
  T k[S::STAGES][S::COLUMN_TILES][S::BLOCK_N][COLUMNS];
  T v[S::STAGES][S::COLUMN_TILES][S::BLOCK_N][COLUMNS];
  // Full: TMA has written. Empty: all consumer warps have read.
  uint64_t q_full, q_empty;  // of `work`, too
  uint64_t k_full[S::STAGES], k_empty[S::STAGES];
  uint64_t v_full[S::STAGES], v_empty[S::STAGES];
  Work<HEAD_DIM> work[WORK_SLOTS];
};

// q, k, v and out as (B, H, S, D); boxes are a tile in shared memory, of out a warpgroup's rows.
struct Maps {
  CUtensorMap q, k, v, out;
};

// How often the blocks of a launch step through the tiles of queries.
struct Order {
  int total;      // tiles of all heads
  int row_tiles;  // of one head
  int wave;       // heads side by side
};

// By one warp, to shared memory: a tile's place, and the range of keys of each warpgroup's rows.
template <int HEAD_DIM>
__device__ __forceinline__ void find_work(Work<HEAD_DIM>& work, const AttentionForward& p, const Order& order,
                                          int index) {
  using S = Tiles<HEAD_DIM>;
  const Position at(p, index, S::BLOCK_M, order.row_tiles, order.wave);
  int lo = INT_MAX, hi = 0;
#pragma unroll 1
  for (int group = 0; group < S::CONSUMERS; ++group) {
    KeyRange range = {INT_MAX, 0, 0, INT_MAX};
#pragma unroll
    for (int i = 0; i < WARPGROUP_ROWS; i += 32) {
      const int row = group * WARPGROUP_ROWS + i + threadIdx.x % 32;
      const int2 bounds = row_bounds(p, at.b, at.m0 + row);
      work.bounds[row] = bounds;
      if (bounds.x < bounds.y)
        range = {min(range.lo, bounds.x), max(range.hi, bounds.y), max(range.full_lo, bounds.x),
                 min(range.full_hi, bounds.y)};
    }
    range.lo = __reduce_min_sync(~0u, range.lo);
    range.hi = __reduce_max_sync(~0u, range.hi);
    range.full_lo = __reduce_max_sync(~0u, range.full_lo);
    range.full_hi = __reduce_min_sync(~0u, range.full_hi);
    lo = min(lo, range.lo);
    hi = max(hi, range.hi);
    if (threadIdx.x % 32 == 0) work.ranges[group] = range;
  }
  if (threadIdx.x % 32 == 0) {
    work.b = at.b;
    work.h = at.h;
    work.m0 = at.m0;
    work.lo = lo;
    work.count = max((hi - lo + S::BLOCK_N - 1) / S::BLOCK_N, 0);
  }
}

}  // namespace mmkernels::hopper
