// How the kernels of the patch embedding fetch pixels: piece by piece into rows of shared memory.
//
// A piece is what one copy moves, neighbours in a row of a patch: 16 bytes where patches are 16 wide, and two
// pixels where they are 14 wide, for a patch then starts at no more than a multiple of two pixels. Pixels of
// the weight's dtype are copied past the registers. Bytes are held in registers while products are under way
// and then written as 16-bit floats, which hold them exactly.
#pragma once

#include "../ptx.cuh"

namespace mmkernels {

// Pixels of a piece.
template <typename Pixel, int P>
constexpr int PIECE = P == 16 ? 16 / sizeof(Pixel) : 2;

// A piece of bytes, in registers.
template <int P>
struct Bytes;
template <>
struct Bytes<14> {
  uint16_t x = 0;
};
template <>
struct Bytes<16> {
  uint4 x = {};
};

// By what the 16-byte words of a row in a tile in shared memory are swizzled, as TMA's 128-byte swizzle has
// it: eight rows, read at one word, meet every bank once. Tiles begin at multiples of 1024 bytes.
template <int ROW_BYTES>
__device__ __forceinline__ int swizzle(int row) {
  constexpr int ROWS = ROW_BYTES < 128 ? 128 / ROW_BYTES : 1;  // of one line of the banks
  constexpr int WORDS = ROW_BYTES < 128 ? ROW_BYTES / 16 : 8;
  return row / ROWS % WORDS * 16;
}

// Address of byte `byte` of a row.
template <int ROW_BYTES>
__device__ __forceinline__ uint32_t swizzled(uint32_t tile, int row, int byte) {
  return tile + row * ROW_BYTES + (byte ^ swizzle<ROW_BYTES>(row));
}

// The same byte so many rows below one of the first ROWS rows, of which `address` is. In the loops over a
// thread's rows the compiler then adds constants and no more.
template <int ROW_BYTES>
__device__ __forceinline__ uint32_t rows_below(uint32_t address, int rows) {
  return (address ^ swizzle<ROW_BYTES>(rows)) + rows * ROW_BYTES;
}

__device__ __forceinline__ void load_bytes(Bytes<14>& bytes, const uint8_t* source) {
  bytes.x = __ldg(reinterpret_cast<const unsigned short*>(source));
}

__device__ __forceinline__ void load_bytes(Bytes<16>& bytes, const uint8_t* source) {
  bytes.x = __ldg(reinterpret_cast<const uint4*>(source));
}

// Where a value of a patch lies, counted in the order of a weight (D, C, P, row).
template <int P>
struct Value {
  int c, h, w;

  __device__ __forceinline__ Value(int index, int row)
      : c(index / (P * row)), h(index / row % P), w(index % row) {}

  // Less than P rows on.
  __device__ __forceinline__ void advance(int rows, int values, int row) {
    w += values;
    h += rows;
    if (w >= row) w -= row, ++h;
    if (h >= P) h -= P, ++c;
  }

  __device__ __forceinline__ int64_t offset(int64_t stride_c, int64_t stride_h) const {
    return c * stride_c + h * stride_h + w;
  }
};

// "cp.async": 4 or 8 bytes, zeros if not `valid`.
template <int SIZE>
__device__ __forceinline__ void copy_async(uint32_t target, const void* source, bool valid) {
  if constexpr (SIZE == 16)
    copy_async_16(target, source, valid);
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(target), "l"(source), "n"(SIZE),
                 "r"(valid ? SIZE : 0)
                 : "memory");
}

// Bytes 2 i and 2 i + 1 of x as two floats of type T. In 2^23 + x the last bits are those of x.
template <typename T>
__device__ __forceinline__ uint32_t two_floats(uint32_t x, int i) {
  constexpr uint32_t MAGIC = 0x4b000000;
  const float low = __uint_as_float(__byte_perm(x, MAGIC, 0x7440 + 2 * i)) - __uint_as_float(MAGIC);
  const float high = __uint_as_float(__byte_perm(x, MAGIC, 0x7441 + 2 * i)) - __uint_as_float(MAGIC);
  return pack<T>(low, high);
}

__device__ __forceinline__ void store_shared(uint32_t target, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;\n" ::"r"(target), "r"(x) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t target, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"r"(target), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w)
               : "memory");
}

// Of 4 bytes four floats.
template <typename T>
__device__ __forceinline__ uint2 four_floats(uint32_t x) {
  return make_uint2(two_floats<T>(x, 0), two_floats<T>(x, 1));
}

// Writes a piece of bytes as floats to a swizzled address; of its two 16-byte words number `first` first.
template <typename T>
__device__ __forceinline__ void store_floats(const Bytes<16>& bytes, int first, uint32_t address) {
  const uint2 a = four_floats<T>(bytes.x.x), b = four_floats<T>(bytes.x.y);
  const uint2 c = four_floats<T>(bytes.x.z), d = four_floats<T>(bytes.x.w);
  const uint4 low = make_uint4(a.x, a.y, b.x, b.y), high = make_uint4(c.x, c.y, d.x, d.y);
  store_shared(address ^ (first * 16), first == 0 ? low : high);
  store_shared(address ^ (16 - first * 16), first == 0 ? high : low);
}

template <typename T>
__device__ __forceinline__ void store_floats(const Bytes<14>& bytes, int, uint32_t address) {
  store_shared(address, two_floats<T>(bytes.x, 0));
}

}  // namespace mmkernels
