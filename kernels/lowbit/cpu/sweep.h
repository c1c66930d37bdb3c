// The column sweep of SparseGPT and GPTQ over one block: what its C entry hands to the kernel of one instruction set.
#pragma once
#include <cstdint>

#include "cpu.h"

struct Sweep {
    long b, R;                         // steps in the block; rows of W, contiguous
    long group, keep;                  // n:m: keep `keep` of every `group` steps; group == b and keep == 0 without it
    const float *W1;                   // [b, R]
    const float *steps;                // packed by panels, see pack_steps
    const std::uint8_t *mask;          // [b, R] or null
    const float *score;                // [b], read only with n:m
    const float *scale, *low, *high;   // [b, R] or all null
    float *values;                     // [b, R]
    std::uint8_t *kept;                // [b, R], written only with n:m
    float *errors;                     // [b, R], may be W1: a group's weights are read before its first error is written
};

// Steps that are finished together, in registers.
constexpr long PANEL = 4;

// One tile of `lanes` rows of W starting at `row`; `scratch` holds scratch_bytes of its path.
using TileKernel = void (*)(const Sweep &, long row, long lanes, void *scratch);

struct Path {
    TileKernel tile;
    long width;                        // rows of W in a tile
    long scratch_bytes_per_step;
};

extern const Path portable_path;
#ifdef LOWBIT_X86
extern const Path avx2_path;
#endif
