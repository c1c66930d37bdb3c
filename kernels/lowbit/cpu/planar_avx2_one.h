// The integer linear over the planar layout for one token, in AVX2. Include it after planar_avx2_tiles.h.
//
// 8-bit codes are multiplied as they lie by words, row by row, and eight rows' sums are transposed once a tile. Packed codes are
// transposed before they are taken apart, which costs less than to transpose their sums.
#pragma once

namespace {

// Two rows' sums of 32 bits: each entry of 64 bits holds one of each.
INLINE inline __m256i pair_up(__m256i a, __m256i b) { return _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b)); }

// Eight rows' sums, from two rows in each of `pair`.
INLINE inline __m256i eight_sums(const __m256i (&pair)[4]) {
    __m128i four[2];
    for (int i = 0; i < 2; ++i) {
        const __m256i low = _mm256_unpacklo_epi64(pair[2 * i], pair[2 * i + 1]), high = _mm256_unpackhi_epi64(pair[2 * i], pair[2 * i + 1]);
        const __m256i sums = _mm256_add_epi32(low, high);
        four[i] = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    }
    return _mm256_inserti128_si256(_mm256_castsi128_si256(four[0]), four[1], 1);
}

// use(i, two of eight rows) for i of 0 to 3.
template <class Use>
INLINE inline void row_pairs(const std::uint8_t *p, long stride, Use use) {
    const std::uint8_t *q = p + 4 * stride;
    asm("" : "+r"(q));  // else each row's address takes a register of its own
    use(std::integral_constant<int, 0>{}, p, p + stride);
    use(std::integral_constant<int, 1>{}, p + 2 * stride, p + 3 * stride);
    use(std::integral_constant<int, 2>{}, q, q + stride);
    use(std::integral_constant<int, 3>{}, q + 2 * stride, q + 3 * stride);
}

// One tile's activations of 16 bits, two int8 codes a number where there are two terms, the first worth 254 of the second.
struct Words {
    __m256i even[2], odd[2], excess;
};

INLINE inline Words words_of(const PlanarActivations &x, long tile) {
    Words all;
    const __m256i ones = _mm256_set1_epi16(1), worth = _mm256_set1_epi16(254);
    __m256i sum = _mm256_setzero_si256();
    for (int k = 0; k < 2; ++k) {
        for (long t = 0; t < x.T; ++t) {
            const __m256i a = load_bytes(x.packed + (tile / 2 * x.T + t) * PLANAR_UNIT + tile % 2 * PLANAR_TILE + 32 * k);
            const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8), odd = _mm256_srai_epi16(a, 8);
            all.even[k] = t ? _mm256_add_epi16(_mm256_mullo_epi16(all.even[k], worth), even) : even;
            all.odd[k] = t ? _mm256_add_epi16(_mm256_mullo_epi16(all.odd[k], worth), odd) : odd;
        }
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(all.even[k], ones));
    }
    std::int32_t each[8], total = 0;
    store_bytes(each, sum);
    for (int i = 0; i < 8; ++i) total += each[i];
    all.excess = _mm256_set1_epi32(128 * total);
    return all;
}

// Sums of 32 bits of one row's tile: a whole tile adds at most 64 * 255 * 32385 < 2^30. Codes of even channels are made unsigned.
INLINE inline __m256i byte_sums(const std::uint8_t *p, const Words &a) {
    const __m256i sign = _mm256_set1_epi16(0x80), mask = _mm256_set1_epi16(0xFF);
    __m256i sum = _mm256_setzero_si256();
    for (int k = 0; k < 2; ++k) {
        const __m256i x = load_bytes(p + 32 * k), even = _mm256_and_si256(_mm256_xor_si256(x, sign), mask);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, a.even[k]));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_srai_epi16(x, 8), a.odd[k]));
    }
    return sum;
}

INLINE inline vec add_tile_of_bytes(const PlanarActivations &x, const PlanarBlock &w, long row, long tile, const Words &a, vec y) {
    const long stride = x.tiles * PLANAR_TILE;
    __m256i pair[4];
    const std::uint8_t *next = w.first + PLANAR_ROWS * (stride + tile * PLANAR_TILE) + row * PLANAR_TILE;
    row_pairs(w.first + row * stride + tile * PLANAR_TILE, stride, [&](auto i, const std::uint8_t *even, const std::uint8_t *odd) INLINE {
        fetch_lines<2>(next + 128 * i);
        pair[i] = pair_up(byte_sums(even, a), byte_sums(odd, a));
    });
    const long place = tile * PLANAR_ROWS + row;
    // The last term's step is that of its units.
    vec sum = stepped(x, x.T - 1, tile, _mm256_sub_epi32(eight_sums(pair), a.excess));
    for (long t = 0; t < x.T; ++t) sum = with_offsets(x, w, t, tile, place, sum);
    return fmadd(sum, scales(w, place), y);
}

// Both tiles' dots of the unit at `place` of eight rows with one token, for packed codes. `ahead`: the place whose bytes to fetch.
template <int BITS>
INLINE inline void unit_dots(const PlanarBlock &w, long units, long place, long ahead, const std::int8_t *a, __m256i (&dot)[2]) {
    constexpr long A = first_bytes(BITS), B = second_bytes(BITS);
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i signs[4];
    spread_signs<BITS>(w.second + place * B, units * B, signs);
    if (B) fetch_lines<2>(w.second + ahead * B);
    dot[0] = dot[1] = _mm256_setzero_si256();
    // Sums of two chunks fit 16 bits.
#pragma GCC unroll 2
    for (int round = 0; round < CHUNKS<BITS>; round += 2) {
        __m256i sum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
#pragma GCC unroll 2
        for (int q = round; q < round + 2; ++q) {
            const std::int8_t *entry = a + 16 * q;
            fetch_lines<2>(w.first + ahead * A + 128 * q);
            asm("" : "+r"(entry));  // else broadcasts are kept for the other eight rows, on the stack, where storing them costs more
            spread<BITS>(w.first + place * A, units * A, signs, q, [&](auto k, auto i, __m256i v) INLINE {
                constexpr int which = 2 * k / FIELDS<BITS>;
                sum[which] = add_words(sum[which], v, broadcast_four(entry + 4 * (FIELD<BITS> * k + i)));
            });
        }
        for (int tile = 0; tile < 2; ++tile) dot[tile] = _mm256_add_epi32(dot[tile], _mm256_madd_epi16(sum[tile], ones));
    }
}

template <int BITS>
INLINE inline vec add_unit_of_digits(const PlanarActivations &x, const PlanarBlock &w, long row, long u, long t, vec y) {
    const long units = x.tiles / 2, ahead = PLANAR_ROWS * (units + u) + row;
    __m256i dot[2];
    unit_dots<BITS>(w, units, row * units + u, ahead, x.packed + (u * x.T + t) * PLANAR_UNIT, dot);
    for (int tile = 0; tile < 2; ++tile) y = add_tile(x, w, t, 2 * u + tile, row, dot[tile], y);
    return y;
}

// sums += 16 rows times the only token, all its terms.
template <int BITS>
__attribute__((noinline)) void one_token(const PlanarActivations &x, const PlanarBlock &w, float *sums) {
    const long units = x.tiles / 2;
    vec y[2] = {load(sums), load(sums + 8)};
    for (long u = 0; u < units; ++u) {
        fetch_tables(w, x.shift, u);
        if constexpr (BITS == 8) {
            for (long tile = 2 * u; tile < 2 * u + 2; ++tile) {
                const Words a = words_of(x, tile);
                for (int half = 0; half < 2; ++half) y[half] = add_tile_of_bytes(x, w, 8 * half, tile, a, y[half]);
            }
        } else {
            for (long t = 0; t < x.T; ++t)
                for (int half = 0; half < 2; ++half) y[half] = add_unit_of_digits<BITS>(x, w, 8 * half, u, t, y[half]);
        }
    }
    store(sums, y[0]);
    store(sums + 8, y[1]);
}

}  // namespace
