// mbarriers: what a warp waits on for TMA copies, and TMA's thread for warps.
//
// A barrier completes a phase when its count of threads has arrived and the bytes that they announced have
// landed. Phases alternate in parity: the first one is 0. PTX ISA, "Parallel Synchronization and
// Communication Instructions: mbarrier".
#pragma once

#include <cstdint>

#include "../ptx.cuh"

namespace mmkernels {

// Where one is in a ring of STAGES buffers, and the parity of the barriers' phase there.
template <int STAGES>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// "mbarrier.init": by one thread, before `fence_barrier_init` and a barrier of the block.
__device__ __forceinline__ void barrier_init(uint64_t& barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(&barrier)), "r"(count)
               : "memory");
}

// "membar/fence": makes initialised barriers known to TMA.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

// "mbarrier.arrive"
__device__ __forceinline__ void barrier_arrive(uint64_t& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(&barrier)) : "memory");
}

// "mbarrier.arrive", "expect-tx operation": arrives, and the phase waits for `bytes` of copies besides.
__device__ __forceinline__ void barrier_arrive_expect(uint64_t& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(&barrier)),
               "r"(bytes)
               : "memory");
}

// "mbarrier.test_wait / mbarrier.try_wait": returns when the phase of this parity is complete. The phase
// before the first one, of parity 1, counts as complete.
__device__ __forceinline__ void barrier_wait(uint64_t& barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "wait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait;\n"
      "}\n" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

}  // namespace mmkernels
