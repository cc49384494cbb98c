// What a block of the weight's kernel works on: its tiles in shared memory, and how they come from global
// memory. Numbers and layout are explained in weight_kernel.cuh.
#pragma once

#include "pixels.cuh"
#include "weight.h"

namespace mmkernels::patch_weight {

constexpr int BLOCK_D = 128;  // values of a token
constexpr int BLOCK_V = 128;  // values of a patch
constexpr int BLOCK_P = 32;   // patches of one step
constexpr int STAGES = 3;
constexpr int THREADS = 128;
constexpr int WARP_TILE = 64;
constexpr int ROW_BYTES = 256;  // of either tile

struct Stage {
  unsigned char dout[BLOCK_P][ROW_BYTES];
  unsigned char pixels[BLOCK_P][ROW_BYTES];
};

// Where the patches of a step, and the rows of dout that belong to them, start.
struct Places {
  const void* patch[BLOCK_P];
  const void* row[BLOCK_P];
};

struct Shared {
  Stage stages[STAGES];
  Places places[2];  // of the step that is sent for, and of the next one
};

// A block's share of the patches.
struct Share {
  int first, last;

  __device__ __forceinline__ Share(const PatchWeight& p, int split) {
    const int patches = p.batch * p.grid_h * p.grid_w;
    const int steps = (patches + BLOCK_P - 1) / BLOCK_P;
    const int size = (steps + p.splits - 1) / p.splits * BLOCK_P;
    first = int(min(int64_t(split) * size, int64_t(patches)));
    last = min(first + size, patches);
  }
};

// Lane i of the first warp looks up patch m0 + i; the first one stands in for those beyond the last.
template <typename T, typename Pixel>
__device__ __forceinline__ void find_patches(Places& places, const PatchWeight& p, int m0, int last) {
  if (threadIdx.x >= BLOCK_P) return;
  const int tokens = p.grid_h * p.grid_w, m = m0 + threadIdx.x < last ? m0 + threadIdx.x : 0;
  const int b = m / tokens, token = m % tokens;
  const int64_t offset =
      b * p.stride_xb + token / p.grid_w * (p.step_h * p.stride_xh) + token % p.grid_w * p.step_w;
  places.patch[threadIdx.x] = static_cast<const Pixel*>(p.pixels) + offset;
  places.row[threadIdx.x] = static_cast<const T*>(p.dout) + (m + int64_t(b + 1) * p.prefix_rows) * p.dim;
}

// Sends for tiles; each thread always copies the same piece of a patch, and the same word of a row of dout.
template <typename T, typename Pixel, int P>
struct Loader {
  static constexpr bool BYTES = sizeof(Pixel) == 1;
  static constexpr int LANES = BLOCK_V / PIECE<Pixel, P>;  // threads that share a patch
  static constexpr int ROWS = THREADS / LANES;
  static constexpr int DOUT_LANES = ROW_BYTES / 16;
  static constexpr int DOUT_ROWS = THREADS / DOUT_LANES;

  // Of this thread's piece in a patch and its word in a row. Those beyond the last ones repeat the first:
  // what becomes of them is not stored.
  int64_t piece_offset;
  int word_offset;
  Bytes<P> bytes[BYTES ? BLOCK_P / ROWS : 1];

  __device__ __forceinline__ Loader(const PatchWeight& p, int d0, int v0) {
    const int v = v0 + piece(), d = d0 + word() * 8;
    const Value<P> value(v < p.channels * P * p.row ? v : 0, p.row);
    piece_offset = value.offset(p.stride_xc, p.stride_xh);
    word_offset = d < p.dim ? d : 0;
  }

  __device__ __forceinline__ static int piece() { return threadIdx.x % LANES * PIECE<Pixel, P>; }
  __device__ __forceinline__ static int row() { return threadIdx.x / LANES; }  // of the first ROWS
  __device__ __forceinline__ static int word() { return threadIdx.x % DOUT_LANES; }
  __device__ __forceinline__ static int dout_row() { return threadIdx.x / DOUT_LANES; }

  // The tiles of these `count` patches on their way to `stage`, bytes to registers. Zeros beyond the last.
  __device__ __forceinline__ void load(Stage& stage, const Places& places, int count) {
    const uint32_t dout = swizzled<ROW_BYTES>(shared_address(stage.dout), dout_row(), word() * 16);
    for_each_row<BLOCK_P / DOUT_ROWS>(places.row + dout_row(), DOUT_ROWS, [&](int i, const void* row) {
      const T* source = static_cast<const T*>(row) + word_offset;
      copy_async_16(rows_below<ROW_BYTES>(dout, i * DOUT_ROWS), source, dout_row() + i * DOUT_ROWS < count);
    });
    const uint32_t pixels = swizzled<ROW_BYTES>(shared_address(stage.pixels), row(), piece() * 2);
    for_each_row<BLOCK_P / ROWS>(places.patch + row(), ROWS, [&](int i, const void* patch) {
      const Pixel* source = static_cast<const Pixel*>(patch) + piece_offset;
      const bool there = row() + i * ROWS < count;
      if constexpr (BYTES) {
        bytes[i] = {};
        if (there) load_bytes(bytes[i], source);
      } else {
        copy_async<PIECE<Pixel, P> * 2>(rows_below<ROW_BYTES>(pixels, i * ROWS), source, there);
      }
    });
  }

  // What `load` left in registers to the same stage.
  __device__ __forceinline__ void store(Stage& stage) {
    if constexpr (BYTES) {
      const uint32_t target = swizzled<ROW_BYTES>(shared_address(stage.pixels), row(), piece() * 2);
      const int first = threadIdx.x % 8 / 4;  // eight pieces of a row meet every bank once
#pragma unroll
      for (int i = 0; i < BLOCK_P / ROWS; ++i)
        store_floats<T>(bytes[i], first, rows_below<ROW_BYTES>(target, i * ROWS));
    }
  }

 private:
  // Calls f(i, rows[i * step]) for COUNT rows. Four places are read before they are used, or each copy
  // would wait for its own.
  template <int COUNT, typename F>
  __device__ __forceinline__ static void for_each_row(const void* const* rows, int step, F f) {
    constexpr int BATCH = COUNT < 4 ? COUNT : 4;
#pragma unroll
    for (int i = 0; i < COUNT; i += BATCH) {
      const void* batch[BATCH];
#pragma unroll
      for (int j = 0; j < BATCH; ++j) batch[j] = rows[(i + j) * step];
#pragma unroll
      for (int j = 0; j < BATCH; ++j) f(i + j, batch[j]);
    }
  }
};

}  // namespace mmkernels::patch_weight
