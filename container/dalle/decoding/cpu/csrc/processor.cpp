// Instruction sets of this processor. In a file of its own, so that it is compiled for every x86-64 processor.
#include <cstdint>

// 0: the step cannot run on this processor; 1: it can, with int8 weights of 7 bits; 2: with those of 8 bits.
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
