// C entry of the sweep: pack the steps, cut R into tiles, spread them over threads.
#include <cstdlib>

#include "cpu.h"
#include "sweep.h"

namespace {

// For every panel of steps s .. s + H - 1: the H entries of U[j, s..] / U_jj for j = 0 .. s + H - 1, in the order of reading.
float *pack_steps(const float *steps, long b, long group) {
    float *packed = static_cast<float *>(std::malloc(sizeof(float) * (b * (b + PANEL) / 2 + b * PANEL)));
    float *p = packed;
    if (!packed) return nullptr;
    for (long from = 0; from < b; from += group) {
        const long to = from + group < b ? from + group : b;
        for (long s = from; s < to; s += PANEL) {
            const long height = to - s < PANEL ? to - s : PANEL;
            for (long j = 0; j < s + height; ++j)
                for (long i = 0; i < height; ++i) *p++ = steps[j * b + s + i];
        }
    }
    return packed;
}

const Path *select_path(int path) {
#ifdef LOWBIT_X86
    if (path != PORTABLE && has_avx2()) return &avx2_path;
#endif
    return path == AVX2 ? nullptr : &portable_path;
}

}  // namespace

// Returns 0; 1 where memory ran out; 2 where this machine lacks the path. All arrays are contiguous; absent ones are null.
EXPORT int lowbit_sweep(int path, int threads, long b, long R, long keep, long group, const float *W1, const float *steps,
                        const std::uint8_t *mask, const float *score, const float *scale, const float *low,
                        const float *high, float *values, std::uint8_t *kept, float *errors) {
    const Path *chosen = select_path(path);
    if (!chosen) return 2;
    if (!keep) group = b;
    const long tiles = (R + chosen->width - 1) / chosen->width;
    const long parts = tiles < threads ? tiles : threads;
    // Whole cache lines, so that no two threads write to one.
    const long scratch_bytes = (b * chosen->scratch_bytes_per_step + 63) / 64 * 64;
    float *packed = pack_steps(steps, b, group);
    char *scratch = static_cast<char *>(std::aligned_alloc(64, parts * scratch_bytes));
    const bool ready = packed && scratch;
    if (ready) {
        const Sweep sweep = {b, R, group, keep, W1, packed, mask, score, scale, low, high, values, kept, errors};
#pragma omp parallel for num_threads(parts) schedule(static)
        for (long part = 0; part < parts; ++part)
            for (long tile = tiles * part / parts; tile < tiles * (part + 1) / parts; ++tile) {
                const long row = tile * chosen->width, left = R - row;
                const long lanes = left < chosen->width ? left : chosen->width;
                chosen->tile(sweep, row, lanes, scratch + part * scratch_bytes);
            }
    }
    std::free(packed);
    std::free(scratch);
    return ready ? 0 : 1;
}
