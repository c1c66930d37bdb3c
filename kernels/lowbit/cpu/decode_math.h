// What decode.cpp asks of an instruction set, on the vectors of avx2.h or portable.h, and on what the including file defines: `codes8`,
// and `add_across`, the sums of four vectors' entries.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "decode.h"

namespace {

constexpr long WIDTH = sizeof(vec) / sizeof(float);

float sum_of(vec v) {
    const vec all[4] = {v, v, v, v};
    float sums[4];
    add_across(all, sums);
    return sums[0];
}

float sum_squares(const float *x, long n, float mean) {
    vec sum = broadcast(0);
    long i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        const vec v = load(x + i) - broadcast(mean);
        sum = fmadd(v, v, sum);
    }
    float rest = 0;
    for (; i < n; ++i) rest += (x[i] - mean) * (x[i] - mean);
    return sum_of(sum) + rest;
}

float sum_all(const float *x, long n) {
    vec sum = broadcast(0);
    long i = 0;
    for (; i + WIDTH <= n; i += WIDTH) sum += load(x + i);
    float rest = 0;
    for (; i < n; ++i) rest += x[i];
    return sum_of(sum) + rest;
}

void norm(const DecodeNorm &norm, const float *x, long C, float *spare, float *y) {
    const float mean = norm.centred ? sum_all(x, C) / C : 0.0f;
    const float inverse = 1.0f / std::sqrt(sum_squares(x, C, mean) / C + static_cast<float>(norm.eps));
    float *to = norm.permutation ? spare : y;
    for (long i = 0; i < C; ++i) to[i] = (x[i] - mean) * inverse;
    if (norm.weight)
        for (long i = 0; i < C; ++i) to[i] *= norm.weight[i];
    if (norm.bias)
        for (long i = 0; i < C; ++i) to[i] += norm.bias[i];
    if (norm.permutation)
        for (long i = 0; i < C; ++i) y[i] = spare[norm.permutation[i]];
}

// N vectors of x [m] M [m, m].
template <int N>
void columns_of(const float *x, const float *M, long m, float *y) {
    vec sum[N];
    for (int n = 0; n < N; ++n) sum[n] = broadcast(0);
    for (long k = 0; k < m; ++k)
        for (int n = 0; n < N; ++n) sum[n] = fmadd(broadcast(x[k]), load(M + k * m + n * WIDTH), sum[n]);
    for (int n = 0; n < N; ++n) store(y + n * WIDTH, sum[n]);
}

void times_base(const float *x, const float *M, long m, float *y) {
    long j = 0;
    for (; j + 4 * WIDTH <= m; j += 4 * WIDTH) columns_of<4>(x, M + j, m, y + j);
    for (; j + WIDTH <= m; j += WIDTH) columns_of<1>(x, M + j, m, y + j);
    for (; j < m; ++j) {
        y[j] = 0;
        for (long k = 0; k < m; ++k) y[j] += x[k] * M[k * m + j];
    }
}

void rotate(const DecodeRotation &rotation, float *x, long C, float *spare) {
    const long n = rotation.block, m = rotation.base;
    for (float *run = x; n > 1 && run < x + C; run += n) {
        for (long i = 0; i < n; i += m) times_base(run + i, rotation.matrix, m, spare + i);
        for (long h = m; h < n; h *= 2)
            for (long start = 0; start < n; start += 2 * h)
                for (long i = start; i < start + h; ++i) {
                    const float a = spare[i], b = spare[i + h];
                    spare[i] = a + b, spare[i + h] = a - b;
                }
        std::memcpy(run, spare, n * sizeof(float));
    }
}

// e^x, x held between -87 and 87, within two units in the last place; NaN stays. By Cephes' polynomial of the rest after 2^n.
vec exp_of(vec x) {
    const vec most = broadcast(87), least = broadcast(-87), magic = broadcast(12582912);  // 1.5 * 2^23: sums with it are whole numbers
    x = x > most ? most : x < least ? least : x;
    const vec shifted = fmadd(x, broadcast(1.44269504f), magic), n = shifted - magic;
    const vec r = fnmadd(n, broadcast(-2.12194440e-4f), fnmadd(n, broadcast(0.693359375f), x));
    vec p = broadcast(1.9875691500e-4f);
    p = fmadd(p, r, broadcast(1.3981999507e-3f));
    p = fmadd(p, r, broadcast(8.3334519073e-3f));
    p = fmadd(p, r, broadcast(4.1665795894e-2f));
    p = fmadd(p, r, broadcast(1.6666665459e-1f));
    p = fmadd(p, r, broadcast(5.0000001201e-1f));
    p = fmadd(p, r * r, r) + broadcast(1);
    const ivec power = (ivec)p + ((ivec)shifted << 23);
    return (vec)power + (x - x);  // the exponent's sum may have turned NaN into a number
}

vec activation_of(long activation, vec x) {
    if (activation == SILU) return x / (broadcast(1) + exp_of(-x));
    return x < broadcast(0) ? broadcast(0) : x;
}

void activate(long activation, const float *x, const float *other, long n, float *y) {
    for (long i = 0; i < n; i += WIDTH) {
        float in[WIDTH] = {}, out[WIDTH];
        const long part = n - i < WIDTH ? n - i : WIDTH;
        std::memcpy(in, x + i, part * sizeof(float));
        store(out, activation_of(activation, load(in)));
        for (long j = 0; j < part; ++j) y[i + j] = other ? out[j] * other[i + j] : out[j];
    }
}

// The rotary embedding of x [D], channels i and half + i.
void turn(const float *__restrict cos, const float *__restrict sin, long half, float *__restrict x) {
    float *__restrict y = x + half;
    for (long i = 0; i < half; ++i) {
        const float a = x[i], b = y[i];
        x[i] = a * cos[i] - b * sin[i];
        y[i] = b * cos[i] + a * sin[i];
    }
}

// Codes clamp(round(x / scale) + zero, 0, 2^bits - 1) of x [D], the first in the lowest bits.
void encode(long bits, const float *x, const float *scale, const float *zero, long D, std::uint8_t *codes) {
    const float top = static_cast<float>((1 << bits) - 1);
    std::uint64_t held = 0;
    for (long i = 0; i < D; ++i) {
        const float q = std::rint(x[i] / scale[i]) + zero[i];
        const std::uint64_t code = static_cast<std::uint64_t>(q > 0 ? q < top ? q : top : 0);
        held |= code << (i % 8 * bits);
        if (i % 8 == 7) {
            std::memcpy(codes + i / 8 * bits, &held, bits);
            held = 0;
        }
    }
}

// x [rows, n] from as many channels of rows that are `bytes` apart.
template <int BITS>
void decode_rows(const std::uint8_t *codes, long bytes, const float *scale, const float *zero, long rows, long n, float *x) {
    for (long i = 0; i < n; i += 8) {
        vec s[8 / WIDTH], z[8 / WIDTH];
        for (long j = 0; j < 8 / WIDTH; ++j) s[j] = load(scale + i + j * WIDTH), z[j] = load(zero + i + j * WIDTH);
        for (long r = 0; r < rows; ++r) {
            vec eight[8 / WIDTH];
            codes8<BITS>(codes + r * bytes + i / 8 * BITS, eight);
            for (long j = 0; j < 8 / WIDTH; ++j) store(x + r * n + i + j * WIDTH, (eight[j] - z[j]) * s[j]);
        }
    }
}

template <int N>
using Number = std::integral_constant<int, N>;

// use(how many) bits, as a constant.
template <class Use>
void with_bits(long bits, Use use) {
    switch (bits) {
        case 2: return use(Number<2>());
        case 3: return use(Number<3>());
        case 4: return use(Number<4>());
        default: return use(Number<8>());
    }
}

void decode(long bits, const std::uint8_t *codes, long bytes, const float *scale, const float *zero, long rows, long n, float *x) {
    with_bits(bits, [&](auto known) { decode_rows<known>(codes, bytes, scale, zero, rows, n, x); });
}

// One head's part of a cache: where its tokens begin, and how many bytes each takes.
struct Column {
    std::uint8_t *start;
    long bytes;
};

Column column_of(const DecodeHeads &h, std::uint8_t *cache) {
    const DecodeStep &step = *h.step;
    const long bits = h.block->cache.bits, bytes = bits == 16 ? step.width * sizeof(float) : step.width * bits / 8;
    return {cache + (h.b * step.kv_heads + h.head) * step.capacity * bytes, bytes};
}

// Turns x [D] as token t turns.
void turn_new(const DecodeHeads &h, float *x) {
    const DecodeStep &step = *h.step;
    const long row = h.b * step.turn_stride + h.t * step.half;
    turn(step.cos + row, step.sin + row, step.half, x);
}

void scale_queries(const DecodeHeads &h) {
    const DecodeStep &step = *h.step;
    const float scaling = static_cast<float>(h.block->scaling);
    for (long r = 0; r < step.heads / step.kv_heads; ++r) {
        for (long i = 0; i < step.width; ++i) h.query[r * step.width + i] *= scaling;
        turn_new(h, h.query + r * step.width);
    }
}

void append_token(const DecodeHeads &h) {
    const DecodeStep &step = *h.step;
    const DecodeCache &cache = h.block->cache;
    const Column keys = column_of(h, cache.keys), values = column_of(h, cache.values);
    const long at = step.held + h.t, D = step.width, grid = h.head * D;
    std::uint8_t *key = keys.start + at * keys.bytes, *value = values.start + at * values.bytes;
    if (cache.bits == 16) {
        turn_new(h, h.key);
        std::memcpy(key, h.key, keys.bytes);
        std::memcpy(value, h.value, values.bytes);
    } else {
        encode(cache.bits, h.key, cache.key_scale + grid, cache.key_zero + grid, D, key);
        encode(cache.bits, h.value, cache.value_scale + grid, cache.value_zero + grid, D, value);
    }
}

// use(i, place) for the sequence's tokens of [from, from + n) that are held in full precision: the i-th such column, `place` behind `from`.
template <class Use>
void each_spared(const DecodeHeads &h, long from, long n, Use use) {
    const DecodeCache &cache = h.block->cache;
    for (long i = 0; i < cache.spared; ++i) {
        const long place = cache.spared_at[i] - from;
        if (place >= 0 && place < n && cache.spared_rows[h.b * cache.spared + i]) use(i, place);
    }
}

// Puts what rows hold in full precision over the run's tokens [from, from + n), `width` channels from `channel` on.
void restore(const DecodeHeads &h, const float *spared, long from, long n, long channel, long width) {
    const DecodeCache &cache = h.block->cache;
    each_spared(h, from, n, [&](long i, long place) {
        const float *kept = spared + ((h.b * h.step->kv_heads + h.head) * cache.spared + i) * h.step->width + channel;
        std::memcpy(h.run + place * width, kept, width * sizeof(float));
    });
}

// Some tokens of a cache: row j begins at start + j * stride.
struct Rows {
    const float *start;
    long stride;
};

// Tokens [from, from + n), n <= DECODE_RUN, keys rotated.
Rows keys_of(const DecodeHeads &h, long from, long n) {
    const DecodeStep &step = *h.step;
    const DecodeCache &cache = h.block->cache;
    const Column column = column_of(h, cache.keys);
    const std::uint8_t *start = column.start + from * column.bytes;
    const long D = step.width, half = step.half;
    if (cache.bits == 16) return {reinterpret_cast<const float *>(start), D};
    decode(cache.bits, start, column.bytes, cache.key_scale + h.head * D, cache.key_zero + h.head * D, n, D, h.run);
    for (long i = 0; half && i < n; ++i) {
        const long row = h.b * step.turns_stride + (from + i) * half;
        turn(step.all_cos + row, step.all_sin + row, half, h.run + i * D);
    }
    restore(h, cache.spared_keys, from, n, 0, D);
    return {h.run, D};
}

// `width` channels of them, from `channel` on, both multiples of 8.
Rows values_of(const DecodeHeads &h, long from, long n, long channel, long width) {
    const DecodeCache &cache = h.block->cache;
    const Column column = column_of(h, cache.values);
    const std::uint8_t *start = column.start + from * column.bytes;
    const long D = h.step->width, grid = h.head * D + channel;
    if (cache.bits == 16) return {reinterpret_cast<const float *>(start) + channel, D};
    start += channel / 8 * cache.bits;
    decode(cache.bits, start, column.bytes, cache.value_scale + grid, cache.value_zero + grid, n, width, h.run);
    restore(h, cache.spared_values, from, n, channel, width);
    return {h.run, width};
}

// scores[j] = query . rows[j] for 4 N rows.
template <int N>
void dots(const float *query, const float *rows, long D, float *scores) {
    vec sum[4 * N];
    for (int j = 0; j < 4 * N; ++j) sum[j] = broadcast(0);
    for (long i = 0; i < D; i += WIDTH)
        for (int j = 0; j < 4 * N; ++j) sum[j] = fmadd(load(query + i), load(rows + j * D + i), sum[j]);
    for (int n = 0; n < N; ++n) add_across(sum + 4 * n, scores + 4 * n);
}

// The same for n rows, n <= DECODE_RUN.
void all_dots(const float *query, const float *rows, long n, long D, float *scores) {
    long j = 0;
    for (; j + 8 <= n; j += 8) dots<2>(query, rows + j * D, D, scores + j);
    for (; j < n; ++j) {
        vec sum = broadcast(0);
        for (long i = 0; i < D; i += WIDTH) sum = fmadd(load(query + i), load(rows + j * D + i), sum);
        scores[j] = sum_of(sum);
    }
}

// y += sum_j p[j] rows[j], N vectors of it.
template <int N>
void add_rows(const float *p, const float *rows, long stride, long n, float *y) {
    vec sum[N];
    for (int k = 0; k < N; ++k) sum[k] = load(y + k * WIDTH);
    for (long j = 0; j < n; ++j)
        for (int k = 0; k < N; ++k) sum[k] = fmadd(broadcast(p[j]), load(rows + j * stride + k * WIDTH), sum[k]);
    for (int k = 0; k < N; ++k) store(y + k * WIDTH, sum[k]);
}

// The largest of n > 0 numbers; any of them if one is NaN.
float largest_of(const float *x, long n) {
    float most = x[0];
    long i = 0;
    if (n >= WIDTH) {
        vec v = load(x);
        for (i = WIDTH; i + WIDTH <= n; i += WIDTH) {
            const vec next = load(x + i);
            v = next > v ? next : v;
        }
        for (long j = 0; j < WIDTH; ++j) most = v[j] > most ? v[j] : most;
    }
    for (; i < n; ++i) most = x[i] > most ? x[i] : most;
    return most;
}

// Probabilities of one head's scores [n], in place.
void softmax(const float *mask, long levels, long n, float *scores) {
    if (mask)
        for (long i = 0; i < n; ++i) scores[i] += mask[i];
    const vec largest = broadcast(largest_of(scores, n));
    const long whole = n / WIDTH * WIDTH;
    for (long i = 0; i < whole; i += WIDTH) store(scores + i, exp_of(load(scores + i) - largest));
    if (whole < n) {
        float part[WIDTH] = {};
        std::memcpy(part, scores + whole, (n - whole) * sizeof(float));
        store(part, exp_of(load(part) - largest));
        std::memcpy(scores + whole, part, (n - whole) * sizeof(float));
    }
    const float sum = sum_all(scores, n), top = static_cast<float>(levels);
    for (long i = 0; i < n; ++i) scores[i] /= sum;
    if (levels)
        for (long i = 0; i < n; ++i) scores[i] = std::rint(scores[i] * top) / top;
}

// Whether tokens [from, from + n) are codes, all of them.
bool only_codes(const DecodeHeads &h, long from, long n) {
    bool only = h.block->cache.bits != 16;
    each_spared(h, from, n, [&](long, long) { only = false; });
    return only;
}

}  // namespace

#include "decode_codes.h"

namespace {

void score(const DecodeHeads &h, long from, long to) {
    const DecodeStep &step = *h.step;
    const long D = step.width, S = step.held + 1, repeats = step.heads / step.kv_heads;
    if (to == S) append_token(h);
    scale_queries(h);
    if (step.half % 8 == 0 && only_codes(h, from, to - from)) return score_codes(h, from, to - from);
    for (; from < to; from += DECODE_RUN) {
        const long n = to - from < DECODE_RUN ? to - from : DECODE_RUN;
        const Rows keys = keys_of(h, from, n);
        for (long r = 0; r < repeats; ++r) all_dots(h.query + r * D, keys.start, n, D, h.scores + r * S + from);
    }
}

// Adds what tokens [from, from + n), n <= DECODE_RUN, contribute to `width` channels of what is attended to.
void mix_run(const DecodeHeads &h, long from, long n, long channel, long width) {
    const DecodeStep &step = *h.step;
    const long D = step.width, S = step.held + 1, repeats = step.heads / step.kv_heads;
    const Rows values = values_of(h, from, n, channel, width);
    for (long r = 0; r < repeats; ++r) {
        const float *p = h.scores + r * S + from;
        float *y = h.y + r * D + channel;
        long i = 0;
        for (; i + 4 * WIDTH <= width; i += 4 * WIDTH) add_rows<4>(p, values.start + i, values.stride, n, y + i);
        for (; i < width; i += WIDTH) add_rows<1>(p, values.start + i, values.stride, n, y + i);
    }
}

void mix(const DecodeHeads &h, long channel, long width) {
    const DecodeStep &step = *h.step;
    const long D = step.width, S = step.held + 1, repeats = step.heads / step.kv_heads;
    const float *mask = step.mask ? step.mask + h.b * step.mask_stride : nullptr;
    for (long r = 0; r < repeats; ++r) {
        softmax(mask, h.block->softmax_levels, S, h.scores + r * S);
        std::memset(h.y + r * D + channel, 0, width * sizeof(float));
    }
    for (long from = 0, to; from < S; from = to) {
        to = from;
        while (to < S && only_codes(h, to, DECODE_RUN)) to += DECODE_RUN;
        to = to < S ? to : S;
        if (to > from) mix_codes(h, from, to - from, channel, width);
        if (to == S) break;
        const long n = S - to < DECODE_RUN ? S - to : DECODE_RUN;
        mix_run(h, to, n, channel, width);
        to += n;
    }
}

}  // namespace
