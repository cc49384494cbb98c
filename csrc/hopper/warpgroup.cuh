// Warpgroups: named barriers between them, and how many registers each has.
#pragma once

namespace mmkernels {

constexpr int WARPGROUP = 128;  // threads

// PTX ISA, "bar, barrier": `threads` are those that wait and those that only arrive, together. 0 is the
// barrier of __syncthreads.
__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
  asm volatile("barrier.sync %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
  asm volatile("barrier.arrive %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}

// The same as a vote: is `x` true for any thread?
__device__ __forceinline__ bool named_barrier_any(int barrier, int threads, bool x) {
  int any;
  asm volatile(
      "{\n"
      ".reg .pred any;\n"
      "setp.ne.b32 any, %3, 0;\n"
      "barrier.red.or.pred any, %1, %2, any;\n"
      "selp.b32 %0, 1, 0, any;\n"
      "}\n"
      : "=r"(any)
      : "r"(barrier), "r"(threads), "r"(int(x))
      : "memory");
  return any;
}

// PTX ISA, "setmaxnreg": by all warps of a warpgroup.
template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(REGISTERS));
}

}  // namespace mmkernels
