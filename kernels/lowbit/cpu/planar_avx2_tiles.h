// What the integer linears over the planar layout in AVX2 share: how packed bytes become codes, how a tile's part is added, what is fetched
// before it is needed. Include it after avx2.h.
#pragma once
#include <cstring>
#include <utility>

#include "planar.h"

#define INLINE __attribute__((always_inline))

namespace {

constexpr long GROUPS = 32, TILE_GROUPS = 16;  // of four channels: in a unit, in a tile
constexpr long TOKENS = 4;                    // tokens that share a load of codes

template <int... I, class Use>
INLINE inline void unrolled(std::integer_sequence<int, I...>, Use use) {
    (use(std::integral_constant<int, I>{}), ...);
}

// use(0) ... use(N - 1), with constants.
template <int N, class Use>
INLINE inline void unrolled(Use use) {
    unrolled(std::make_integer_sequence<int, N>{}, use);
}

INLINE inline __m256i load_bytes(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }

// 16 int8 as words.
INLINE inline __m256i load_words(const void *p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i *>(p))); }

INLINE inline void store_bytes(void *p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i *>(p), v); }

INLINE inline __m256i broadcast_four(const void *p) {
    int four;
    std::memcpy(&four, p, sizeof four);
    return _mm256_set1_epi32(four);
}

// Four groups from 16 bytes of each of eight rows: use(i, bytes 4 i .. 4 i + 3 of all rows).
template <class Use>
INLINE inline void transposed(const std::uint8_t *p, long stride, Use use) {
    __m256i row[4];
    for (int i = 0; i < 4; ++i) {
        const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p + i * stride));
        const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p + (i + 4) * stride));
        row[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    }
    const __m256i a = _mm256_unpacklo_epi32(row[0], row[1]), b = _mm256_unpacklo_epi32(row[2], row[3]);
    const __m256i c = _mm256_unpackhi_epi32(row[0], row[1]), d = _mm256_unpackhi_epi32(row[2], row[3]);
    use(std::integral_constant<int, 0>{}, _mm256_unpacklo_epi64(a, b));
    use(std::integral_constant<int, 1>{}, _mm256_unpackhi_epi64(a, b));
    use(std::integral_constant<int, 2>{}, _mm256_unpacklo_epi64(c, d));
    use(std::integral_constant<int, 3>{}, _mm256_unpackhi_epi64(c, d));
}

// Bits of a code that are multiplied at a time, and how many such parts it has.
template <int BITS>
constexpr int DIGIT = BITS == 8 ? 4 : BITS;
template <int BITS>
constexpr int DIGITS = BITS / DIGIT<BITS>;
// Chunks of 16 bytes in a unit of the first plane. Field k of chunk q, in bits k DIGIT, is group k FIELD + 4 q + i of the unit's digits.
template <int BITS>
constexpr int CHUNKS = first_bytes(BITS) / 16;
template <int BITS>
constexpr int FIELDS = BITS >= 4 ? 2 : 4;
template <int BITS>
constexpr int FIELD = 4 * CHUNKS<BITS>;

// sum + the products of unsigned v and signed a.
INLINE inline __m256i add_words(__m256i sum, __m256i v, __m256i a) {
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(v, a));
    asm("" : "+x"(sum));  // else the compiler regroups sums, and runs out of registers
    return sum;
}

// emit(k, i, digits) for field k and group i of chunk q of eight rows at `first`. `signs`: for 3 bits, four groups of the sign plane.
template <int BITS, class Emit>
INLINE inline void spread(const std::uint8_t *first, long stride, const __m256i *signs, int q, Emit emit) {
    constexpr int SIGNS = BITS == 8 ? 0x80 : BITS == 4 ? 0x88 : 0xAA;
    const __m256i mask = _mm256_set1_epi8(BITS == 2 ? 3 : 15), sign = _mm256_set1_epi8(static_cast<char>(SIGNS));
    const __m256i two = _mm256_set1_epi8(0x33), one = _mm256_set1_epi8(0x44);
    transposed(first + 16 * q, stride, [&](auto i, __m256i x) INLINE {
        if constexpr (BITS == 3) {
            // The second chunk's channels have the odd bits of the sign plane. Even fields and odd fields become bytes of two codes.
            const __m256i s = q ? _mm256_srli_epi16(signs[i], 1) : signs[i];
            const __m256i even = _mm256_or_si256(_mm256_and_si256(x, two), _mm256_andnot_si256(_mm256_slli_epi16(s, 2), one));
            const __m256i odd = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(x, 2), two), _mm256_andnot_si256(s, one));
            emit(std::integral_constant<int, 0>{}, i, _mm256_and_si256(even, mask));
            emit(std::integral_constant<int, 1>{}, i, _mm256_and_si256(odd, mask));
            emit(std::integral_constant<int, 2>{}, i, _mm256_and_si256(_mm256_srli_epi16(even, 4), mask));
            emit(std::integral_constant<int, 3>{}, i, _mm256_and_si256(_mm256_srli_epi16(odd, 4), mask));
        } else {
            x = _mm256_xor_si256(x, sign);
            unrolled<FIELDS<BITS>>([&](auto k) INLINE { emit(k, i, _mm256_and_si256(_mm256_srli_epi16(x, DIGIT<BITS> * k), mask)); });
        }
    });
}

// The sign plane of a unit, in groups.
template <int BITS>
INLINE inline void spread_signs(const std::uint8_t *second, long stride, __m256i (&signs)[4]) {
    if constexpr (BITS == 3) transposed(second, stride, [&](auto i, __m256i x) INLINE { signs[i] = x; });
}

// Scales, zero points and sums of eight rows at `place` in a block's tables.
INLINE inline vec scales(const PlanarBlock &w, long place) {
    const std::uint8_t *p = w.scale + w.scale_bytes() * place;
    if (w.wide) return load(reinterpret_cast<const float *>(p));
    // Exponents are 112 less in float16. Without F16C, which not every hypervisor shows beside AVX2.
    const __m256i half = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    return _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(half, 13)), broadcast(0x1p112f));
}

INLINE inline vec zeros(const PlanarBlock &w, long place) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(w.zero + place))));
}

INLINE inline vec tile_sums(const PlanarBlock &w, long place) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(w.sum + place))));
}

// step dot plus what zero points and shifts make of a tile of eight rows at `place`, to be scaled.
INLINE inline vec with_offsets(const PlanarActivations &x, const PlanarBlock &w, long t, long g, long place, vec sum) {
    const long grid = t * x.grid_stride + g;
    if (w.zero) sum = fnmadd(zeros(w, place), broadcast(x.count[t * x.tiles + g]), sum);
    if (x.shift && x.shift[grid] != 0) sum = fmadd(tile_sums(w, place), broadcast(x.shift[grid]), sum);
    return sum;
}

INLINE inline vec stepped(const PlanarActivations &x, long t, long g, __m256i dot) {
    return _mm256_mul_ps(_mm256_cvtepi32_ps(dot), broadcast(x.step[t * x.grid_stride + g]));
}

// low and high += a tile's part of 16 rows.
INLINE inline void add_tile_of_rows(const PlanarActivations &x, const PlanarBlock &w, long t, long g, const __m256i (&dot)[2], vec &low,
                                    vec &high) {
    const long place = g * PLANAR_ROWS, grid = t * x.grid_stride + g, own = t * x.tiles + g;
    const __m256i excess = _mm256_set1_epi32(x.excess[own]);
    vec a = stepped(x, t, g, _mm256_sub_epi32(dot[0], excess)), b = stepped(x, t, g, _mm256_sub_epi32(dot[1], excess));
    if (w.zero) {
        const vec count = broadcast(x.count[own]);
        a = fnmadd(zeros(w, place), count, a);
        b = fnmadd(zeros(w, place + 8), count, b);
    }
    if (x.shift && x.shift[grid] != 0) {
        const vec shift = broadcast(x.shift[grid]);
        a = fmadd(tile_sums(w, place), shift, a);
        b = fmadd(tile_sums(w, place + 8), shift, b);
    }
    low = fmadd(a, scales(w, place), low);
    high = fmadd(b, scales(w, place + 8), high);
}

// What the next block of rows holds is fetched while this one is multiplied: in the order of memory, and a few lines at a time, because a
// core waits when it has asked for more than it can keep track of.
template <int N>
INLINE inline void fetch_lines(const void *p) {
    for (int i = 0; i < N; ++i) _mm_prefetch(static_cast<const char *>(p) + 64 * i, _MM_HINT_T1);
}

// Unit u's part of the tables.
INLINE inline void fetch_tables(const PlanarBlock &w, bool shift, long u) {
    const long place = 2 * PLANAR_ROWS * u;
    const std::uint8_t *scale = w.scale + w.next + w.scale_bytes() * place;
    fetch_lines<1>(scale);
    if (w.wide) fetch_lines<1>(scale + 64);
    if (w.zero && u % 2 == 0) fetch_lines<1>(w.zero + w.next + place);
    if (shift) fetch_lines<1>(reinterpret_cast<const std::uint8_t *>(w.sum + place) + w.next);
}

}  // namespace
