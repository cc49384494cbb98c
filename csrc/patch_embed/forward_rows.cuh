// What the forward kernels share: where the rows of out come from, how their pixels are fetched, and how they
// are finished. Numbers and layout are explained in forward_kernel.cuh and hopper_forward_kernel.cuh.
#pragma once

#include "forward.h"
#include "pixels.cuh"

namespace mmkernels::patch_forward {

constexpr int BLOCK_M = 128;  // rows of out in a tile
constexpr int BLOCK_N = 128;  // their values
constexpr int GROUP = 128;    // threads that fetch the pixels of a tile

// Values of one of the weight's parts.
template <int P>
__device__ __forceinline__ int part_size(const PatchForward& p) {
  return p.channels * P * p.row / p.parts;
}

__host__ __device__ inline int sample_rows(const PatchForward& p) {
  return p.prefix_rows + p.grid_h * p.grid_w;
}

// Where the patch of a row of out starts; and in elements, where its position and its prefix token do, -1: it
// has none. A row without a patch is computed from the first one, and not used.
struct Row {
  const void* patch;
  int64_t pos = -1, prefix = -1;

  __device__ __forceinline__ Row(const PatchForward& p, int row) : patch(p.pixels) {
    if (row >= p.batch * sample_rows(p)) return;
    const int b = row / sample_rows(p), place = row % sample_rows(p), token = place - p.prefix_rows;
    if (token >= 0)
      patch = static_cast<const char*>(p.pixels) +
              (b * p.stride_xb + token / p.grid_w * (p.step_h * p.stride_xh) + token % p.grid_w * p.step_w) *
                  (p.bytes ? 1 : 2);
    else
      prefix = b * p.stride_prefix_b + place * p.stride_prefix_p;
    if (p.pos != nullptr && (p.pos_prefix || token >= 0))
      pos = (p.pos_first + int64_t(b) * p.pos_stride + (p.pos_prefix ? place : token)) * p.stride_pos;
  }
};

// Fetches the pixels of a tile, BLOCK_K values of each patch after the other; a thread's piece is always
// the same one of a step.
template <typename T, typename Pixel, int P, int BLOCK_K>
struct PixelLoader {
  static constexpr bool BYTES = sizeof(Pixel) == 1;
  static constexpr int LANES = BLOCK_K / PIECE<Pixel, P>;  // threads that share a row
  static constexpr int ROWS = GROUP / LANES;

  // A thread's pieces of a step, where they are bytes.
  struct Pieces {
    Bytes<P> x[BYTES ? BLOCK_M / ROWS : 1];
  };

  const PatchForward& p;
  int part_values, step_rows, step_values;  // a step is so many rows of a patch, and values
  int part = 0, k = 0;                      // the first value of the step
  Value<P> value;                           // of this thread's piece
  const Pixel* patches[BLOCK_M / ROWS];     // where the patches of this thread's rows start

  // patch (BLOCK_M): where the patch of each row starts.
  __device__ __forceinline__ PixelLoader(const PatchForward& p, const void* const* patch)
      : p(p),
        part_values(part_size<P>(p)),
        step_rows(BLOCK_K / p.row),
        step_values(BLOCK_K % p.row),
        value(piece(), p.row) {
#pragma unroll
    for (int i = 0; i < BLOCK_M / ROWS; ++i) patches[i] = static_cast<const Pixel*>(patch[row() + i * ROWS]);
  }

  __device__ __forceinline__ static int piece() { return threadIdx.x % LANES * PIECE<Pixel, P>; }
  __device__ __forceinline__ static int row() { return threadIdx.x % GROUP / LANES; }  // of the first ROWS

  __device__ __forceinline__ static uint32_t address(uint32_t tile) {
    return swizzled<BLOCK_K * 2>(tile, row(), piece() * 2);
  }

  // The step's pixels on their way to `tile`; bytes to `pieces`. Zeros beyond the part.
  __device__ __forceinline__ void load(uint32_t tile, Pieces& pieces) {
    const bool valid = k + piece() < part_values;
    const int64_t offset = valid ? value.offset(p.stride_xc, p.stride_xh) : 0;
    const uint32_t target = address(tile);
#pragma unroll
    for (int i = 0; i < BLOCK_M / ROWS; ++i) {
      const Pixel* source = patches[i] + offset;
      if constexpr (BYTES) {
        pieces.x[i] = {};
        if (valid) load_bytes(pieces.x[i], source);
      } else {
        copy_async<PIECE<Pixel, P> * 2>(rows_below<BLOCK_K * 2>(target, i * ROWS), source, valid);
      }
    }
  }

  // Bytes to `tile`, as floats.
  __device__ __forceinline__ static void store(uint32_t tile, const Pieces& pieces) {
    if constexpr (BYTES) {
      const uint32_t target = address(tile);
#pragma unroll
      for (int i = 0; i < BLOCK_M / ROWS; ++i)
        store_floats<T>(pieces.x[i], 0, rows_below<BLOCK_K * 2>(target, i * ROWS));
    }
  }

  __device__ __forceinline__ void advance() {
    k += BLOCK_K;
    value.advance(step_rows, step_values, p.row);
    if (k >= part_values) {
      k = 0;
      ++part;
      value = Value<P>(piece(), p.row);
      value.c = part;
    }
  }
};

// x[i : i + 4] of type T, or of float32.
template <typename T>
__device__ __forceinline__ float4 load_four(const void* x, bool is_float, int64_t i) {
  if (is_float) return *reinterpret_cast<const float4*>(static_cast<const float*>(x) + i);
  const uint2 raw = *reinterpret_cast<const uint2*>(static_cast<const T*>(x) + i);
  float2 low, high;
  if constexpr (std::is_same_v<T, __half>) {
    low = __half22float2(reinterpret_cast<const __half2&>(raw.x));
    high = __half22float2(reinterpret_cast<const __half2&>(raw.y));
  } else {
    low = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(raw.x));
    high = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(raw.y));
  }
  return make_float4(low.x, low.y, high.x, high.y);
}

__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

constexpr int STAGED_VALUES = 64;
constexpr int STAGED_ROW = STAGED_VALUES + 8;  // floats: the banks of 4 rows of fragment C are distinct
using Staged = float[16][STAGED_ROW];

// What a warp needs to know of its 16 rows to finish them.
struct Ends {
  const int64_t* pos;
  const int64_t* prefix;
  int first, count;  // row of out of the first one, and how many there are
};

// Writes 16 rows and 64 values from n on, of which the warp holds the products in fragments C side by side.
// They pass through shared memory, so that positions are read, and out is written, in whole lines.
template <typename T>
__device__ __forceinline__ void finish(const float* acc, Staged& staged, const Ends& ends,
                                       const PatchForward& p, int n) {
  const int lane = threadIdx.x % 32, column = lane % 16 * 4;
#pragma unroll
  for (int j = 0; j < STAGED_VALUES / 8; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      *reinterpret_cast<float2*>(&staged[lane / 4 + half * 8][j * 8 + lane % 4 * 2]) =
          make_float2(acc[j * 4 + 2 * half], acc[j * 4 + 2 * half + 1]);
  __syncwarp();
  n += column;
  if (n < p.dim) {
    float4 bias = {};
    if (p.bias != nullptr) bias = load_four<T>(p.bias, p.bias_float, n);
    T* out = static_cast<T*>(p.out) + int64_t(ends.first) * p.dim + n;
#pragma unroll
    for (int pass = 0; pass < 8; ++pass) {
      const int row = lane / 16 + pass * 2;
      if (row >= ends.count) break;
      float4 x = *reinterpret_cast<const float4*>(&staged[row][column]) + bias;
      if (ends.prefix[row] >= 0) x = load_four<T>(p.prefix, p.prefix_float, ends.prefix[row] + n);
      if (ends.pos[row] >= 0) x = x + load_four<T>(p.pos, p.pos_float, ends.pos[row] + n);
      const uint2 four = make_uint2(pack<T>(x.x, x.y), pack<T>(x.z, x.w));
      *reinterpret_cast<uint2*>(out + int64_t(row) * p.dim) = four;
    }
  }
  __syncwarp();
}

}  // namespace mmkernels::patch_forward
