// Vectors of eight floats and what kernels do with them. From here on a file is compiled for AVX2 with FMA, whatever the compiler's
// default: include nothing after it but the kernel. Clang wants the attribute popped at the file's end.
#pragma once
#include <immintrin.h>

#include <cstdint>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

typedef __m256 vec;
typedef std::int32_t ivec __attribute__((vector_size(32)));

namespace {

inline vec load(const float *p) { return _mm256_loadu_ps(p); }

inline void store(float *p, vec v) { _mm256_storeu_ps(p, v); }

inline vec broadcast(float x) { return _mm256_set1_ps(x); }

inline vec fmadd(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }

inline vec fnmadd(vec a, vec b, vec c) { return _mm256_fnmadd_ps(a, b, c); }

}  // namespace
