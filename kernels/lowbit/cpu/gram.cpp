// C entry of the Gram matrix: cut x into panels of channels, spread pairs of panels over threads.
#include "gram.h"

#include <cstdlib>

namespace {

// panels[p][t][c] = x[t][p PANEL_CHANNELS + c], channels beyond C are 0.
void cut_panel(long T, long C, const float *x, long p, float *panel) {
    const long first = p * PANEL_CHANNELS;
    const long channels = C - first < PANEL_CHANNELS ? C - first : PANEL_CHANNELS;
    for (long t = 0; t < T; ++t) {
        for (long c = 0; c < channels; ++c) panel[t * PANEL_CHANNELS + c] = x[t * C + first + c];
        for (long c = channels; c < PANEL_CHANNELS; ++c) panel[t * PANEL_CHANNELS + c] = 0.0f;
    }
}

void add_pair(long C, const float *sums, long p, long q, double *upper) {
    const long row = p * PANEL_CHANNELS, column = q * PANEL_CHANNELS;
    for (long i = 0; i < PANEL_CHANNELS && row + i < C; ++i)
        for (long j = 0; j < PANEL_CHANNELS && column + j < C; ++j)
            upper[(row + i) * C + column + j] += sums[i * PANEL_CHANNELS + j];
}

}  // namespace

// upper [C, C] += x^T x for x [T, C], in its upper half and a little of the lower. Returns 0; 1 where memory ran out; 2 without AVX2.
EXPORT int lowbit_add_gram(int threads, long T, long C, const float *x, double *upper) {
#ifdef LOWBIT_X86
    if (!has_avx2()) return 2;
    const long count = (C + PANEL_CHANNELS - 1) / PANEL_CHANNELS, size = T * PANEL_CHANNELS;
    float *panels = static_cast<float *>(std::aligned_alloc(64, (count * size * sizeof(float) + 63) / 64 * 64));
    if (!panels) return 1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long p = 0; p < count; ++p) cut_panel(T, C, x, p, panels + p * size);
        // Pairs beside each other share their first panel, which then comes from the second-level cache.
#pragma omp for schedule(dynamic, 4)
        for (long pair = 0; pair < count * (count + 1) / 2; ++pair) {
            long p = 0, before = 0;
            for (; before + count - p <= pair; ++p) before += count - p;
            const long q = p + pair - before;
            alignas(64) float sums[PANEL_CHANNELS * PANEL_CHANNELS];
            gram_of_panels_avx2(panels + p * size, panels + q * size, T, sums);
            add_pair(C, sums, p, q, upper);
        }
    }
    std::free(panels);
    return 0;
#else
    return 2;
#endif
}
