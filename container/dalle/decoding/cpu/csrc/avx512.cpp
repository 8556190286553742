// The decoding step for processors with AVX-512. A library of its own: the linker merges equal functions of one
// library, and would leave AVX-512 in the standard library's functions that avx2.cpp calls.
#include <cstdint>

// 0: the step below cannot run on this processor; 1: it can, with int8 weights of 7 bits; 2: with those of 8 bits.
// Compiled for every x86-64.
extern "C" __attribute__((visibility("default"))) int32_t dalle_support() {
#if defined(__x86_64__) && defined(__linux__)
  __builtin_cpu_init();
  const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return !runs ? 0 : __builtin_cpu_supports("avx512vnni") ? 2 : 1;
#else
  return 0;
#endif
}

#if defined(__x86_64__) && defined(__linux__)
// Without VNNI, so that the same code runs on processors that lack it.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#include "lanes/avx512.h"

#include "exports.h"
#endif
