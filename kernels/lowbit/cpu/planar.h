// Integer products over the planar layout (lowbit/planar.py): what the C entries hand to the kernels of one instruction set.
#pragma once
#include <cstdint>

#include "cpu.h"

// Channels that share a scale, channels that share bytes; rows, and the most tokens, that a kernel is handed at a time.
constexpr long PLANAR_TILE = 64, PLANAR_UNIT = 128, PLANAR_ROWS = 16, PLANAR_TOKENS = 64;
constexpr long EXACT_TERMS = 2;  // codes a number that has no grid

// Bytes of a unit's first and second plane.
constexpr long first_bytes(int bits) { return bits == 8 ? 128 : bits == 4 ? 64 : 32; }
constexpr long second_bytes(int bits) { return bits == 3 ? 16 : 0; }

// Tokens' grids are `grid_stride` apart, 0 where all share one. `packed` and `excess` are the path's own, made by its `pack`.
// Where a number is the sum of several codes, all tokens' first codes come before all tokens' second ones; T counts all of them. A step
// of a second code is 1/254 of the first's.
struct PlanarActivations {
    long T, tiles, terms;
    const std::int8_t *a;      // [T, 64 tiles]
    const float *step, *shift;  // shift may be null
    long grid_stride;
    const float *count;         // [T, tiles]
    std::int8_t *packed;        // T * 64 tiles
    std::int32_t *excess;       // [T, tiles]
};

// PLANAR_ROWS rows of a weight, or as many as are left of it.
struct PlanarBlock {
    const std::uint8_t *first, *second;  // planes, rows of tiles / 2 units; second may be null
    // The tables: W = scale (v - zero), and the sum of v - zero over a tile's channels. [tiles, PLANAR_ROWS] each; zero may be null.
    const std::uint8_t *scale;  // float32 if `wide`, else float16 without signs
    const std::int8_t *zero;
    const std::int16_t *sum;
    bool wide;
    const float *bias;  // or null
    long next;          // bytes from these tables to the next block's

    long scale_bytes() const { return wide ? 4 : 2; }
};

struct PlanarPath {
    // Fills packed and excess of tokens [from, to).
    void (*pack)(const PlanarActivations &x, int bits, long from, long to);
    // What tokens [from, to) of all T add to y[t * R + r], which the first terms set, for `rows` rows; a block of fewer than PLANAR_ROWS is
    // padded. All terms of a token that is alone are handed over at once.
    void (*rows)(const PlanarActivations &x, int bits, const PlanarBlock &w, long rows, long from, long to, float *y, long R);
    // The least and the largest of n floats and 0; true where one is no number.
    bool (*extremes)(const float *x, long n, float *low, float *high);
    // a[i] = clamp(round(x[i] / scale) + zero, 0, top) - offset for a tile of n <= 64 channels, 0 beyond; true where x has NaN, 0 there.
    bool (*codes)(const float *x, long n, float scale, float zero, float top, float offset, std::int8_t *a);
};

// What rounds an activation: clusters of whole tiles.
struct PlanarClusters {
    long count;
    const float *scale, *zero;  // null: each token's own
    const std::uint8_t *bits;
    const std::int64_t *sizes;
    const std::int64_t *repeats;  // [again]: tiles that follow the others once more
    long again;
    bool brief;  // steps of a token's own grid are bfloat16
};

struct PlanarWeight {
    long bits, units, R;
    const std::uint8_t *first, *second;
    const std::uint8_t *tables;  // [blocks, octets 2 units PLANAR_ROWS]: scales, zero points if there are any, sums
    long octets;                 // of a tile's and row's grid: 4 or, if scales are float32, 6, and 1 more for a zero point
    const float *bias;
};

// The path that a caller chose, null where this machine lacks it.
const PlanarPath *planar_path(int path);

// One token: a [64 tiles], step, shift and count [tiles]. `step` is null where all tokens share theirs, `shift` where none is needed.
void planar_quantize_token(const PlanarPath &path, const PlanarClusters &clusters, long tiles, const float *x, std::int8_t *a, float *step,
                           float *shift, float *count);

// One token that has no grid, x [C], as sums of EXACT_TERMS codes a number, each of what those before left over, as
// lowbit.integer.exact_codes. What belongs to a later term lies `stride` rows behind: a [64 tiles], step, shift and count [tiles] each.
// `shift`, which is 0, may be null.
void planar_exact_token(const PlanarPath &path, long C, long tiles, long stride, const float *x, std::int8_t *a, float *step, float *shift,
                        float *count);

// y[t * R + r] for all tokens and the rows of a block.
void planar_tokens(const PlanarPath &path, const PlanarActivations &x, int bits, const PlanarBlock &w, long rows, float *y, long R);

// The rows from `row`, a multiple of PLANAR_ROWS; the last rows where they do not fill a block must be padded by whoever asks.
PlanarBlock planar_block(const PlanarWeight &w, long row);

extern const PlanarPath portable_planar_path;
#ifdef LOWBIT_X86
extern const PlanarPath avx2_planar_path;
#endif
