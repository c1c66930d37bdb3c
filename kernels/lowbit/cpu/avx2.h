// Vectors of eight floats and what kernels do with them. Include after <immintrin.h>, where the target is already AVX2 with FMA.
#pragma once
#include <cstdint>

typedef __m256 vec;
typedef std::int32_t ivec __attribute__((vector_size(32)));

namespace {

inline vec load(const float *p) { return _mm256_loadu_ps(p); }

inline void store(float *p, vec v) { _mm256_storeu_ps(p, v); }

inline vec broadcast(float x) { return _mm256_set1_ps(x); }

inline vec fmadd(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }

inline vec fnmadd(vec a, vec b, vec c) { return _mm256_fnmadd_ps(a, b, c); }

}  // namespace
