// The integer linear over the planar layout for one token, in AVX2. Include it after planar_avx2_tiles.h.
//
// A row's codes are multiplied as they lie, and its products stay apart in eight sums until the last channel: scaled one tile after the
// other, and added up once. What zero points, shifts and unsigned codes add to a tile is taken for sixteen rows at a time before that.
#pragma once

namespace {

constexpr long AT_ONCE = 32;  // units whose scaled steps are kept at a time
constexpr long TOGETHER = 4;  // rows that share a load of activations

// A unit's activations in the order of its codes: bytes, or for 8-bit codes words, two int8 codes a number where there are two terms, the
// first worth 254 of the second.
template <int BITS>
struct Unit {
    __m256i a[BITS == 8 ? 8 : 4];
};

template <int BITS>
INLINE inline Unit<BITS> unit_of(const PlanarActivations &x, long u, long t) {
    const std::int8_t *p = x.packed + (u * x.T + t) * PLANAR_UNIT;
    Unit<BITS> unit;
    if constexpr (BITS < 8) {
        for (int k = 0; k < 4; ++k) unit.a[k] = load_bytes(p + 32 * k);
    } else {
        for (int k = 0; k < 8; ++k) {
            const __m256i first = load_words(p + 16 * k);
            unit.a[k] = x.T == 1 ? first : _mm256_add_epi16(_mm256_mullo_epi16(first, _mm256_set1_epi16(254)), load_words(p + PLANAR_UNIT + 16 * k));
        }
    }
    return unit;
}

INLINE inline __m256i two_products(__m256i v, __m256i a, __m256i w, __m256i b) {
    return _mm256_add_epi16(_mm256_maddubs_epi16(v, a), _mm256_maddubs_epi16(w, b));
}

// Both tiles' products of a row's unit in eight sums of 32 bits each. Codes below 8 bits are made unsigned.
template <int BITS>
INLINE inline void row_dots(const std::uint8_t *first, const std::uint8_t *second, const Unit<BITS> &x, __m256i (&dot)[2]) {
    const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15);
    __m256i v[4];  // a quarter of the channels each
    if constexpr (BITS == 8) {
        for (int tile = 0; tile < 2; ++tile) {
            dot[tile] = _mm256_madd_epi16(load_words(first + 64 * tile), x.a[4 * tile]);
            for (int k = 1; k < 4; ++k)
                dot[tile] = _mm256_add_epi32(dot[tile], _mm256_madd_epi16(load_words(first + 64 * tile + 16 * k), x.a[4 * tile + k]));
        }
        return;
    } else if constexpr (BITS == 4) {
        for (int k = 0; k < 2; ++k) {
            const __m256i w = _mm256_xor_si256(load_bytes(first + 32 * k), _mm256_set1_epi8(static_cast<char>(0x88)));
            v[k] = _mm256_and_si256(w, low);
            v[2 + k] = _mm256_and_si256(_mm256_srli_epi16(w, 4), low);
        }
    } else if constexpr (BITS == 3) {
        // Channels 16 to 31 of each quarter have the odd bits of the sign plane. Even quarters and odd ones become bytes of two codes.
        const __m256i w = load_bytes(first), two = _mm256_set1_epi8(0x33), one = _mm256_set1_epi8(0x44);
        const __m256i signs = _mm256_srlv_epi32(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(second))),
                                                _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
        const __m256i even = _mm256_or_si256(_mm256_and_si256(w, two), _mm256_andnot_si256(_mm256_slli_epi16(signs, 2), one));
        const __m256i odd = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(w, 2), two), _mm256_andnot_si256(signs, one));
        v[0] = _mm256_and_si256(even, low);
        v[1] = _mm256_and_si256(odd, low);
        v[2] = _mm256_and_si256(_mm256_srli_epi16(even, 4), low);
        v[3] = _mm256_and_si256(_mm256_srli_epi16(odd, 4), low);
    } else {
        const __m256i w = _mm256_xor_si256(load_bytes(first), _mm256_set1_epi8(static_cast<char>(0xAA)));
        for (int k = 0; k < 4; ++k) v[k] = _mm256_and_si256(_mm256_srli_epi16(w, 2 * k), _mm256_set1_epi8(3));
    }
    if constexpr (BITS < 8)
        for (int tile = 0; tile < 2; ++tile)
            dot[tile] = _mm256_madd_epi16(two_products(v[2 * tile], x.a[2 * tile], v[2 * tile + 1], x.a[2 * tile + 1]), ones);
}

// Scale times step of token t in tiles [from, to) of 16 rows -> scaled [to - from, PLANAR_ROWS]; what the tiles' other terms add -> sums.
// Where there are two terms and codes of 8 bits, t is the last: its step is that of the words.
template <int BITS>
INLINE inline void scale_steps(const PlanarActivations &x, const PlanarBlock &w, long t, long from, long to, float *scaled, vec (&sums)[2]) {
    for (long g = from; g < to; ++g, scaled += PLANAR_ROWS) {
        const vec step = broadcast(x.step[t * x.grid_stride + g]);
        const float excess = BITS == 8 ? 0.0f : x.step[t * x.grid_stride + g] * static_cast<float>(x.excess[t * x.tiles + g]);
        for (int half = 0; half < 2; ++half) {
            const long place = g * PLANAR_ROWS + 8 * half;
            const vec scale = scales(w, place);
            store(scaled + 8 * half, _mm256_mul_ps(scale, step));
            vec more = broadcast(-excess);
            for (long i = BITS == 8 ? 0 : t; i <= t; ++i) more = with_offsets(x, w, i, g, place, more);
            sums[half] = fmadd(scale, more, sums[half]);
        }
    }
}

// lanes[r] += units [from, to) of row `row` + r for TOGETHER rows; `scaled` is those rows' and the first unit's.
template <int BITS>
INLINE inline void add_rows(const PlanarActivations &x, const PlanarBlock &w, long t, long row, long from, long to, const float *scaled,
                            vec *lanes) {
    constexpr long A = first_bytes(BITS), B = second_bytes(BITS);
    const long units = x.tiles / 2, a = units * A, b = units * B;
    const std::uint8_t *first = w.first + row * a + from * A, *second = w.second + row * b + from * B;
    // What comes later is fetched in the order of memory.
    const std::uint8_t *next = w.first + (PLANAR_ROWS + row) * a + TOGETHER * from * A;
    const std::uint8_t *next_second = w.second + (PLANAR_ROWS + row) * b + TOGETHER * from * B;
    const long sums = x.shift ? 0 : x.tiles * PLANAR_ROWS * static_cast<long>(sizeof(std::int16_t));  // not read
    const long table = (w.next - sums) * TOGETHER / (PLANAR_ROWS * units);
    const std::uint8_t *next_table = w.scale + w.next + (row / TOGETHER * units + from) * table;
    vec sum[TOGETHER];
    for (int r = 0; r < TOGETHER; ++r) sum[r] = lanes[r];
    for (long u = from; u < to; ++u, first += A, second += B, scaled += 2 * PLANAR_ROWS) {
        const Unit<BITS> unit = unit_of<BITS>(x, u, t);
        if (B) fetch_lines<1>(next_second);
        fetch_lines<1>(next_table);
#pragma GCC unroll 4
        for (int r = 0; r < TOGETHER; ++r) {
            if (r * A % 64 == 0) fetch_lines<(A + 63) / 64>(next + r * A);
            __m256i dot[2];
            row_dots<BITS>(first + r * a, second + r * b, unit, dot);
            for (int tile = 0; tile < 2; ++tile) sum[r] = fmadd(_mm256_cvtepi32_ps(dot[tile]), broadcast(scaled[tile * PLANAR_ROWS + r]), sum[r]);
        }
        next += TOGETHER * A, next_second += TOGETHER * B, next_table += table;
    }
    for (int r = 0; r < TOGETHER; ++r) lanes[r] = sum[r];
}

// The sum of the entries of each of eight vectors.
INLINE inline vec eight_sums(const vec *lanes) {
    vec four[2];
    for (int i = 0; i < 2; ++i) {
        const vec *p = lanes + 4 * i;
        four[i] = _mm256_hadd_ps(_mm256_hadd_ps(p[0], p[1]), _mm256_hadd_ps(p[2], p[3]));
    }
    return _mm256_add_ps(_mm256_permute2f128_ps(four[0], four[1], 0x20), _mm256_permute2f128_ps(four[0], four[1], 0x31));
}

// sums += 16 rows times the only token, all its terms.
template <int BITS>
__attribute__((noinline)) void one_token(const PlanarActivations &x, const PlanarBlock &w, float *sums) {
    alignas(32) float scaled[2 * AT_ONCE * PLANAR_ROWS];
    const long units = x.tiles / 2;
    vec y[2] = {load(sums), load(sums + 8)}, lanes[PLANAR_ROWS];
    for (vec &lane : lanes) lane = _mm256_setzero_ps();
    for (long t = BITS == 8 ? x.T - 1 : 0; t < x.T; ++t)
        for (long from = 0; from < units; from += AT_ONCE) {
            const long to = from + AT_ONCE < units ? from + AT_ONCE : units;
            scale_steps<BITS>(x, w, t, 2 * from, 2 * to, scaled, y);
            for (long row = 0; row < PLANAR_ROWS; row += TOGETHER)
                add_rows<BITS>(x, w, BITS == 8 ? 0 : t, row, from, to, scaled + row, lanes + row);
        }
    for (int half = 0; half < 2; ++half) store(sums + 8 * half, _mm256_add_ps(y[half], eight_sums(lanes + 8 * half)));
}

}  // namespace
