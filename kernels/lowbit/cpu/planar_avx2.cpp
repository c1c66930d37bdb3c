// The integer linear over the planar layout in AVX2; has_avx2() says who may run it.
//
// Eight rows lie across a vector, four channels of each: a group of 32 bytes. Packed bytes are transposed into that order before they are
// taken apart, so that a vector of sums needs no reduction and meets its rows' scales as they are stored. Codes are made unsigned,
// v + 2^(b-1), for the instruction that multiplies unsigned by signed bytes; what that adds to a tile is its sum of activations times
// 2^(b-1), which is taken off in whole numbers. The instruction's sums of 16 bits never saturate: eight groups add at most
// 8 * 2 * 15 * 128 = 30720, sixteen of 3-bit codes 28672. 8-bit codes are taken as two of 4 bits, the second worth 16.
#if defined(__x86_64__)
#include <cstring>
#include <utility>

#include "planar.h"
// After all others.
#include "avx2.h"

#define INLINE __attribute__((always_inline))

namespace {

constexpr long GROUPS = 32, TILE_GROUPS = 16;  // of four channels: in a unit, in a tile
constexpr long TOKENS = 4, TOKEN_BLOCK = 64;   // tokens that share a load of codes; tokens whose sums wait in the cache
constexpr long AHEAD = 256;                    // bytes of a row that are fetched before they are needed

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

// y plus a tile's part, for eight rows whose scales are at `row` and token t.
INLINE inline vec add_tile(const PlanarActivations &x, const PlanarBlock &w, long t, long g, long row, __m256i dot, vec y) {
    const long place = g * PLANAR_ROWS + row, grid = t * x.grid_stride + g, own = t * x.tiles + g;
    dot = _mm256_sub_epi32(dot, _mm256_set1_epi32(x.excess[own]));
    y = fmadd(_mm256_mul_ps(_mm256_cvtepi32_ps(dot), broadcast(x.step[grid])), load(w.scale + place), y);
    if (w.zero) y = fnmadd(load(w.zero + place), broadcast(x.count[own]), y);
    if (x.shift) y = fmadd(load(w.total + place), broadcast(x.shift[grid]), y);
    return y;
}

// Both tiles' dots of a unit of eight rows with one token.
template <int BITS>
INLINE inline void unit_dots(const std::uint8_t *first, long stride, const std::uint8_t *second, long second_stride, const std::int8_t *a,
                             __m256i (&dot)[2]) {
    const __m256i ones = _mm256_set1_epi16(1), worth = _mm256_set1_epi16(BITS == 8 ? 16 : 1);
    __m256i signs[4];
    spread_signs<BITS>(second, second_stride, signs);
    dot[0] = dot[1] = _mm256_setzero_si256();
    // Sums of two chunks fit 16 bits: of each tile, or of each digit of one tile.
#pragma GCC unroll 4
    for (int round = 0; round < CHUNKS<BITS>; round += 2) {
        __m256i sum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
#pragma GCC unroll 2
        for (int q = round; q < round + 2; ++q) {
            const std::int8_t *entry = a + 16 * q;
            asm("" : "+r"(entry));  // else broadcasts are kept for the other eight rows, on the stack, where storing them costs more
            spread<BITS>(first, stride, signs, q, [&](auto k, auto i, __m256i v) INLINE {
                constexpr int which = 2 * k / FIELDS<BITS>;
                sum[which] = add_words(sum[which], v, broadcast_four(entry + 4 * ((BITS == 8 ? 0 : FIELD<BITS> * k) + i)));
            });
        }
        const __m256i low = _mm256_madd_epi16(sum[0], ones), high = _mm256_madd_epi16(sum[1], worth);
        if constexpr (BITS == 8) {
            dot[round / 4] = _mm256_add_epi32(dot[round / 4], _mm256_add_epi32(low, high));
        } else {
            dot[0] = _mm256_add_epi32(dot[0], low);
            dot[1] = _mm256_add_epi32(dot[1], high);
        }
    }
}

// Asks for what the rows of a plane hold AHEAD bytes after unit u, at the lines' starts.
template <long BYTES>
INLINE inline void fetch_plane(const std::uint8_t *plane, long units, long u) {
    if (BYTES < 64 && u * BYTES % 64) return;
    // Beyond a row's end lies a row of this block, which is here already; the next block's is wanted.
    const long row = units * BYTES, ahead = u * BYTES + AHEAD, place = ahead < row ? ahead : ahead + (PLANAR_ROWS - 1) * row;
    for (long line = 0; line < BYTES; line += 64)
        for (long r = 0; r < PLANAR_ROWS; ++r) _mm_prefetch(reinterpret_cast<const char *>(plane + place + r * row + line), _MM_HINT_T0);
}

// Likewise for both tiles of a table.
INLINE inline void fetch_table(const float *table, long next, long units, long ahead) {
    if (!table) return;
    const float *place = table + 2 * PLANAR_ROWS * ahead + (ahead < units ? 0 : next - 2 * PLANAR_ROWS * units);
    _mm_prefetch(reinterpret_cast<const char *>(place), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char *>(place + PLANAR_ROWS), _MM_HINT_T0);
}

template <int BITS>
INLINE inline void fetch(const PlanarBlock &w, bool shift, long units, long u) {
    const long ahead = u + AHEAD / first_bytes(BITS);
    fetch_table(w.scale, w.next, units, ahead);
    fetch_table(w.zero, w.next, units, ahead);
    if (shift) fetch_table(w.total, w.next, units, ahead);
    fetch_plane<first_bytes(BITS)>(w.first, units, u);
    if constexpr (BITS == 3) fetch_plane<second_bytes(BITS)>(w.second, units, u);
}

template <int BITS>
__attribute__((noinline)) void one_token(const PlanarActivations &x, const PlanarBlock &w, float *sums) {
    constexpr long A = first_bytes(BITS), B = second_bytes(BITS);
    const long units = x.tiles / 2;
    vec y[2] = {load(sums), load(sums + 8)};
    for (long u = 0; u < units; ++u) {
        const std::int8_t *a = x.packed + u * PLANAR_UNIT;
        fetch<BITS>(w, x.shift, units, u);
        for (int half = 0; half < 2; ++half) {
            __m256i dot[2];
            const long place = 8 * half * units + u;
            unit_dots<BITS>(w.first + place * A, units * A, w.second + place * B, units * B, a, dot);
            for (int tile = 0; tile < 2; ++tile) y[half] = add_tile(x, w, 0, 2 * u + tile, 8 * half, dot[tile], y[half]);
        }
    }
    store(sums, y[0]);
    store(sums + 8, y[1]);
}

// A unit of 16 rows as groups of digits, 32 bytes each: [2][DIGITS][GROUPS].
template <int BITS>
__attribute__((noinline)) void spread_block(const PlanarBlock &w, long units, long u, std::uint8_t *codes) {
    constexpr long A = first_bytes(BITS), B = second_bytes(BITS);
    for (int half = 0; half < 2; ++half) {
        const long place = 8 * half * units + u;
        __m256i signs[4];
        spread_signs<BITS>(w.second + place * B, units * B, signs);
#pragma GCC unroll 1
        for (int q = 0; q < CHUNKS<BITS>; ++q)
            spread<BITS>(w.first + place * A, units * A, signs, q, [&](auto k, auto i, __m256i v) INLINE {
                store_bytes(codes + 32 * (half * DIGITS<BITS> * GROUPS + FIELD<BITS> * k + 4 * q + i), v);
            });
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

// sums[n] += a unit's part, tokens t .. t + N - 1.
template <int BITS, int N>
__attribute__((noinline)) void add_unit(const PlanarActivations &x, const PlanarBlock &w, const std::uint8_t *codes, long u, long t,
                                        float *sums) {
    const std::int8_t *a = x.packed + (u * x.T + t) * PLANAR_UNIT;
    for (int tile = 0; tile < 2; ++tile) {
        __m256i dot[N][2];
        tile_dots<BITS, N>(codes + tile * TILE_GROUPS * 32, a + tile * PLANAR_TILE, dot);
        for (int n = 0; n < N; ++n)
            for (int half = 0; half < 2; ++half) {
                float *y = sums + n * PLANAR_ROWS + 8 * half;
                store(y, add_tile(x, w, t + n, 2 * u + tile, 8 * half, dot[n][half], load(y)));
            }
    }
}

// Tokens [from, to), at most TOKEN_BLOCK.
template <int BITS>
void many_tokens(const PlanarActivations &x, const PlanarBlock &w, long from, long to, float *sums) {
    alignas(32) std::uint8_t codes[2 * DIGITS<BITS> * GROUPS * 32];
    const long units = x.tiles / 2;
    for (long u = 0; u < units; ++u) {
        fetch<BITS>(w, x.shift, units, u);
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
void block_of_rows(const PlanarActivations &x, const PlanarBlock &w, long rows, float *y, long R) {
    alignas(32) float sums[TOKEN_BLOCK * PLANAR_ROWS];
    for (long from = 0; from < x.T; from += TOKEN_BLOCK) {
        const long to = from + TOKEN_BLOCK < x.T ? from + TOKEN_BLOCK : x.T;
        for (long t = 0; t < to - from; ++t)
            for (long r = 0; r < PLANAR_ROWS; ++r) sums[t * PLANAR_ROWS + r] = w.bias ? w.bias[r] : 0.0f;
        if (x.T == 1) one_token<BITS>(x, w, sums);
        else many_tokens<BITS>(x, w, from, to, sums);
        for (long t = from; t < to; ++t) std::memcpy(y + t * R, sums + (t - from) * PLANAR_ROWS, rows * sizeof(float));
    }
}

void planar_rows(const PlanarActivations &x, int bits, const PlanarBlock &w, long rows, float *y, long R) {
    switch (bits) {
        case 2: return block_of_rows<2>(x, w, rows, y, R);
        case 3: return block_of_rows<3>(x, w, rows, y, R);
        case 4: return block_of_rows<4>(x, w, rows, y, R);
        default: return block_of_rows<8>(x, w, rows, y, R);
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
