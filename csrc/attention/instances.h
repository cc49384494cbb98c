// Which of a pass's kernels serves a call: there is one for each padded head dim and dtype, and for Hopper
// another.
#pragma once

#include <cstdint>

namespace mmkernels {

// Null if this build has none.
template <typename Launcher>
struct Launchers {
  Launcher* portable;
  Launcher* hopper;
};

// The Hopper kernels make tanh of 2^x, which is exact enough between these.
inline bool hopper_takes_softcap(float softcap) {
  return softcap == 0.0f || (softcap >= 0.01f && softcap <= 1e4f);
}

}  // namespace mmkernels

// The body of a function of head_dim and bfloat16 that returns the Launchers of a pass.
#define MMKERNELS_RETURN_LAUNCHERS(PASS)        \
  switch (head_dim) {                           \
    case 64:                                    \
      MMKERNELS_RETURN_LAUNCHERS_OF(PASS, 64);  \
    case 72:                                    \
    case 80:                                    \
      MMKERNELS_RETURN_LAUNCHERS_OF(PASS, 80);  \
    case 96:                                    \
      MMKERNELS_RETURN_LAUNCHERS_OF(PASS, 96);  \
    case 128:                                   \
      MMKERNELS_RETURN_LAUNCHERS_OF(PASS, 128); \
    default:                                    \
      return {nullptr, nullptr};                \
  }
#define MMKERNELS_RETURN_LAUNCHERS_OF(PASS, D)                                                      \
  if (bfloat16)                                                                                     \
    return {mmkernels_attention_##PASS##_##D##_bf16, mmkernels_attention_##PASS##_sm90_##D##_bf16}; \
  return { mmkernels_attention_##PASS##_##D##_fp16, mmkernels_attention_##PASS##_sm90_##D##_fp16 }
