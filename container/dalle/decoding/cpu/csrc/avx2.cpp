// The decoding step for processors with AVX2, as AMD's have it up to Zen 3, and laptops.
#include <cstdint>

// 0: the step below cannot run on this processor; 1: it can, with int8 weights of 7 bits. Compiled for every x86-64.
extern "C" __attribute__((visibility("default"))) int32_t dalle_support() {
#if defined(__x86_64__) && defined(__linux__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return 0;
#endif
}

#if defined(__x86_64__) && defined(__linux__)
#pragma GCC target("avx2,fma,f16c")
#include "lanes/avx2.h"

#include "exports.h"
#endif
