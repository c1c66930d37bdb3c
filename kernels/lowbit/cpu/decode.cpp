// One token a sequence through consecutive decoder blocks, in one parallel region without allocations.
//
// A block is ten phases, each of which begins when all of the one before is done: round what enters q, k and v; their rows; attention's
// scores; its values; round; the output projection; round; the gate's and up's rows; round; down's rows. Tokens are rounded whole, rows go
// in blocks of PLANAR_ROWS, scores in DECODE_TOKENS and values in DECODE_CHANNELS of a sequence and KV head: who does a part changes no
// sum, so that results do not depend on the number of threads.
#include "decode.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#ifdef _OPENMP
#include <omp.h>
#endif

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

void wait(const Counter &done, long items) {
    constexpr int SPINS = 2000;  // phases take microseconds; beyond, others may want the core
    for (int spins = 0; done.n.load(std::memory_order_acquire) < items; ++spins) {
        if (spins > SPINS) std::this_thread::yield();
#ifdef LOWBIT_X86
        else __builtin_ia32_pause();
#endif
    }
}

constexpr long PHASES = 10, CLAIMS = 4;  // phases of a block; claims that a thread should find in its run

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

constexpr int LINEARS = 3;

struct Own {  // one thread's
    float *x, *spare;                           // [widest] each
    float *rows;                                // [2, B, PLANAR_ROWS]
    float *query, *key, *value, *run, *scores;  // of DecodeHeads
};

struct Shared {
    std::int8_t *a;              // [terms B, 64 tiles]
    float *step, *shift, *count;  // [terms B, tiles]
    bool *broken;                // [B]: a token that is not a number
    // Each linear's own; what is chosen is for those that read other tiles than all in order.
    std::int8_t *packed[LINEARS], *chosen_a[LINEARS];
    std::int32_t *excess[LINEARS];
    float *chosen_step[LINEARS], *chosen_shift[LINEARS], *chosen_count[LINEARS];
    float *q, *k, *v, *mixed, *inner;  // [B, their channels]
    float *scores;                     // [B, heads, held + 1]
};

// The most that any block needs of anything.
struct Extent {
    long channels = 0, tiles = 0, read = 0, inner = 0, terms = 1;

    void cover(const DecodeSite &site) {
        channels = site.channels > channels ? site.channels : channels;
        tiles = site.tiles > tiles ? site.tiles : tiles;
        terms = site.exact ? EXACT_TERMS : terms;
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
        all.cover(block->qkv), all.cover(block->output), all.cover(block->up), all.cover(block->down);
        all.inner = block->down.channels > all.inner ? block->down.channels : all.inner;
    }
    return all;
}

Shared share(Arena &arena, const DecodeStep &step, const Extent &most) {
    Shared s = {};
    const long T = most.terms * step.B, wide = step.heads * step.width, narrow = step.kv_heads * step.width;
    s.a = arena.take<std::int8_t>(T * most.tiles * PLANAR_TILE);
    s.step = arena.take<float>(T * most.tiles);
    s.shift = arena.take<float>(T * most.tiles);
    s.count = arena.take<float>(T * most.tiles);
    s.broken = arena.take<bool>(step.B);
    for (int i = 0; i < LINEARS; ++i) {
        s.packed[i] = arena.take<std::int8_t>(T * most.read * PLANAR_TILE);
        s.chosen_a[i] = arena.take<std::int8_t>(T * most.read * PLANAR_TILE);
        s.excess[i] = arena.take<std::int32_t>(T * most.read);
        s.chosen_step[i] = arena.take<float>(T * most.read);
        s.chosen_shift[i] = arena.take<float>(T * most.read);
        s.chosen_count[i] = arena.take<float>(T * most.read);
    }
    s.q = arena.take<float>(step.B * wide);
    s.k = arena.take<float>(step.B * narrow);
    s.v = arena.take<float>(step.B * narrow);
    s.mixed = arena.take<float>(step.B * wide);
    s.inner = arena.take<float>(step.B * most.inner);
    s.scores = arena.take<float>(step.B * step.heads * (step.held + 1));
    return s;
}

Own own(Arena &arena, const DecodeStep &step, const Extent &most) {
    const long D = step.width, repeats = step.heads / step.kv_heads;
    Own mine;
    mine.x = arena.take<float>(most.channels);
    mine.spare = arena.take<float>(most.channels);
    mine.rows = arena.take<float>(2 * step.B * PLANAR_ROWS);
    mine.query = arena.take<float>(repeats * D);
    mine.key = arena.take<float>(D);
    mine.value = arena.take<float>(D);
    mine.run = arena.take<float>(DECODE_RUN * D);
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
};

// use(i) for all items below `items`, by whichever thread; returns when all are done.
template <class Use>
void each(Worker &w, long items, Use use) {
    Counter *phase = w.phase, &done = phase[w.team];
    w.phase += w.team + 1;
    for (long i = 0; i < w.team; ++i) {
        const long run = (w.thread + i) % w.team, start = items * run / w.team, end = items * (run + 1) / w.team;
        const long share = (end - start) / CLAIMS, some = w.team == 1 ? end : share > 1 ? share : 1;
        for (;;) {
            const long from = start + phase[run].n.fetch_add(some, std::memory_order_relaxed);
            if (from >= end) break;
            const long to = from + some < end ? from + some : end;
            for (long item = from; item < to; ++item) use(item);
            done.n.fetch_add(to - from, std::memory_order_acq_rel);
        }
    }
    wait(done, items);
}

// x as sums of EXACT_TERMS codes a number, each of what those before left over, as lowbit.integer.exact_codes. Term n lies n B rows on.
void exact_codes(const Worker &w, const DecodeSite &site, long b) {
    const long B = w.step.B, G = site.tiles;
    const float tiny = std::numeric_limits<float>::min(), nan = std::numeric_limits<float>::quiet_NaN();
    for (long g = 0; g < G; ++g) {
        const long from = g * PLANAR_TILE, left = site.channels - from, n = left < 0 ? 0 : left < PLANAR_TILE ? left : PLANAR_TILE;
        float x[PLANAR_TILE] = {}, low = 0, high = 0;
        std::memcpy(x, w.mine.x + from, n * sizeof(float));
        const bool broken = w.planar.extremes(x, PLANAR_TILE, &low, &high) || high - low > std::numeric_limits<float>::max();
        float step = (high > -low ? high : -low) / 127;
        step = step > tiny ? step : tiny;
        for (long term = 0; term < EXACT_TERMS; ++term) {
            const long row = (term * B + b) * G + g;
            std::int8_t *a = w.shared.a + row * PLANAR_TILE;
            int sum = 0;
            for (long i = 0; i < PLANAR_TILE; ++i) {
                float code = broken ? 0 : std::rint(x[i] / step);
                code = code > 127 ? 127 : code < -127 ? -127 : code;
                x[i] -= code * step;
                a[i] = static_cast<std::int8_t>(code);
                sum += a[i];
            }
            w.shared.step[row] = broken ? nan : step;
            w.shared.shift[row] = 0;
            w.shared.count[row] = broken ? nan : step * static_cast<float>(sum);
            step = step / 254 > tiny ? step / 254 : tiny;
        }
    }
}

// The tiles that a linear reads, beside each other, of token t.
void choose_tiles(const Worker &w, const DecodeLinear &linear, int i, long tiles, long t) {
    const Shared &s = w.shared;
    const long G = 2 * linear.weight.units;
    for (long g = 0; g < G; ++g) {
        const long from = t * tiles + linear.reads[g], to = t * G + g;
        std::memcpy(s.chosen_a[i] + to * PLANAR_TILE, s.a + from * PLANAR_TILE, PLANAR_TILE);
        s.chosen_step[i][to] = s.step[from];
        s.chosen_shift[i][to] = s.shift[from];
        s.chosen_count[i][to] = s.count[from];
    }
}

PlanarActivations activations_of(const Worker &w, const DecodeSite &site, int i) {
    const Shared &s = w.shared;
    const DecodeLinear &linear = site.linears[i];
    const long G = 2 * linear.weight.units, terms = site.exact ? EXACT_TERMS : 1;
    const bool all = !linear.reads;
    const float *shift = all ? s.shift : s.chosen_shift[i];
    return {terms * w.step.B, G, terms, all ? s.a : s.chosen_a[i], all ? s.step : s.chosen_step[i], site.shifted ? shift : nullptr,
            G, all ? s.count : s.chosen_count[i], s.packed[i], s.excess[i]};
}

// Rotates and rounds token b, which is in mine.x, for the site's linears.
void round_token(const Worker &w, const DecodeSite &site, long b) {
    const Shared &s = w.shared;
    const long B = w.step.B, G = site.tiles, terms = site.exact ? EXACT_TERMS : 1;
    w.path.rotate(site.rotation, w.mine.x, site.channels, w.mine.spare);
    if (site.exact) exact_codes(w, site, b);
    else
        planar_quantize_token(w.planar, site.clusters, G, w.mine.x, s.a + b * G * PLANAR_TILE, s.step + b * G, s.shift + b * G,
                              s.count + b * G);
    s.broken[b] = false;
    for (long g = 0; g < G; ++g) s.broken[b] |= s.count[b * G + g] != s.count[b * G + g];
    for (int i = 0; i < site.count; ++i) {
        const PlanarActivations x = activations_of(w, site, i);
        for (long t = b; t < terms * B; t += B) {
            if (site.linears[i].reads) choose_tiles(w, site.linears[i], i, G, t);
            w.planar.pack(x, static_cast<int>(site.linears[i].weight.bits), t, t + 1);
        }
    }
}

void round_normed(Worker &w, const DecodeNorm &norm, const DecodeSite &site) {
    each(w, w.step.B, [&](long b) {
        w.path.norm(norm, w.step.hidden + b * w.step.C, w.step.C, w.mine.spare, w.mine.x);
        w.path.rotate(norm.rotation, w.mine.x, w.step.C, w.mine.spare);
        round_token(w, site, b);
    });
}

void round_plain(Worker &w, const float *x, const DecodeSite &site) {
    each(w, w.step.B, [&](long b) {
        std::memcpy(w.mine.x, x + b * site.channels, site.channels * sizeof(float));
        round_token(w, site, b);
    });
}

float on_grid(const DecodeLinear &linear, long row, float y) {
    if (!linear.scale || linear.top[row] < 0) return y;
    const float s = linear.scale[row], z = linear.zero[row], top = linear.top[row], q = std::rint(y / s) + z;
    return ((q < 0 ? 0 : q > top ? top : q) - z) * s;
}

long blocks_of(const DecodeLinear &linear) { return (linear.weight.R + PLANAR_ROWS - 1) / PLANAR_ROWS; }

// Rows of the site's linear i from block `block` on, bias and output grids and all: y [B, PLANAR_ROWS]. Returns how many.
long rows_of(const Worker &w, const DecodeSite &site, int i, long block, float *y) {
    const DecodeLinear &linear = site.linears[i];
    const long row = block * PLANAR_ROWS, left = linear.weight.R - row, rows = left < PLANAR_ROWS ? left : PLANAR_ROWS;
    PlanarBlock part = planar_block(linear.weight, row);
    if (rows < PLANAR_ROWS) part.first = linear.tail_first, part.second = linear.tail_second, part.bias = linear.tail_bias;
    const PlanarActivations x = activations_of(w, site, i);
    planar_tokens(w.planar, x, static_cast<int>(linear.weight.bits), part, rows, y, PLANAR_ROWS);
    const long B = w.step.B;
    for (long b = 0; b < B; ++b)
        for (long r = 0; r < rows; ++r) {
            float &sum = y[b * PLANAR_ROWS + r];
            sum = w.shared.broken[b] ? std::numeric_limits<float>::quiet_NaN() : on_grid(linear, row + r, sum);
        }
    return rows;
}

void project(Worker &w, const DecodeSite &site) {
    float *to[LINEARS] = {w.shared.q, w.shared.k, w.shared.v}, *y = w.mine.rows;
    long ends[LINEARS], all = 0;
    for (int i = 0; i < LINEARS; ++i) ends[i] = all += blocks_of(site.linears[i]);
    each(w, all, [&](long block) {
        const int i = block < ends[0] ? 0 : block < ends[1] ? 1 : 2;
        if (i) block -= ends[i - 1];
        const long rows = rows_of(w, site, i, block, y), R = site.linears[i].weight.R;
        for (long b = 0; b < w.step.B; ++b)
            std::memcpy(to[i] + b * R + block * PLANAR_ROWS, y + b * PLANAR_ROWS, rows * sizeof(float));
    });
}

// Adds the site's only linear to the hidden states.
void add_to_hidden(Worker &w, const DecodeSite &site) {
    float *y = w.mine.rows;
    each(w, blocks_of(site.linears[0]), [&](long block) {
        const long rows = rows_of(w, site, 0, block, y);
        for (long b = 0; b < w.step.B; ++b)
            for (long r = 0; r < rows; ++r) w.step.hidden[b * w.step.C + block * PLANAR_ROWS + r] += y[b * PLANAR_ROWS + r];
    });
}

void widen(Worker &w, const DecodeBlock &block) {
    const DecodeSite &site = block.up;
    const bool gated = site.count == 2;
    const long B = w.step.B, F = site.linears[0].weight.R;
    float *gate = w.mine.rows, *up = gate + B * PLANAR_ROWS;
    each(w, blocks_of(site.linears[0]), [&](long part) {
        const long rows = rows_of(w, site, 0, part, gate);
        if (gated) rows_of(w, site, 1, part, up);
        for (long b = 0; b < B; ++b)
            w.path.activate(block.activation, gate + b * PLANAR_ROWS, gated ? up + b * PLANAR_ROWS : nullptr, rows,
                            w.shared.inner + b * F + part * PLANAR_ROWS);
    });
}

// The heads of sequence task / kv_heads that share KV head task % kv_heads.
DecodeHeads heads_of(Worker &w, const DecodeBlock &block, long task, float *scores) {
    const DecodeStep &step = w.step;
    const long D = step.width, H = step.kv_heads, wide = step.heads / H * D;  // [B, heads, D] = [B, H, repeats D]
    return {&step, &block, task / H, task % H, w.mine.query, w.mine.key, w.mine.value, w.mine.run, scores, w.shared.mixed + task * wide};
}

void attend(Worker &w, const DecodeBlock &block) {
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

void run_block(Worker &w, const DecodeBlock &block) {
    round_normed(w, block.attention_norm, block.qkv);
    project(w, block.qkv);
    attend(w, block);
    round_plain(w, w.shared.mixed, block.output);
    add_to_hidden(w, block.output);
    round_normed(w, block.mlp_norm, block.up);
    widen(w, block);
    round_plain(w, w.shared.inner, block.down);
    add_to_hidden(w, block.down);
}

}  // namespace

// Bytes of scratch that `threads` threads need for this step.
EXPORT long lowbit_decode_scratch(int threads, const DecodeStep *step) {
    Arena arena = {nullptr};
    const Extent most = extent_of(*step);
    arena.take<Counter>(PHASES * step->blocks * (threads + 1));
    share(arena, *step, most);
    for (int i = 0; i < threads; ++i) own(arena, *step, most);
    return arena.used;
}

// Runs the step: hidden in place, one token appended to every cache. scratch: as many bytes as the above says, at a multiple of 64.
// Returns 0; 2 where this machine lacks the path.
EXPORT int lowbit_decode(int path, int threads, const DecodeStep *step, char *scratch) {
    const DecodePath *chosen = select_path(path);
    const PlanarPath *planar = planar_path(path);
    if (!chosen) return 2;
    const Extent most = extent_of(*step);
    Arena arena = {scratch};
    const long counters = PHASES * step->blocks * (threads + 1);
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
        Worker worker = {*chosen, *planar, *step, shared, mine, team, thread, phases};
        for (long i = 0; i < step->blocks; ++i) run_block(worker, step->block[i]);
    }
    return 0;
}
