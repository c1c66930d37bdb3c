// x times the transpose of a weight with many zeros: what its C entry hands to the kernel of one instruction set.
#pragma once
#include <cstdint>

#include "cpu.h"

// Channels in a tile, TILE in lowbit/sparse_linear.py: their activations, a panel's tokens each, stay in the first-level cache while all rows pass over them.
constexpr long TILE_CHANNELS = 96;

struct SparseLinear {
    long T, C, R;
    const float *x;                    // [T, C]
    const float *values;               // nonzero weights, tile by tile, row by row
    const std::uint8_t *index;         // each one's channel in its tile
    const std::int64_t *starts;        // [tiles, R + 1]: where each row's weights of a tile start
    const float *bias;                 // [R] or null
    float *y;                          // [T, R]
};

// Tokens [from, to), at most the path's `width`, and rows [first, last); `scratch` holds `width` * (TILE_CHANNELS + rows) floats.
using PanelKernel = void (*)(const SparseLinear &, long from, long to, long first, long last, float *scratch);

struct SparsePath {
    PanelKernel panel;
    long width;
};

extern const SparsePath portable_sparse_path;
#ifdef LOWBIT_X86
extern const SparsePath avx2_sparse_path;
#endif
