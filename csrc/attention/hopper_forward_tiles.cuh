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

// What a kernel is made for. HEAD_DIM is a multiple of 16; what a head has less is 0.
template <typename T, int HEAD_DIM_, bool SOFTCAP_>
struct Shape {
  using Element = T;
  static constexpr int HEAD_DIM = HEAD_DIM_;
  static constexpr bool SOFTCAP = SOFTCAP_;
  // Each consumer warpgroup holds 64 queries. Three read keys less often; acc and s of wider heads, and
  // softcap, need the registers of two.
  static constexpr int CONSUMERS = HEAD_DIM <= 64 && !SOFTCAP ? 3 : 2;
  static constexpr int PRODUCER_REGISTERS = CONSUMERS == 3 ? 32 : 40;
  static constexpr int CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : 232;
  static constexpr int THREADS = WARPGROUP * (CONSUMERS + 1);
  static constexpr int BLOCK_M = WARPGROUP_ROWS * CONSUMERS;
  static constexpr int BLOCK_N = 128;
  static constexpr int STAGES = 2;
  static constexpr int COLUMN_TILES = (HEAD_DIM + COLUMNS - 1) / COLUMNS;

  // Of the k-th tile of keys: its buffer, and the parity of the phase of the buffer's barriers.
  static __device__ __forceinline__ unsigned stage(unsigned k) { return k % STAGES; }
  static __device__ __forceinline__ uint32_t parity(unsigned k) { return k / STAGES % 2; }
};

// The keys that a warpgroup's rows see, [lo, hi), and that all of them but those without a key see.
struct KeyRange {
  int lo, hi, full_lo, full_hi;
};

// The producer may be two tiles of queries ahead of a warpgroup that still reads its own; a power of 2.
constexpr int WORK_SLOTS = 4;

// A tile of queries and the keys that it walks: `count` tiles from key `lo` on.
template <typename S>
struct Work {
  int b, h, kv_h, m0;
  int lo, count;
  KeyRange ranges[S::CONSUMERS];
  int2 bounds[S::BLOCK_M];  // of each row
};

// Of k or v: tiles of 64 columns, row after row.
template <typename S>
using KeyTile = typename S::Element[S::COLUMN_TILES][S::BLOCK_N][COLUMNS];

// Full: TMA has written. Empty: all consumer warps have read.
struct Barriers {
  uint64_t k_full, k_empty, v_full, v_empty;
};

template <typename S>
struct Shared {
  using T = typename S::Element;
  T q[S::COLUMN_TILES][S::BLOCK_M][COLUMNS];
  T out[S::COLUMN_TILES][S::BLOCK_M][COLUMNS];
  KeyTile<S> k[S::STAGES], v[S::STAGES];
  Barriers stages[S::STAGES];
  uint64_t q_full, q_empty;  // of `work`, too
  Work<S> work[WORK_SLOTS];
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
template <typename S>
__device__ __forceinline__ void find_work(Work<S>& work, const AttentionForward& p, const Order& order,
                                          int index) {
  const Position at(p, index, S::BLOCK_M, order.row_tiles, order.wave);
  if (threadIdx.x % 32 == 0) {
    work.b = at.b;
    work.h = at.h;
    work.kv_h = at.h / (p.heads / p.kv_heads);
    work.m0 = at.m0;
  }
#pragma unroll 1
  for (int group = 0; group < S::CONSUMERS; ++group) {
    KeyRange range = {INT_MAX, 0, 0, INT_MAX};
#pragma unroll 1
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
    if (threadIdx.x % 32 == 0) work.ranges[group] = range;
  }
  if (threadIdx.x % 32 == 0) {
    int lo = INT_MAX, hi = 0;
#pragma unroll
    for (const KeyRange& range : work.ranges) {
      lo = min(lo, range.lo);
      hi = max(hi, range.hi);
    }
    work.lo = lo;
    work.count = max((hi - lo + S::BLOCK_N - 1) / S::BLOCK_N, 0);
  }
  __syncwarp();  // or the lane that arrives for all would not release what the others wrote
}

}  // namespace mmkernels::hopper
