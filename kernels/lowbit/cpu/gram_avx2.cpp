// The product of two panels in AVX2 with fused multiply-add; has_avx2() says who may run it.
#if defined(__x86_64__)
#include "avx2.h"
#include "gram.h"

namespace {

constexpr long LANES = sizeof(vec) / sizeof(float);
constexpr int HIGH = 4, WIDE = PANEL_CHANNELS / LANES;  // sums in registers: 4 x 3 vectors, beside 3 of b and 1 of a

// HIGH rows of sums, over tokens [from, to).
void add_rows(const float *a, const float *b, long from, long to, float *sums) {
    vec sum[HIGH][WIDE];
    for (int i = 0; i < HIGH; ++i)
        for (int j = 0; j < WIDE; ++j) sum[i][j] = load(sums + i * PANEL_CHANNELS + j * LANES);
    for (long t = from; t < to; ++t) {
        vec right[WIDE];
        for (int j = 0; j < WIDE; ++j) right[j] = load(b + t * PANEL_CHANNELS + j * LANES);
        for (int i = 0; i < HIGH; ++i) {
            const vec left = broadcast(a[t * PANEL_CHANNELS + i]);
            for (int j = 0; j < WIDE; ++j) sum[i][j] = fmadd(left, right[j], sum[i][j]);
        }
    }
    for (int i = 0; i < HIGH; ++i)
        for (int j = 0; j < WIDE; ++j) store(sums + i * PANEL_CHANNELS + j * LANES, sum[i][j]);
}

}  // namespace

void gram_of_panels_avx2(const float *a, const float *b, long T, float *sums) {
    for (long i = 0; i < PANEL_CHANNELS * PANEL_CHANNELS; ++i) sums[i] = 0.0f;
    for (long from = 0; from < T; from += TOKENS) {
        const long to = from + TOKENS < T ? from + TOKENS : T;
        for (long i = 0; i < PANEL_CHANNELS; i += HIGH) add_rows(a + i, b, from, to, sums + i * PANEL_CHANNELS);
    }
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
