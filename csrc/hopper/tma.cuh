// TMA: copies of boxes of a tensor between global and shared memory, by one thread.
//
// Coordinates are in elements, fastest dimension first; what lies outside of the tensor is read as zeros and
// not written. Boxes in shared memory start at multiples of 1024 bytes if they are swizzled.
// PTX ISA, "Data Movement and Conversion Instructions: Tensor copy".
#pragma once

#include <cuda.h>

#include "mbarrier.cuh"

namespace mmkernels {

// "prefetch, prefetchu": the descriptor into the cache that TMA reads it from.
__device__ __forceinline__ void prefetch_descriptor(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}

// "cp.async.bulk.tensor": a box of a 2-d tensor to shared memory; its bytes count for the barrier.
__device__ __forceinline__ void tma_load(void* target, const CUtensorMap& map, uint64_t& barrier, int x0,
                                         int x1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];\n" ::"r"(shared_address(target)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(&barrier)), "r"(x0), "r"(x1)
      : "memory");
}

// The same, of a 4-d tensor.
__device__ __forceinline__ void tma_load(void* target, const CUtensorMap& map, uint64_t& barrier, int x0,
                                         int x1, int x2, int x3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];\n" ::"r"(shared_address(target)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(&barrier)), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
      : "memory");
}

// "cp.async.bulk.tensor": a box in shared memory to a 4-d tensor, as part of the next group.
__device__ __forceinline__ void tma_store(const CUtensorMap& map, const void* source, int x0, int x1, int x2,
                                          int x3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n" ::"l"(
          reinterpret_cast<uint64_t>(&map)),
      "r"(shared_address(source)), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
      : "memory");
}

// "cp.reduce.async.bulk": adds float32 numbers in shared memory to those at `target`, as part of the next
// group. Both start at multiples of 16 bytes, and so many there are.
__device__ __forceinline__ void bulk_add(float* target, const void* source, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n" ::"l"(
                   __cvta_generic_to_global(target)),
               "r"(shared_address(source)), "r"(bytes)
               : "memory");
}

// "cp.async.bulk.commit_group": closes this thread's group of stores.
__device__ __forceinline__ void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}

// "cp.async.bulk.wait_group": until all of this thread's stores have read their shared memory.
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;\n" ::: "memory");
}

// "membar/fence", "async proxy": this thread's ordinary writes to shared memory, before TMA or wgmma read
// them.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

}  // namespace mmkernels
