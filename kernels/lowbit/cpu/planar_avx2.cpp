// The integer linear over the planar layout in AVX2; has_avx2() says who may run it.
//
// For several tokens eight rows lie across a vector, four channels of each: a group of 32 bytes. Packed bytes are transposed into that order before they are
// taken apart, so that a vector of sums needs no reduction and meets its rows' scales as they are stored. Codes are made unsigned,
// v + 2^(b-1), for the instruction that multiplies unsigned by signed bytes; what that adds to a tile is its sum of activations times
// 2^(b-1), which is taken off in whole numbers. The instruction's sums of 16 bits never saturate: eight groups add at most
// 8 * 2 * 15 * 128 = 30720, sixteen of 3-bit codes 28672. 8-bit codes are taken as two of 4 bits, the second worth 16.
#if defined(__x86_64__)
#include <cstring>

#include "planar.h"
// After all others.
#include "avx2.h"
#include "planar_avx2_tiles.h"
#include "planar_avx2_one.h"

namespace {

// packed [units, T, PLANAR_UNIT], so that tokens lie beside each other.
void pack(const PlanarActivations &x, int bits, long from, long to) {
    const long units = x.tiles / 2;
    for (long t = from; t < to; ++t) {
        const std::int8_t *a = x.a + t * x.tiles * PLANAR_TILE;
        for (long u = 0; u < units; ++u) std::memcpy(x.packed + (u * x.T + t) * PLANAR_UNIT, a + u * PLANAR_UNIT, PLANAR_UNIT);
        for (long g = 0; g < x.tiles; ++g) {
            std::int32_t sum = 0;
            for (long c = 0; c < PLANAR_TILE; ++c) sum += a[g * PLANAR_TILE + c];
            x.excess[t * x.tiles + g] = sum * (1 << (bits - 1));
        }
    }
}

// A unit of 16 rows as groups of digits, 32 bytes each: [2][DIGITS][GROUPS].
template <int BITS>
__attribute__((noinline)) void spread_block(const PlanarBlock &w, long units, long u, std::uint8_t *codes) {
    constexpr long A = first_bytes(BITS), B = second_bytes(BITS);
    for (int half = 0; half < 2; ++half) {
        const long place = 8 * half * units + u;
        __m256i signs[4];
        spread_signs<BITS>(w.second + place * B, units * B, signs);
        if (B) fetch_lines<2>(w.second + (PLANAR_ROWS * (units + u) + 8 * half) * B);
#pragma GCC unroll 1
        for (int q = 0; q < CHUNKS<BITS>; ++q) {
            fetch_lines<2>(w.first + (PLANAR_ROWS * (units + u) + 8 * half) * A + 128 * q);
            spread<BITS>(w.first + place * A, units * A, signs, q, [&](auto k, auto i, __m256i v) INLINE {
                store_bytes(codes + 32 * (half * DIGITS<BITS> * GROUPS + FIELD<BITS> * k + 4 * q + i), v);
            });
        }
    }
}

// One tile's dots of 16 rows, `codes` of the first eight, with N tokens at `a`.
template <int BITS, int N>
INLINE inline void tile_dots(const std::uint8_t *codes, const std::int8_t *a, __m256i (&dot)[N][2]) {
    constexpr int PARTS = BITS >= 4 ? 2 : 1, STEPS = TILE_GROUPS / PARTS;  // groups whose sums fit 16 bits
    unrolled<PARTS * DIGITS<BITS>>([&](auto round) INLINE {
        constexpr int part = round % PARTS, digit = round / PARTS;
        const std::uint8_t *p = codes + 32 * (digit * GROUPS + part * STEPS);
        const std::int8_t *entry = a + 4 * part * STEPS;
        __m256i sum[N][2];
        unrolled<N>([&](auto n) INLINE { sum[n][0] = sum[n][1] = _mm256_setzero_si256(); });
        for (int i = 0; i < STEPS; ++i) {
            const __m256i low = load_bytes(p + 32 * i), high = load_bytes(p + 32 * (i + DIGITS<BITS> * GROUPS));
            unrolled<N>([&](auto n) INLINE {
                const __m256i four = broadcast_four(entry + n * PLANAR_UNIT + 4 * i);
                sum[n][0] = add_words(sum[n][0], low, four);
                sum[n][1] = add_words(sum[n][1], high, four);
            });
        }
        const __m256i worth = _mm256_set1_epi16(digit ? 16 : 1);
        unrolled<2 * N>([&](auto j) INLINE {
            __m256i &to = dot[j / 2][j % 2], s = _mm256_madd_epi16(sum[j / 2][j % 2], worth);
            to = round ? _mm256_add_epi32(to, s) : s;
        });
    });
}

// sums[n] += a unit's part, tokens t .. t + N - 1. Both tiles' dots come first: what is done to them then needs a token's sums once.
template <int BITS, int N>
__attribute__((noinline)) void add_unit(const PlanarActivations &x, const PlanarBlock &w, const std::uint8_t *codes, long u, long t,
                                        float *sums) {
    const std::int8_t *a = x.packed + (u * x.T + t) * PLANAR_UNIT;
    __m256i dot[2][N][2];
    for (int tile = 0; tile < 2; ++tile) tile_dots<BITS, N>(codes + tile * TILE_GROUPS * 32, a + tile * PLANAR_TILE, dot[tile]);
    for (int n = 0; n < N; ++n, sums += PLANAR_ROWS) {
        vec low = load(sums), high = load(sums + 8);
        unrolled<2>([&](auto tile) INLINE { add_tile_of_rows(x, w, t + n, 2 * u + tile, dot[tile][n], low, high); });
        store(sums, low);
        store(sums + 8, high);
    }
}

// Tokens [from, to), at most PLANAR_TOKENS.
template <int BITS>
void many_tokens(const PlanarActivations &x, const PlanarBlock &w, long from, long to, float *sums) {
    alignas(32) std::uint8_t codes[2 * DIGITS<BITS> * GROUPS * 32];
    const long units = x.tiles / 2;
    for (long u = 0; u < units; ++u) {
        fetch_tables(w, x.shift, u);
        spread_block<BITS>(w, units, u, codes);
        for (long t = from; t < to; t += TOKENS) {
            float *s = sums + (t - from) * PLANAR_ROWS;
            switch (to - t) {
                case 1: add_unit<BITS, 1>(x, w, codes, u, t, s); break;
                case 2: add_unit<BITS, 2>(x, w, codes, u, t, s); break;
                case 3: add_unit<BITS, 3>(x, w, codes, u, t, s); break;
                default: add_unit<BITS, TOKENS>(x, w, codes, u, t, s);
            }
        }
    }
}

template <int BITS>
void block_of_rows(const PlanarActivations &x, const PlanarBlock &w, long rows, long from, long to, float *y, long R) {
    alignas(32) float sums[PLANAR_TOKENS * PLANAR_ROWS];
    const long tokens = x.T / x.terms;
    const bool one = tokens == 1;
    if (one) to = from + 1;
    for (long t = from; t < to; ++t)
        for (long r = 0; r < PLANAR_ROWS; ++r) sums[(t - from) * PLANAR_ROWS + r] = w.bias && t < tokens ? w.bias[r] : 0.0f;
    if (one) one_token<BITS>(x, w, sums);
    else many_tokens<BITS>(x, w, from, to, sums);
    for (long t = from; t < to; ++t)
        for (long r = 0; r < rows; ++r) {
            const float sum = sums[(t - from) * PLANAR_ROWS + r];
            float &place = y[t % tokens * R + r];
            place = t < tokens ? sum : place + sum;
        }
}

void planar_rows(const PlanarActivations &x, int bits, const PlanarBlock &w, long rows, long from, long to, float *y, long R) {
    switch (bits) {
        case 2: return block_of_rows<2>(x, w, rows, from, to, y, R);
        case 3: return block_of_rows<3>(x, w, rows, from, to, y, R);
        case 4: return block_of_rows<4>(x, w, rows, from, to, y, R);
        default: return block_of_rows<8>(x, w, rows, from, to, y, R);
    }
}

bool extremes(const float *x, long n, float *low, float *high) {
    vec least = _mm256_setzero_ps(), most = least, nan = least;
    alignas(32) float rest[8] = {};
    std::memcpy(rest, x + n / 8 * 8, n % 8 * sizeof(float));
    for (long i = 0; i <= n / 8; ++i) {
        const vec v = i < n / 8 ? load(x + 8 * i) : load(rest);
        least = _mm256_min_ps(v, least), most = _mm256_max_ps(v, most);
        nan = _mm256_or_ps(nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    }
    *low = *high = 0;
    for (int i = 0; i < 8; ++i) {
        *low = least[i] < *low ? least[i] : *low;
        *high = most[i] > *high ? most[i] : *high;
    }
    return _mm256_movemask_ps(nan) != 0;
}

bool codes(const float *x, long n, float scale, float zero, float top, float offset, std::int8_t *a) {
    alignas(32) float rest[PLANAR_TILE] = {};
    if (n < PLANAR_TILE) x = static_cast<const float *>(std::memcpy(rest, x, n * sizeof(float)));
    const vec s = broadcast(scale), z = broadcast(zero), t = broadcast(top), o = broadcast(offset);
    int nan = 0;
    for (long i = 0; i < PLANAR_TILE; i += 8) {
        const vec v = load(x + i), number = _mm256_cmp_ps(v, v, _CMP_ORD_Q);
        const vec level = _mm256_round_ps(_mm256_div_ps(v, s), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const vec q = _mm256_min_ps(_mm256_max_ps(_mm256_add_ps(level, z), _mm256_setzero_ps()), t);
        const __m256i code = _mm256_cvtps_epi32(_mm256_and_ps(_mm256_sub_ps(q, o), number));
        nan |= ~_mm256_movemask_ps(number) & 255;
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i *>(a + i), _mm_packs_epi16(words, words));
    }
    if (n < PLANAR_TILE) std::memset(a + n, 0, PLANAR_TILE - n);
    return nan != 0;
}

}  // namespace

const PlanarPath avx2_planar_path = {pack, planar_rows, extremes, codes};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
