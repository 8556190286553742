// What this processor can do. By itself, so that nothing here is compiled for more than every processor has.
#include <cstdint>

// 0: the step cannot run here; 1: it can, with bytes of 7 bits; 2: with those of 8.
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
