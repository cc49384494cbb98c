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
  // Of each row where its patch starts, in elements, and its position and its prefix token; -1: it has none.
  // A row without a patch is computed from the first one, and not used.
  int64_t patch[BLOCK_M], pos[BLOCK_M], prefix[BLOCK_M];
  int64_t weight[BLOCK_N];  // the same of weight; rows beyond the last one repeat it
};

// Address of byte `byte` of a row in a tile: eight rows, read at one place, meet every bank once.
__device__ __forceinline__ uint32_t swizzled(uint32_t tile, int row, int byte) {
  return tile + row * (BLOCK_K * 2) + (byte ^ (row / 2 % 4 * 16));
}

// Thread i looks up row i of out and of the weight. Ends with a barrier.
__device__ __forceinline__ void find_rows(Shared& shared, const PatchForward& p, int m0, int n0,
                                          int values) {
  const int tokens = p.grid_h * p.grid_w, sample_rows = p.prefix_rows + tokens;
  const int row = m0 + threadIdx.x;
  int64_t patch = 0, pos = -1, prefix = -1;
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
  shared.weight[threadIdx.x] = int64_t(min(n0 + int(threadIdx.x), p.dim - 1)) * values;
  __syncthreads();
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
  const Shared& shared;
  int part_values;
  int part = 0, k = 0;  // the first value of the step
  Value<P> value;       // of this thread's piece
  Bytes<P> bytes[BYTES ? BLOCK_M / ROWS : 1];

  __device__ __forceinline__ Loader(const PatchForward& p, const Shared& shared)
      : p(p), shared(shared), part_values(p.channels * P * P / p.parts), value(piece()) {}

  __device__ __forceinline__ static int piece() { return threadIdx.x % LANES * PIECE<Pixel, P>; }

  // The step's tiles on their way to `stage`; bytes to registers. Zeros beyond the part.
  __device__ __forceinline__ void load(Stage& stage) {
    load_weight(stage);
    const bool valid = k + piece() < part_values;
    const int64_t offset = valid ? value.offset(p.stride_xc, p.stride_xh) : 0;
    const Pixel* x = static_cast<const Pixel*>(p.pixels) + offset;
    const uint32_t tile = shared_address(stage.pixels);
#pragma unroll
    for (int i = 0; i < BLOCK_M / ROWS; ++i) {
      const int row = threadIdx.x / LANES + i * ROWS;
      const Pixel* source = x + shared.patch[row];
      if constexpr (BYTES)
        bytes[i] = valid ? *reinterpret_cast<const Bytes<P>*>(source) : Bytes<P>{};
      else
        copy_async<PIECE<Pixel, P> * 2>(swizzled(tile, row, piece() * 2), source, valid);
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
    const T* weight = static_cast<const T*>(p.weight) + (valid ? part * part_values + k + first : 0);
    const uint32_t tile = shared_address(stage.weight);
#pragma unroll
    for (int i = 0; i < BLOCK_N / WEIGHT_ROWS; ++i) {
      const int row = threadIdx.x / WEIGHT_LANES + i * WEIGHT_ROWS;
      copy_async<WEIGHTS * 2>(swizzled(tile, row, first * 2), weight + shared.weight[row], valid);
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
