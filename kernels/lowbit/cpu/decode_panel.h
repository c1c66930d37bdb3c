// Attention of several tokens a sequence, on what decode_math.h defines, which comes before.

namespace {

constexpr long RUN_VECTORS = DECODE_RUN / WIDTH;
constexpr float HIDDEN_FROM = -1e30f;  // masks hide a token by less than any score can make up for

// c [DECODE_ROWS, N vectors] += a [DECODE_ROWS, K] b [K, N vectors]; rows of a, b and c are lda, ldb and ldc apart.
template <int N>
void add_product(const float *a, long lda, const float *b, long ldb, long K, float *c, long ldc) {
    vec sum[DECODE_ROWS][N];
    for (int m = 0; m < DECODE_ROWS; ++m)
        for (int n = 0; n < N; ++n) sum[m][n] = load(c + m * ldc + n * WIDTH);
    for (long k = 0; k < K; ++k)
        for (int m = 0; m < DECODE_ROWS; ++m)
            for (int n = 0; n < N; ++n) sum[m][n] = fmadd(broadcast(a[m * lda + k]), load(b + k * ldb + n * WIDTH), sum[m][n]);
    for (int m = 0; m < DECODE_ROWS; ++m)
        for (int n = 0; n < N; ++n) store(c + m * ldc + n * WIDTH, sum[m][n]);
}

const float *mask_of(const DecodePanel &p, long t) {
    const DecodeStep &step = *p.heads.step;
    return step.mask ? step.mask + p.heads.b * step.mask_stride + (p.heads.t + t) * (step.held + step.T) : nullptr;
}

// How many of the cached tokens, from the first, token t of the panel needs to look at.
long reach_of(const DecodePanel &p, long t) {
    const DecodeStep &step = *p.heads.step;
    const float *mask = mask_of(p, t);
    if (!mask) return step.held + p.heads.t + t + 1;
    long n = step.held + step.T;
    while (n && mask[n - 1] < HIDDEN_FROM) --n;
    return n;
}

struct Extents {
    long repeats, rows, padded, stride;  // query heads of a token; of the panel; padded to DECODE_ROWS; floats from row to row of scores
    long reach[DECODE_PANEL], all;       // of each token, and the largest
};

Extents extents_of(const DecodePanel &p) {
    const DecodeStep &step = *p.heads.step;
    Extents e = {};
    e.repeats = step.heads / step.kv_heads;
    e.rows = p.tokens * e.repeats;
    e.padded = (e.rows + DECODE_ROWS - 1) / DECODE_ROWS * DECODE_ROWS;
    e.stride = (step.held + step.T + DECODE_RUN - 1) / DECODE_RUN * DECODE_RUN;
    for (long t = 0; t < p.tokens; ++t) {
        e.reach[t] = reach_of(p, t);
        e.all = e.reach[t] > e.all ? e.reach[t] : e.all;
    }
    return e;
}

void score_panel(const DecodePanel &p, const Extents &e) {
    const long D = p.heads.step->width;
    std::memset(p.rows, 0, e.padded * D * sizeof(float));
    for (long t = 0; t < p.tokens; ++t) std::memcpy(p.rows + t * e.repeats * D, p.query + t * p.stride, e.repeats * D * sizeof(float));
    std::memset(p.scores, 0, e.padded * e.stride * sizeof(float));
    for (long from = 0; from < e.all; from += DECODE_RUN) {
        const long n = e.all - from < DECODE_RUN ? e.all - from : DECODE_RUN;
        const Rows keys = keys_of(p.heads, from, n);
        for (long i = 0; i < D; ++i)
            for (long j = 0; j < DECODE_RUN; ++j) p.turned[i * DECODE_RUN + j] = j < n ? keys.start[j * keys.stride + i] : 0;
        for (long r = 0; r < e.padded; r += DECODE_ROWS)
            add_product<RUN_VECTORS>(p.rows + r * D, D, p.turned, DECODE_RUN, D, p.scores + r * e.stride + from, e.stride);
    }
}

// Probabilities, 0 beyond what a token reaches.
void weigh_panel(const DecodePanel &p, const Extents &e) {
    for (long t = 0; t < p.tokens; ++t)
        for (long r = t * e.repeats; r < (t + 1) * e.repeats; ++r) {
            float *row = p.scores + r * e.stride;
            if (e.reach[t]) softmax(mask_of(p, t), p.heads.block->softmax_levels, e.reach[t], row);
            std::memset(row + e.reach[t], 0, (e.stride - e.reach[t]) * sizeof(float));
        }
}

void mix_panel(const DecodePanel &p, const Extents &e) {
    const long D = p.heads.step->width;
    std::memset(p.rows, 0, e.padded * D * sizeof(float));
    for (long from = 0; from < e.all; from += DECODE_RUN) {
        const long n = e.all - from < DECODE_RUN ? e.all - from : DECODE_RUN;
        const Rows values = values_of(p.heads, from, n, 0, D);
        for (long r = 0; r < e.padded; r += DECODE_ROWS) {
            const float *weights = p.scores + r * e.stride + from;
            float *y = p.rows + r * D;
            long i = 0;
            for (; i + 2 * WIDTH <= D; i += 2 * WIDTH) add_product<2>(weights, e.stride, values.start + i, values.stride, n, y + i, D);
            for (; i < D; i += WIDTH) add_product<1>(weights, e.stride, values.start + i, values.stride, n, y + i, D);
        }
    }
    for (long t = 0; t < p.tokens; ++t) std::memcpy(p.y + t * p.stride, p.rows + t * e.repeats * D, e.repeats * D * sizeof(float));
}

void attend_panel(const DecodePanel &p) {
    const Extents e = extents_of(p);
    score_panel(p, e);
    weigh_panel(p, e);
    mix_panel(p, e);
}

void append(const DecodeHeads &h) {
    append_token(h);
    scale_queries(h);
}

}  // namespace
