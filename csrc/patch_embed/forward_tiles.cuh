// What a block of the forward kernel works on: its tiles in shared memory, where its rows lie, and how tiles
// come from global memory. Numbers and layout are explained in forward_kernel.cuh.
#pragma once

#include <type_traits>

#include "forward.h"
#include "pixels.cuh"

namespace mmkernels::patch_forward {

constexpr int BLOCK_M = 128;  // rows of out
constexpr int BLOCK_N = 128;  // their values
constexpr int BLOCK_K = 32;   // values of a patch in one step
constexpr int STAGES = 3;
constexpr int THREADS = 128;  // one for each row, where rows are looked up
constexpr int WARP_TILE = 64;
constexpr int STAGED_ROW = WARP_TILE + 8;  // floats: the banks of 4 rows of fragment C are distinct

struct Stage {
  unsigned char pixels[BLOCK_M][BLOCK_K * 2];
  unsigned char weight[BLOCK_N][BLOCK_K * 2];
};

struct Shared {
  union {
    Stage stages[STAGES];
    float out[THREADS / 32][16][STAGED_ROW];  // 16 rows of each warp at a time
  };
  // Of each row where its patch, its position and its prefix token start, in elements; -1: it has none.
  int64_t patch[BLOCK_M], pos[BLOCK_M], prefix[BLOCK_M];
};

// Address of byte `byte` of a row in a tile: eight rows, read at one place, meet every bank once.
__device__ __forceinline__ uint32_t swizzled(uint32_t tile, int row, int byte) {
  return tile + row * (BLOCK_K * 2) + (byte ^ (row / 2 % 4 * 16));
}

// Thread i looks up row i.
__device__ __forceinline__ void find_rows(Shared& shared, const PatchForward& p, int m0) {
  const int tokens = p.grid_h * p.grid_w, sample_rows = p.prefix_rows + tokens;
  const int row = m0 + threadIdx.x;
  int64_t patch = -1, pos = -1, prefix = -1;
  if (row < p.batch * sample_rows) {
    const int b = row / sample_rows, place = row % sample_rows, token = place - p.prefix_rows;
    if (token >= 0)
      patch = b * p.stride_xb + token / p.grid_w * (p.step_h * p.stride_xh) + token % p.grid_w * p.step_w;
    else
      prefix = b * p.stride_prefix_b + place * p.stride_prefix_p;
    if (p.pos != nullptr && (p.pos_prefix || token >= 0))
      pos = (p.pos_first + int64_t(b) * p.pos_stride + (p.pos_prefix ? place : token)) * p.stride_pos;
  }
  shared.patch[threadIdx.x] = patch;
  shared.pos[threadIdx.x] = pos;
  shared.prefix[threadIdx.x] = prefix;
}

// Sends for the tiles of one step after the other; each thread always copies the same piece of a step.
template <typename T, typename Pixel, int P>
struct Loader {
  static constexpr bool BYTES = sizeof(Pixel) == 1;
  static constexpr int LANES = BLOCK_K / PIECE<Pixel, P>;  // threads that share a row
  static constexpr int ROWS = THREADS / LANES;
  static constexpr int WEIGHTS = P == 16 ? 8 : 4;  // of one copy: rows of 196 C start at multiples of 4
  static constexpr int WEIGHT_LANES = BLOCK_K / WEIGHTS;
  static constexpr int WEIGHT_ROWS = THREADS / WEIGHT_LANES;

  const PatchForward& p;
  Shared& shared;
  int n0, part_values;
  int part = 0, k = 0;  // the first value of the step
  Value<P> value;       // of this thread's piece
  Bytes<P> bytes[BYTES ? BLOCK_M / ROWS : 1];

  __device__ __forceinline__ Loader(const PatchForward& p, Shared& shared, int n0)
      : p(p), shared(shared), n0(n0), part_values(p.channels * P * P / p.parts), value(piece()) {}

  __device__ __forceinline__ static int piece() { return threadIdx.x % LANES * PIECE<Pixel, P>; }

  // The step's tiles on their way to `stage`; bytes to registers.
  __device__ __forceinline__ void load(Stage& stage) {
    load_weight(stage);
    const bool valid = k + piece() < part_values;
    const Pixel* x = static_cast<const Pixel*>(p.pixels) + value.offset(p.stride_xc, p.stride_xh);
    const uint32_t tile = shared_address(stage.pixels);
#pragma unroll
    for (int i = 0; i < BLOCK_M / ROWS; ++i) {
      const int row = threadIdx.x / LANES + i * ROWS;
      const int64_t patch = shared.patch[row];
      const bool there = valid && patch >= 0;
      if constexpr (BYTES)
        bytes[i] = there ? *reinterpret_cast<const Bytes<P>*>(x + patch) : Bytes<P>{};
      else
        copy_async<PIECE<Pixel, P> * 2>(swizzled(tile, row, piece() * 2), there ? x + patch : p.pixels, there);
    }
    advance();
  }

  // What `load` left in registers to the same stage.
  __device__ __forceinline__ void store(Stage& stage) {
    if constexpr (BYTES) {
      const uint32_t tile = shared_address(stage.pixels);
#pragma unroll
      for (int i = 0; i < BLOCK_M / ROWS; ++i) {
        const int row = threadIdx.x / LANES + i * ROWS;
        store_floats<T>(bytes[i], 0, [&](int word) { return swizzled(tile, row, piece() * 2 + word * 16); });
      }
    }
  }

 private:
  __device__ __forceinline__ void load_weight(Stage& stage) {
    const int first = threadIdx.x % WEIGHT_LANES * WEIGHTS;
    const bool valid = k + first < part_values;
    const int64_t row_values = int64_t(p.parts) * part_values;
    const T* weight = static_cast<const T*>(p.weight) + part * part_values + k + first;
    const uint32_t tile = shared_address(stage.weight);
#pragma unroll
    for (int i = 0; i < BLOCK_N / WEIGHT_ROWS; ++i) {
      const int row = threadIdx.x / WEIGHT_LANES + i * WEIGHT_ROWS;
      const bool there = valid && n0 + row < p.dim;
      const void* source = there ? weight + (n0 + row) * row_values : p.weight;
      copy_async<WEIGHTS * 2>(swizzled(tile, row, first * 2), source, there);
    }
  }

  __device__ __forceinline__ void advance() {
    k += BLOCK_K;
    value.template advance<BLOCK_K>();
    if (k >= part_values) {
      k = 0;
      ++part;
      value = Value<P>(piece());
      value.c = part;
    }
  }
};

}  // namespace mmkernels::patch_forward
