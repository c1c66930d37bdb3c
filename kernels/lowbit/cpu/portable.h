// Vectors of four floats, which every compiler target has or emulates, and what kernels do with them; no fused multiply-add.
#pragma once
#include <cstdint>
#include <cstring>

typedef float vec __attribute__((vector_size(16)));
typedef std::int32_t ivec __attribute__((vector_size(16)));

namespace {

inline vec load(const float *p) {
    vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float *p, vec v) { std::memcpy(p, &v, sizeof v); }

inline vec broadcast(float x) { return vec{x, x, x, x}; }

inline vec fmadd(vec a, vec b, vec c) { return c + a * b; }

inline vec fnmadd(vec a, vec b, vec c) { return c - a * b; }

}  // namespace
