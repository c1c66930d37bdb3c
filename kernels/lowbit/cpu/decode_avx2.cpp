// A step of decoding in AVX2; has_avx2() says who may run it.
#if defined(__x86_64__)
#include <cmath>
#include <cstring>

#include "decode.h"
// After all others.
#include "avx2.h"

namespace {

// Eight codes from BITS bytes, as numbers. May read four bytes where BITS is less.
template <int BITS>
inline void codes8(const std::uint8_t *p, vec (&x)[1]) {
    if (BITS == 8) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p));
        x[0] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
        return;
    }
    int word;
    std::memcpy(&word, p, sizeof word);
    const __m256i shifts = _mm256_setr_epi32(0, BITS, 2 * BITS, 3 * BITS, 4 * BITS, 5 * BITS, 6 * BITS, 7 * BITS);
    const __m256i codes = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(word), shifts), _mm256_set1_epi32((1 << BITS) - 1));
    x[0] = _mm256_cvtepi32_ps(codes);
}

void add_across(const vec *v, float *sums) {
    const vec pairs = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}

}  // namespace

#include "decode_math.h"
#include "decode_panel.h"

const DecodePath avx2_decode_path = {norm, rotate, activate, score, mix, append, attend_panel};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
