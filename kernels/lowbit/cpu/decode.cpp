// Some tokens of each sequence through consecutive decoder blocks, in one parallel region without allocations.
//
// A block is ten phases, each of which begins when all of the one before is done: round what enters q, k and v; their rows; attention's
// scores; its values; round; the output projection; round; the gate's and up's rows; round; down's rows. Two more after the last block
// make logits, where they are asked for: round, and the head's rows. Tokens are rounded whole, and multiplied PLANAR_TOKENS at a time by
// PLANAR_ROWS rows. One token a sequence is scored in parts of DECODE_TOKENS and mixed in parts of DECODE_CHANNELS of a sequence and KV
// head; where there are more, the two phases are their keys and values, and then panels of tokens. Who does a part changes no sum, so
// that results do not depend on the number of threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <thread>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "decode.h"
#include "decode_ahead.h"

namespace {

const DecodePath *select_path(int path) {
#ifdef LOWBIT_X86
    if (path != PORTABLE && has_avx2()) return &avx2_decode_path;
#endif
    return path == AVX2 ? nullptr : &portable_decode_path;
}

// A phase's items are dealt out in runs, one for each thread, whose weights lie behind one another; who is done claims of others' runs, a few
// items at a time. Whoever finds none left waits for those that others still have in hand, not for the others themselves: a thread that
// the system took off its core holds up nothing but what it had claimed. A phase has a counter for each run's claims, and one of what is done.
struct alignas(64) Counter {
    std::atomic<long> n;
};

void wait(const Counter &done, long items, Ahead &ahead) {
    constexpr int SPINS = 2000, LINES = 4;  // phases take microseconds; beyond, others may want the core
    for (int spins = 0; done.n.load(std::memory_order_acquire) < items; ++spins) {
        for (int i = 0; i < LINES; ++i) ahead.fetch();
        if (spins > SPINS) std::this_thread::yield();
#ifdef LOWBIT_X86
        else __builtin_ia32_pause();
#endif
    }
}

constexpr long PHASES = 10, LAST_PHASES = 2;  // of a block; of what makes logits
constexpr long CLAIMS = 4, CLAIMED = 32;      // claims that a thread should find in its run; items of one at most

long phases_of(const DecodeStep &step) { return PHASES * step.blocks + (step.end ? LAST_PHASES : 0); }

// Hands out memory, or only counts it where there is none.
struct Arena {
    char *start;
    long used = 0;

    template <class T>
    T *take(long n) {
        T *place = start ? reinterpret_cast<T *>(start + used) : nullptr;
        used += (n * static_cast<long>(sizeof(T)) + 63) / 64 * 64;
        return place;
    }
};

struct Own {  // one thread's
    float *x, *spare;                           // [widest] each
    float *rows;                                // [2, PLANAR_TOKENS, PLANAR_ROWS]
    float *query, *key, *value, *run, *scores;  // of DecodeHeads
    DecodePanel panel;                          // its memory
};

// Of N = B T tokens. What belongs to a batch of PLANAR_TOKENS of them lies together, all their first codes before all their second ones.
struct Shared {
    std::int8_t *a;              // [terms N, 64 tiles]
    float *step, *shift, *count;  // [terms N, tiles]
    bool *broken;                // [N]: a token that is not a number
    // Each linear's own; what is chosen is for those that read other tiles than all in order.
    std::int8_t *packed[LINEARS], *chosen_a[LINEARS];
    std::int32_t *excess[LINEARS];
    float *chosen_step[LINEARS], *chosen_shift[LINEARS], *chosen_count[LINEARS];
    float *q, *k, *v, *mixed, *inner;  // [N, their channels]
    float *scores;                     // [B, heads, held + 1], of one token a sequence
};

long tokens_of(const DecodeStep &step) { return step.B * step.T; }

bool is_exact(const DecodeStep &step, const DecodeSite &site) { return site.exact || step.spared; }

// The most that any block needs of anything.
struct Extent {
    long channels = 0, tiles = 0, read = 0, inner = 0, terms = 1;

    void cover(const DecodeStep &step, const DecodeSite &site) {
        channels = site.channels > channels ? site.channels : channels;
        tiles = site.tiles > tiles ? site.tiles : tiles;
        terms = is_exact(step, site) ? EXACT_TERMS : terms;
        for (long i = 0; i < site.count; ++i) {
            const long own = 2 * site.linears[i].weight.units;
            read = own > read ? own : read;
        }
    }
};

Extent extent_of(const DecodeStep &step) {
    Extent all;
    all.channels = step.C;
    for (const DecodeBlock *block = step.block; block < step.block + step.blocks; ++block) {
        for (const DecodeSite *site : {&block->qkv, &block->output, &block->up, &block->down}) all.cover(step, *site);
        all.inner = block->down.channels > all.inner ? block->down.channels : all.inner;
    }
    if (step.end) all.cover(step, step.end->head);
    return all;
}

Shared share(Arena &arena, const DecodeStep &step, const Extent &most) {
    Shared s = {};
    const long N = tokens_of(step), T = most.terms * N, wide = step.heads * step.width, narrow = step.kv_heads * step.width;
    s.a = arena.take<std::int8_t>(T * most.tiles * PLANAR_TILE);
    s.step = arena.take<float>(T * most.tiles);
    s.shift = arena.take<float>(T * most.tiles);
    s.count = arena.take<float>(T * most.tiles);
    s.broken = arena.take<bool>(N);
    for (int i = 0; i < LINEARS; ++i) {
        s.packed[i] = arena.take<std::int8_t>(T * most.read * PLANAR_TILE);
        s.chosen_a[i] = arena.take<std::int8_t>(T * most.read * PLANAR_TILE);
        s.excess[i] = arena.take<std::int32_t>(T * most.read);
        s.chosen_step[i] = arena.take<float>(T * most.read);
        s.chosen_shift[i] = arena.take<float>(T * most.read);
        s.chosen_count[i] = arena.take<float>(T * most.read);
    }
    s.q = arena.take<float>(N * wide);
    s.k = arena.take<float>(N * narrow);
    s.v = arena.take<float>(N * narrow);
    s.mixed = arena.take<float>(N * wide);
    s.inner = arena.take<float>(N * most.inner);
    s.scores = step.T == 1 ? arena.take<float>(step.B * step.heads * (step.held + 1)) : nullptr;
    return s;
}

long padded(long n, long to) { return (n + to - 1) / to * to; }

// Tokens of a panel whose scores fit the cache.
long panel_tokens(const DecodeStep &step) {
    const long n = DECODE_SCORES / (step.heads / step.kv_heads * padded(step.held + step.T, DECODE_RUN));
    const long most = step.T < DECODE_PANEL ? step.T : DECODE_PANEL;
    return n < 1 ? 1 : n < most ? n : most;
}

DecodePanel panel(Arena &arena, const DecodeStep &step) {
    const long rows = padded(panel_tokens(step) * step.heads / step.kv_heads, DECODE_ROWS);
    DecodePanel p = {};
    p.rows = arena.take<float>(rows * step.width);
    p.scores = arena.take<float>(rows * padded(step.held + step.T, DECODE_RUN));
    p.turned = arena.take<float>(step.width * DECODE_RUN);
    return p;
}

Own own(Arena &arena, const DecodeStep &step, const Extent &most) {
    const long D = step.width, repeats = step.heads / step.kv_heads;
    Own mine = {};
    mine.x = arena.take<float>(most.channels);
    mine.spare = arena.take<float>(most.channels);
    mine.rows = arena.take<float>(2 * PLANAR_TOKENS * PLANAR_ROWS);
    mine.run = arena.take<float>(DECODE_RUN * D);
    if (step.T > 1) {
        mine.panel = panel(arena, step);
        return mine;
    }
    mine.query = arena.take<float>(repeats * D);
    mine.key = arena.take<float>(D);
    mine.value = arena.take<float>(D);
    mine.scores = arena.take<float>(repeats * (step.held + 1));
    return mine;
}

// What one thread has at hand.
struct Worker {
    const DecodePath &path;
    const PlanarPath &planar;
    const DecodeStep &step;
    Shared shared;
    Own mine;
    long team, thread;
    Counter *phase;  // the next one's
    Ahead ahead;
};

// use(i) for all items below `items`, by whichever thread; returns when all are done.
template <class Use>
void each(Worker &w, long items, Use use) {
    Counter *phase = w.phase, &done = phase[w.team];
    w.phase += w.team + 1;
    for (long i = 0; i < w.team; ++i) {
        const long run = (w.thread + i) % w.team, start = items * run / w.team, end = items * (run + 1) / w.team;
        const long some = w.team == 1 ? items : std::clamp((end - start) / CLAIMS, 1L, CLAIMED);
        for (;;) {
            const long from = start + phase[run].n.fetch_add(some, std::memory_order_relaxed);
            if (from >= end) break;
            const long to = from + some < end ? from + some : end;
            for (long item = from; item < to; ++item) use(item);
            done.n.fetch_add(to - from, std::memory_order_acq_rel);
        }
    }
    wait(done, items, w.ahead);
}

// Tokens that are multiplied together: `n` from token `from` on.
struct Batch {
    long from, n;
};

long batches_of(const DecodeStep &step) { return (tokens_of(step) + PLANAR_TOKENS - 1) / PLANAR_TOKENS; }

Batch batch_of(const DecodeStep &step, long i) {
    const long from = i * PLANAR_TOKENS, left = tokens_of(step) - from;
    return {from, left < PLANAR_TOKENS ? left : PLANAR_TOKENS};
}

// Where the codes `term` of token t lie among those of all tokens.
long row_of(const Batch &batch, long terms, long term, long t) { return terms * batch.from + term * batch.n + t - batch.from; }

// The tiles that a linear reads, beside each other, of one row of codes.
void choose_tiles(const Worker &w, const DecodeLinear &linear, int i, long tiles, long row) {
    const Shared &s = w.shared;
    const long G = 2 * linear.weight.units;
    for (long g = 0; g < G; ++g) {
        const long from = row * tiles + linear.reads[g], to = row * G + g;
        std::memcpy(s.chosen_a[i] + to * PLANAR_TILE, s.a + from * PLANAR_TILE, PLANAR_TILE);
        s.chosen_step[i][to] = s.step[from];
        s.chosen_shift[i][to] = s.shift[from];
        s.chosen_count[i][to] = s.count[from];
    }
}

PlanarActivations activations_of(const Worker &w, const DecodeSite &site, int i, const Batch &batch) {
    const Shared &s = w.shared;
    const DecodeLinear &linear = site.linears[i];
    const bool all = !linear.reads, exact = is_exact(w.step, site);
    const long G = 2 * linear.weight.units, terms = exact ? EXACT_TERMS : 1, at = terms * batch.from * G;
    const float *shift = all ? s.shift : s.chosen_shift[i];
    return {terms * batch.n, G, terms, (all ? s.a : s.chosen_a[i]) + at * PLANAR_TILE, (all ? s.step : s.chosen_step[i]) + at,
            site.shifted && !exact ? shift + at : nullptr, G, (all ? s.count : s.chosen_count[i]) + at,
            s.packed[i] + at * PLANAR_TILE, s.excess[i] + at};
}

// Rotates and rounds token t, which is in mine.x, for the site's linears.
void round_token(const Worker &w, const DecodeSite &site, long t) {
    const Shared &s = w.shared;
    const bool exact = is_exact(w.step, site);
    const long G = site.tiles, terms = exact ? EXACT_TERMS : 1;
    const Batch batch = batch_of(w.step, t / PLANAR_TOKENS);
    const long first = row_of(batch, terms, 0, t) * G;
    w.path.rotate(site.rotation, w.mine.x, site.channels, w.mine.spare);
    if (exact)
        planar_exact_token(w.planar, site.channels, G, batch.n, w.mine.x, s.a + first * PLANAR_TILE, s.step + first, s.shift + first,
                           s.count + first);
    else
        planar_quantize_token(w.planar, site.clusters, G, w.mine.x, s.a + first * PLANAR_TILE, s.step + first, s.shift + first,
                              s.count + first);
    s.broken[t] = false;
    for (long g = first; g < first + G; ++g) s.broken[t] |= s.count[g] != s.count[g];
    for (int i = 0; i < site.count; ++i) {
        const PlanarActivations x = activations_of(w, site, i, batch);
        for (long term = 0; term < terms; ++term) {
            const long row = row_of(batch, terms, term, t), own = row - terms * batch.from;
            if (site.linears[i].reads) choose_tiles(w, site.linears[i], i, G, row);
            w.planar.pack(x, static_cast<int>(site.linears[i].weight.bits), own, own + 1);
        }
    }
}

void round_normed(Worker &w, const DecodeNorm &norm, const DecodeSite &site) {
    each(w, tokens_of(w.step), [&](long t) {
        w.path.norm(norm, w.step.hidden + t * w.step.C, w.step.C, w.mine.spare, w.mine.x);
        w.path.rotate(norm.rotation, w.mine.x, w.step.C, w.mine.spare);
        round_token(w, site, t);
    });
}

void round_plain(Worker &w, const float *x, const DecodeSite &site) {
    each(w, tokens_of(w.step), [&](long t) {
        std::memcpy(w.mine.x, x + t * site.channels, site.channels * sizeof(float));
        round_token(w, site, t);
    });
}

float on_grid(const DecodeLinear &linear, long row, float y) {
    if (linear.top[row] < 0) return y;
    const float s = linear.scale[row], z = linear.zero[row], top = linear.top[row], q = std::rint(y / s) + z;
    return ((q < 0 ? 0 : q > top ? top : q) - z) * s;
}

// Rows of the site's linear i from block `block` on, bias and output grids and all: y [tokens of the batch, PLANAR_ROWS]. Returns how many.
long rows_of(const Worker &w, const DecodeSite &site, int i, const Batch &batch, long block, float *y) {
    const DecodeLinear &linear = site.linears[i];
    const long row = block * PLANAR_ROWS, left = linear.weight.R - row, rows = left < PLANAR_ROWS ? left : PLANAR_ROWS;
    PlanarBlock part = planar_block(linear.weight, row);
    if (rows < PLANAR_ROWS) part.first = linear.tail_first, part.second = linear.tail_second, part.bias = linear.tail_bias;
    planar_tokens(w.planar, activations_of(w, site, i, batch), static_cast<int>(linear.weight.bits), part, rows, y, PLANAR_ROWS);
    const bool rounds = linear.scale && !w.step.spared;
    for (long t = 0; t < batch.n; ++t) {
        const bool broken = w.shared.broken[batch.from + t];
        if (!broken && !rounds) continue;
        for (long r = 0; r < rows; ++r) {
            float &sum = y[t * PLANAR_ROWS + r];
            sum = broken ? std::numeric_limits<float>::quiet_NaN() : on_grid(linear, row + r, sum);
        }
    }
    return rows;
}

// use(batch, block) for all batches of tokens and, within each, all of so many blocks of rows.
template <class Use>
void each_product(Worker &w, long blocks, Use use) {
    each(w, batches_of(w.step) * blocks, [&](long item) { use(batch_of(w.step, item / blocks), item % blocks); });
}

// The rows of the site's linears, one linear after another, each to a place of its own.
void project(Worker &w, const DecodeSite &site, float *const *to) {
    float *y = w.mine.rows;
    long all = 0;
    for (long i = 0; i < site.count; ++i) all += blocks_of(site.linears[i]);
    each_product(w, all, [&](const Batch &batch, long block) {
        int i = 0;
        for (; block >= blocks_of(site.linears[i]); ++i) block -= blocks_of(site.linears[i]);
        const long rows = rows_of(w, site, i, batch, block, y), R = site.linears[i].weight.R;
        for (long t = 0; t < batch.n; ++t)
            std::memcpy(to[i] + (batch.from + t) * R + block * PLANAR_ROWS, y + t * PLANAR_ROWS, rows * sizeof(float));
    });
}

// Adds the site's only linear to the hidden states.
void add_to_hidden(Worker &w, const DecodeSite &site) {
    float *y = w.mine.rows;
    each_product(w, blocks_of(site.linears[0]), [&](const Batch &batch, long block) {
        const long rows = rows_of(w, site, 0, batch, block, y);
        float *hidden = w.step.hidden + batch.from * w.step.C + block * PLANAR_ROWS;
        for (long t = 0; t < batch.n; ++t)
            for (long r = 0; r < rows; ++r) hidden[t * w.step.C + r] += y[t * PLANAR_ROWS + r];
    });
}

void widen(Worker &w, const DecodeBlock &block) {
    const DecodeSite &site = block.up;
    const bool gated = site.count == 2;
    const long F = site.linears[0].weight.R;
    float *gate = w.mine.rows, *up = gate + PLANAR_TOKENS * PLANAR_ROWS;
    each_product(w, blocks_of(site.linears[0]), [&](const Batch &batch, long part) {
        const long rows = rows_of(w, site, 0, batch, part, gate);
        if (gated) rows_of(w, site, 1, batch, part, up);
        float *inner = w.shared.inner + batch.from * F + part * PLANAR_ROWS;
        for (long t = 0; t < batch.n; ++t)
            w.path.activate(block.activation, gate + t * PLANAR_ROWS, gated ? up + t * PLANAR_ROWS : nullptr, rows, inner + t * F);
    });
}

// The heads of sequence task / kv_heads that share KV head task % kv_heads.
DecodeHeads heads_of(Worker &w, const DecodeBlock &block, long task, float *scores) {
    const DecodeStep &step = w.step;
    const long D = step.width, H = step.kv_heads, wide = step.heads / H * D;  // [B, heads, D] = [B, H, repeats D]
    return {&step,        &block,     task / H,  0, task % H, w.mine.query, w.mine.key, w.mine.value, w.mine.run,
            scores, w.shared.mixed + task * wide};
}

void attend_one(Worker &w, const DecodeBlock &block) {
    const DecodeStep &step = w.step;
    const long D = step.width, H = step.kv_heads, S = step.held + 1, wide = step.heads / H * D, row = step.heads / H * S;
    const long pieces = (S + DECODE_TOKENS - 1) / DECODE_TOKENS, parts = (D + DECODE_CHANNELS - 1) / DECODE_CHANNELS;
    each(w, step.B * H * pieces, [&](long item) {
        const long task = item / pieces, from = item % pieces * DECODE_TOKENS, to = from + DECODE_TOKENS;
        std::memcpy(w.mine.query, w.shared.q + task * wide, wide * sizeof(float));
        std::memcpy(w.mine.key, w.shared.k + task * D, D * sizeof(float));
        std::memcpy(w.mine.value, w.shared.v + task * D, D * sizeof(float));
        w.path.score(heads_of(w, block, task, w.shared.scores + task * row), from, to < S ? to : S);
    });
    each(w, step.B * H * parts, [&](long item) {
        const long task = item / parts, channel = item % parts * DECODE_CHANNELS, left = D - channel;
        std::memcpy(w.mine.scores, w.shared.scores + task * row, row * sizeof(float));
        w.path.mix(heads_of(w, block, task, w.mine.scores), channel, left < DECODE_CHANNELS ? left : DECODE_CHANNELS);
    });
}

void attend_all(Worker &w, const DecodeBlock &block) {
    const DecodeStep &step = w.step;
    const Shared &s = w.shared;
    const long D = step.width, H = step.kv_heads, wide = step.heads / H * D;
    each(w, tokens_of(step) * H, [&](long item) {
        const long n = item / H;
        w.path.append({&step, &block, n / step.T, n % step.T, item % H, s.q + item * wide, s.k + item * D, s.v + item * D,
                       w.mine.run, nullptr, nullptr});
    });
    const long size = panel_tokens(step), panels = (step.T + size - 1) / size;
    each(w, step.B * H * panels, [&](long item) {
        const long task = item / panels, b = task / H, t = item % panels * size, left = step.T - t;
        const long at = ((b * step.T + t) * H + task % H) * wide;  // [N, heads D] = [N, H, repeats D]
        DecodePanel p = w.mine.panel;
        p.heads = {&step, &block, b, t, task % H, nullptr, nullptr, nullptr, w.mine.run, nullptr, nullptr};
        p.tokens = left < size ? left : size, p.stride = H * wide;
        p.query = s.q + at, p.y = s.mixed + at;
        w.path.attend(p);
    });
}

void run_block(Worker &w, long i) {
    const DecodeBlock &block = w.step.block[i];
    float *const to[LINEARS] = {w.shared.q, w.shared.k, w.shared.v};
    round_normed(w, block.attention_norm, block.qkv);
    w.ahead.pass(SITES * i);
    project(w, block.qkv, to);
    if (w.step.T == 1) attend_one(w, block);
    else attend_all(w, block);
    round_plain(w, w.shared.mixed, block.output);
    w.ahead.pass(SITES * i + 1);
    add_to_hidden(w, block.output);
    round_normed(w, block.mlp_norm, block.up);
    w.ahead.pass(SITES * i + 2);
    widen(w, block);
    round_plain(w, w.shared.inner, block.down);
    w.ahead.pass(SITES * i + 3);
    add_to_hidden(w, block.down);
}

void make_logits(Worker &w) {
    round_normed(w, w.step.end->norm, w.step.end->head);
    project(w, w.step.end->head, &w.step.logits);
}

}  // namespace

// Bytes of scratch that `threads` threads need for this step.
EXPORT long lowbit_decode_scratch(int threads, const DecodeStep *step) {
    Arena arena = {nullptr};
    const Extent most = extent_of(*step);
    arena.take<Counter>(phases_of(*step) * (threads + 1));
    share(arena, *step, most);
    for (int i = 0; i < threads; ++i) own(arena, *step, most);
    return arena.used;
}

// Runs the step: hidden in place, its tokens appended to every cache, logits where there is an end. scratch: as many bytes as the above says, at a multiple of 64.
// Returns 0; 2 where this machine lacks the path.
EXPORT int lowbit_decode(int path, int threads, const DecodeStep *step, char *scratch) {
    const DecodePath *chosen = select_path(path);
    const PlanarPath *planar = planar_path(path);
    if (!chosen) return 2;
    const Extent most = extent_of(*step);
    Arena arena = {scratch};
    const long counters = phases_of(*step) * (threads + 1);
    Counter *phases = arena.take<Counter>(counters);
    for (long i = 0; i < counters; ++i) phases[i].n = 0;
    const Shared shared = share(arena, *step, most);
#pragma omp parallel num_threads(threads) firstprivate(arena)
    {
#ifdef _OPENMP
        const long thread = omp_get_thread_num(), team = omp_get_num_threads();
#else
        const long thread = 0, team = 1;
#endif
        Own mine = {};
        for (long i = 0; i <= thread; ++i) mine = own(arena, *step, most);
        Worker worker = {*chosen, *planar, *step, shared, mine, team, thread, phases, {*step, team, thread}};
        for (long i = 0; i < step->blocks; ++i) run_block(worker, i);
        if (step->end) make_logits(worker);
    }
    return 0;
}
