// wgmma: products of a warpgroup, 64 rows by N columns in 16 steps, from shared memory.
//
// Fragments, for lane = 4 * row + pair of warp w of the warpgroup (PTX ISA, "Register Fragments and Shared
// Memory Matrix Layouts"):
//   D (64 x N)   d[4 j], d[4 j + 1]: row 16 w + row, columns 8 j + 2 pair and + 1;  d[4 j + 2], + 3: row + 8
//   A (64 x 16)  a[0]: row 16 w + row, columns 2 pair and + 1;  a[1]: row + 8;  a[2], a[3]: columns + 8
//
// Operands in shared memory are tiles of 64 columns of 16 bits, 128-byte swizzled as TMA writes them: row r
// of a tile starts at byte 128 r, and its 16-byte word i lies at word i ^ (r % 8).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../ptx.cuh"

namespace mmkernels {

// PTX ISA, "Matrix Descriptor": bits 0-13 address, 16-29 leading and 32-45 stride byte offset, all in units
// of 16 bytes; 62-63 swizzle, 1 for 128 bytes. A block's own shared memory ends below 2^18.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return uint64_t(address >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
         uint64_t(1) << 62;
}

// Columns are the product's sum ("K-major"): rows of A or B, 8 to a swizzled group. The next 16 columns of a
// tile begin 32 bytes on.
__device__ __forceinline__ uint64_t k_major(uint32_t address) { return matrix_descriptor(address, 16, 1024); }

// Rows are the product's sum ("MN-major"): columns are B's or A's own; the next 64 of them lie `tile` bytes
// on. The next 16 rows begin 2048 bytes on.
__device__ __forceinline__ uint64_t mn_major(uint32_t address, uint32_t tile) {
  return matrix_descriptor(address, tile, 1024);
}

// Steps of a descriptor, in bytes.
__device__ __forceinline__ uint64_t advanced(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

// "wgmma.fence": registers written before are seen by the products issued after it.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }

// "wgmma.commit_group": closes the group of products issued so far.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

// "wgmma.wait_group": until at most PENDING groups are not complete.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(PENDING) : "memory");
}

// The compiler must not move what reads or writes these registers across this point.
template <typename X, int COUNT>
__device__ __forceinline__ void pin(X (&x)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if constexpr (std::is_same_v<X, float>)
      asm volatile("" : "+f"(x[i])::"memory");
    else
      asm volatile("" : "+r"(x[i])::"memory");
  }
}

// How an operand lies in shared memory.
enum class Major { K, MN };

// In the text of an instruction, registers "%10, ..., %19" are D10(1); as operands they are F10(10).
#define D10(T) \
  "%" #T "0, %" #T "1, %" #T "2, %" #T "3, %" #T "4, %" #T "5, %" #T "6, %" #T "7, %" #T "8, %" #T "9"
#define F2(I) "+f"(d[I]), "+f"(d[I + 1])
#define F10(I) F2(I), F2(I + 2), F2(I + 4), F2(I + 6), F2(I + 8)
#define D30 D10() ", " D10(1) ", " D10(2)
#define D60 D30 ", " D10(3) ", " D10(4) ", " D10(5)
#define D90 D60 ", " D10(6) ", " D10(7) ", " D10(8)
#define F30 F10(0), F10(10), F10(20)
#define F60 F30, F10(30), F10(40), F10(50)
#define F90 F60, F10(60), F10(70), F10(80)

// "wgmma.mma_async": d = a b, or d += a b if `add`, in float32. A is a descriptor or a fragment.
#define MMKERNELS_WGMMA_TEXT(N, TYPE, D, A, B, ADD, REST)                                                    \
  "{\n.reg .pred add;\nsetp.ne.b32 add, " ADD                                                                \
  ", 0;\n"                                                                                                   \
  "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" D "}, " A ", " B ", add, 1, 1, " REST \
  ";\n}\n"

// P0 to P6: the places of the operands after d.
#define MMKERNELS_WGMMA(N, D, P0, P1, P2, P3, P4, P5, P6, ...)                                             \
  template <typename T, Major B, Major A = Major::K>                                                       \
  __device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {             \
    if constexpr (std::is_same_v<T, __half>)                                                               \
      asm volatile(MMKERNELS_WGMMA_TEXT(N, "f16", D, P0, P1, P2, P3 ", " P4)                               \
                   : __VA_ARGS__                                                                           \
                   : "l"(a), "l"(b), "r"(int(add)), "n"(int(A)), "n"(int(B)));                             \
    else                                                                                                   \
      asm volatile(MMKERNELS_WGMMA_TEXT(N, "bf16", D, P0, P1, P2, P3 ", " P4)                              \
                   : __VA_ARGS__                                                                           \
                   : "l"(a), "l"(b), "r"(int(add)), "n"(int(A)), "n"(int(B)));                             \
  }                                                                                                        \
  template <typename T, Major B>                                                                           \
  __device__ __forceinline__ void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) { \
    if constexpr (std::is_same_v<T, __half>)                                                               \
      asm volatile(MMKERNELS_WGMMA_TEXT(N, "f16", D, "{" P0 ", " P1 ", " P2 ", " P3 "}", P4, P5, P6)       \
                   : __VA_ARGS__                                                                           \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(B)));      \
    else                                                                                                   \
      asm volatile(MMKERNELS_WGMMA_TEXT(N, "bf16", D, "{" P0 ", " P1 ", " P2 ", " P3 "}", P4, P5, P6)      \
                   : __VA_ARGS__                                                                           \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(B)));      \
  }

MMKERNELS_WGMMA(64, D30 ", %30, %31", "%32", "%33", "%34", "%35", "%36", "%37", "%38", F30, F2(30))
MMKERNELS_WGMMA(80, D30 ", " D10(3), "%40", "%41", "%42", "%43", "%44", "%45", "%46", F30, F10(30))
MMKERNELS_WGMMA(96, D30 ", " D10(3) ", %40, %41, %42, %43, %44, %45, %46, %47", "%48", "%49", "%50", "%51",
                "%52", "%53", "%54", F30, F10(30), F2(40), F2(42), F2(44), F2(46))
MMKERNELS_WGMMA(128, D60 ", %60, %61, %62, %63", "%64", "%65", "%66", "%67", "%68", "%69", "%70", F60, F2(60),
                F2(62))
MMKERNELS_WGMMA(192, D90 ", %90, %91, %92, %93, %94, %95", "%96", "%97", "%98", "%99", "%100", "%101", "%102",
                F90, F2(90), F2(92), F2(94))
MMKERNELS_WGMMA(256,
                D90 ", " D10(9) ", " D10(10) ", " D10(11) ", %120, %121, %122, %123, %124, %125, %126, %127",
                "%128", "%129", "%130", "%131", "%132", "%133", "%134", F90, F10(90), F10(100), F10(110),
                F2(120), F2(122), F2(124), F2(126))

#undef D10
#undef D30
#undef D60
#undef D90
#undef F2
#undef F10
#undef F30
#undef F60
#undef F90
#undef MMKERNELS_WGMMA_TEXT
#undef MMKERNELS_WGMMA

}  // namespace mmkernels
