// Attention of one token over cached codes, which are decoded in registers, for several query heads at once; decode_math.h includes it.

namespace {

constexpr long EIGHT = 8 / WIDTH;  // vectors of eight codes

// use(how many, from which on) for up to four query heads at a time.
template <class Use>
void each_heads(long heads, Use use) {
    for (long from = 0; from < heads; from += 4) switch (heads - from) {
            case 1: use(Number<1>(), from); break;
            case 2: use(Number<2>(), from); break;
            case 3: use(Number<3>(), from); break;
            default: use(Number<4>(), from);
        }
}

// A KV head's cached keys, and query heads that look at them.
struct Keys {
    long D, half, bytes;
    const float *scale, *zero, *query;  // [D], [D], [heads, D]
};

// Scores of N tokens with M query heads: token n's at scores[n + m S]. cos, sin [N, half].
template <int BITS, int M, int N>
inline __attribute__((always_inline)) void score_few(const Keys &k, const std::uint8_t *codes, const float *cos, const float *sin, long S,
                                                     float *scores) {
    const long D = k.D, half = k.half;
    vec sum[(M * N + 3) / 4 * 4] = {};
    for (long i = 0; i < half; i += 8)
        for (int n = 0; n < N; ++n) {
            vec a[EIGHT], b[EIGHT];
            codes8<BITS>(codes + n * k.bytes + i / 8 * BITS, a);
            codes8<BITS>(codes + n * k.bytes + (half + i) / 8 * BITS, b);
            for (long e = 0; e < EIGHT; ++e) {
                const long at = i + e * WIDTH;
                const vec x = (a[e] - load(k.zero + at)) * load(k.scale + at);
                const vec y = (b[e] - load(k.zero + half + at)) * load(k.scale + half + at);
                const vec c = load(cos + n * half + at), s = load(sin + n * half + at), u = fnmadd(y, s, x * c), v = fmadd(x, s, y * c);
                for (int m = 0; m < M; ++m)
                    sum[n * M + m] = fmadd(load(k.query + m * D + half + at), v, fmadd(load(k.query + m * D + at), u, sum[n * M + m]));
            }
        }
    for (long i = 2 * half; i < D; i += 8)
        for (int n = 0; n < N; ++n) {
            vec a[EIGHT];
            codes8<BITS>(codes + n * k.bytes + i / 8 * BITS, a);
            for (long e = 0; e < EIGHT; ++e) {
                const long at = i + e * WIDTH;
                const vec x = (a[e] - load(k.zero + at)) * load(k.scale + at);
                for (int m = 0; m < M; ++m) sum[n * M + m] = fmadd(load(k.query + m * D + at), x, sum[n * M + m]);
            }
        }
    float sums[(M * N + 3) / 4 * 4];
    for (int i = 0; i < M * N; i += 4) add_across(sum + i, sums + i);
    for (int n = 0; n < N; ++n)
        for (int m = 0; m < M; ++m) scores[n + m * S] = sums[n * M + m];
}

template <int BITS, int M>
void score_heads(const DecodeHeads &h, long from, long n, long head) {
    const DecodeStep &step = *h.step;
    const DecodeCache &cache = h.block->cache;
    const Column keys = column_of(h, cache.keys);
    const long D = step.width, half = step.half, S = step.held + 1;
    const Keys k = {D, half, keys.bytes, cache.key_scale + h.head * D, cache.key_zero + h.head * D, h.query + head * D};
    const std::uint8_t *codes = keys.start + from * keys.bytes;
    const float *cos = step.all_cos + h.b * step.turns_stride + from * half, *sin = step.all_sin + h.b * step.turns_stride + from * half;
    float *scores = h.scores + head * S + from;
    long i = 0;
    for (; i + 2 <= n; i += 2) score_few<BITS, M, 2>(k, codes + i * keys.bytes, cos + i * half, sin + i * half, S, scores + i);
    if (i < n) score_few<BITS, M, 1>(k, codes + i * keys.bytes, cos + i * half, sin + i * half, S, scores + i);
}

// Scores of tokens [from, from + n), whose keys are codes. Pairs of channels that rotate must be eight or a multiple.
void score_codes(const DecodeHeads &h, long from, long n) {
    const long repeats = h.step->heads / h.step->kv_heads;
    with_bits(h.block->cache.bits, [&](auto bits) {
        each_heads(repeats, [&](auto heads, long head) { score_heads<bits, heads>(h, from, n, head); });
    });
}

// What tokens [from, from + n) add to 8 N channels from `channel` on, for M query heads from `head` on. `all` [M]: the sums of their
// probabilities, which zero points are multiplied with once for all tokens.
template <int BITS, int M, int N>
void mix_few(const DecodeHeads &h, long from, long n, long channel, long head, const float *all) {
    const DecodeStep &step = *h.step;
    const long D = step.width, S = step.held + 1;
    const Column values = column_of(h, h.block->cache.values);
    const float *scale = h.block->cache.value_scale + h.head * D + channel, *zero = h.block->cache.value_zero + h.head * D + channel;
    const float *p = h.scores + head * S + from;
    const std::uint8_t *codes = values.start + from * values.bytes + channel / 8 * BITS;
    vec sum[M][N * EIGHT] = {};
    for (long j = 0; j < n; ++j, codes += values.bytes) {
        vec x[N][EIGHT];
        for (int i = 0; i < N; ++i) codes8<BITS>(codes + i * BITS, x[i]);
        for (int m = 0; m < M; ++m) {
            const vec weight = broadcast(p[m * S + j]);
            for (int i = 0; i < N * EIGHT; ++i) sum[m][i] = fmadd(weight, x[i / EIGHT][i % EIGHT], sum[m][i]);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int i = 0; i < N * EIGHT; ++i) {
            float *y = h.y + (head + m) * D + channel + i * WIDTH;
            store(y, fmadd(fnmadd(load(zero + i * WIDTH), broadcast(all[m]), sum[m][i]), load(scale + i * WIDTH), load(y)));
        }
}

// What tokens [from, from + n), whose values are codes, add to `width` channels from `channel` on, both multiples of 8.
void mix_codes(const DecodeHeads &h, long from, long n, long channel, long width) {
    const long S = h.step->held + 1, repeats = h.step->heads / h.step->kv_heads;
    with_bits(h.block->cache.bits, [&](auto bits) {
        each_heads(repeats, [&](auto heads, long head) {
            float all[heads];
            for (int m = 0; m < heads; ++m) all[m] = sum_all(h.scores + (head + m) * S + from, n);
            long i = 0;
            for (; i + 16 <= width; i += 16) mix_few<bits, heads, 2>(h, from, n, channel + i, head, all);
            for (; i < width; i += 8) mix_few<bits, heads, 1>(h, from, n, channel + i, head, all);
        });
    });
}

}  // namespace
