// The sweep in AVX2 with fused multiply-add, compiled for it whatever the compiler's default; has_avx2() says who may run it.
#if defined(__x86_64__)
#include "avx2.h"

namespace {

inline ivec load_mask(const std::uint8_t *p) {
    const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p));
    return -reinterpret_cast<ivec>(_mm256_cvtepu8_epi32(raw));
}

inline void store_mask(std::uint8_t *p, ivec mask) {
    const __m256i ones = reinterpret_cast<__m256i>(mask & 1);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(ones), _mm256_extracti128_si256(ones, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i *>(p), _mm_packus_epi16(words, words));
}

inline vec round_even(vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

}  // namespace

#include "sweep_tile.h"

const Path avx2_path = {sweep_tile, TILE, SCRATCH};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
