// C entries of the sparse linear: lay the nonzero weights out in tiles, and spread panels of tokens over threads.
#include "sparse_linear.h"

#include <cstdlib>
#include <cstring>

#include "cpu.h"

namespace {

const SparsePath *select_path(int path) {
#ifdef LOWBIT_X86
    if (path != PORTABLE && has_avx2()) return &avx2_sparse_path;
#endif
    return path == AVX2 ? nullptr : &portable_sparse_path;
}

long tiles_of(long C) { return (C + TILE_CHANNELS - 1) / TILE_CHANNELS; }

long channels_of(long C, long tile) { return C - tile * TILE_CHANNELS < TILE_CHANNELS ? C - tile * TILE_CHANNELS : TILE_CHANNELS; }

}  // namespace

// starts [tiles, R + 1] from W [R, C]; the last entry is the number of nonzero weights.
EXPORT void lowbit_sparse_starts(int threads, long R, long C, const float *W, std::int64_t *starts) {
    const long tiles = tiles_of(C);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long r = 0; r < R; ++r)
        for (long tile = 0; tile < tiles; ++tile) {
            const float *w = W + r * C + tile * TILE_CHANNELS;
            const long channels = channels_of(C, tile);
            std::int64_t count = 0;
            for (long c = 0; c < channels; ++c) count += w[c] != 0.0f;
            starts[tile * (R + 1) + r] = count;
        }
    std::int64_t total = 0;
    for (long tile = 0; tile < tiles; ++tile) {
        for (long r = 0; r < R; ++r) {
            std::int64_t &start = starts[tile * (R + 1) + r];
            const std::int64_t count = start;
            start = total;
            total += count;
        }
        starts[tile * (R + 1) + R] = total;
    }
}

// The nonzero weights and their channels, where `starts` says.
EXPORT void lowbit_sparse_fill(int threads, long R, long C, const float *W, const std::int64_t *starts, float *values,
                               std::uint8_t *index) {
    const long tiles = tiles_of(C);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long r = 0; r < R; ++r)
        for (long tile = 0; tile < tiles; ++tile) {
            const float *w = W + r * C + tile * TILE_CHANNELS;
            const long channels = channels_of(C, tile);
            // One beyond the last may be written, which in the arrays would belong to another row.
            float kept[TILE_CHANNELS + 1];
            std::uint8_t where[TILE_CHANNELS + 1];
            long count = 0;
            for (long c = 0; c < channels; ++c) {
                kept[count] = w[c];
                where[count] = static_cast<std::uint8_t>(c);
                count += w[c] != 0.0f;
            }
            if (!count) continue;  // of a weight of zeros the arrays are null
            const std::int64_t start = starts[tile * (R + 1) + r];
            std::memcpy(values + start, kept, count * sizeof(float));
            std::memcpy(index + start, where, count);
        }
}

// Returns 0; 1 where memory ran out; 2 where this machine lacks the path. All arrays are contiguous; bias may be null.
EXPORT int lowbit_sparse_linear(int path, int threads, long T, long C, long R, const float *x, const float *values,
                                const std::uint8_t *index, const std::int64_t *starts, const float *bias, float *y) {
    const SparsePath *chosen = select_path(path);
    if (!chosen) return 2;
    const long panels = (T + chosen->width - 1) / chosen->width;
    // Few tokens: cut the rows too, so that every thread has some of several pieces of work.
    long cuts = 1;
    while (panels * cuts < 4 * threads && R / (2 * cuts) >= 64) cuts *= 2;
    const long floats = chosen->width * (TILE_CHANNELS + (R + cuts - 1) / cuts);
    const long parts = panels * cuts < threads ? panels * cuts : threads;
    float *scratch = static_cast<float *>(std::aligned_alloc(64, (parts * floats * sizeof(float) + 63) / 64 * 64));
    if (!scratch) return 1;
    const SparseLinear problem = {T, C, R, x, values, index, starts, bias, y};
#pragma omp parallel for num_threads(parts) schedule(static)
    for (long part = 0; part < parts; ++part)
        for (long piece = panels * cuts * part / parts; piece < panels * cuts * (part + 1) / parts; ++piece) {
            const long from = T * (piece / cuts) / panels, to = T * (piece / cuts + 1) / panels, cut = piece % cuts;
            chosen->panel(problem, from, to, R * cut / cuts, R * (cut + 1) / cuts, scratch + part * floats);
        }
    std::free(scratch);
    return 0;
}
