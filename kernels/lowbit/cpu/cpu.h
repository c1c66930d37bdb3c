// What every kernel of the library shares: the C ABI, and which instructions this machine has.
#pragma once

#define EXPORT extern "C" __attribute__((visibility("default")))

#if defined(__x86_64__)
#define LOWBIT_X86
#endif

enum PathChoice { FASTEST = 0, PORTABLE = 1, AVX2 = 2 };

inline bool has_avx2() {
#ifdef LOWBIT_X86
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return false;
#endif
}
