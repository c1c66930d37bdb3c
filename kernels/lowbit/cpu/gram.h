// sum of x x^T over tokens: what its C entry hands to the kernel.
#pragma once
#include "cpu.h"

// Channels in a panel: three vectors. Tokens that are summed while two panels' parts of them stay in the first-level cache.
constexpr long PANEL_CHANNELS = 24, TOKENS = 128;

#ifdef LOWBIT_X86
// sums[i][j] = sum over t < T of a[t][i] b[t][j], PANEL_CHANNELS squared; a and b are panels [T, PANEL_CHANNELS].
void gram_of_panels_avx2(const float *a, const float *b, long T, float *sums);
#endif
