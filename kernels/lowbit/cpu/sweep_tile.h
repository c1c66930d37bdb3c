// The sweep over one tile: a few rows of W, all steps of the block. Included once per instruction set, by a file that has
// defined vec and ivec (vectors of float and int32), load, store, load_mask, store_mask (a byte is 0 or 1, a lane 0 or -1),
// broadcast, round_even and fnmadd(a, b, c) = c - a b.
//
// Left-looking: a panel of steps collects the errors of all steps before it while it sits in registers, so that each error is
// read, not written, once per panel; inside the panel every step updates those after it. Errors are added in step order.
#include <cstring>

#include "sweep.h"

namespace {

constexpr long LANES = sizeof(vec) / sizeof(float);
constexpr int WIDE = 2;  // vectors side by side: their chains hide each other's latency
constexpr long TILE = WIDE * LANES;

// Row i of a tile starts at pointer + i * stride; a tile narrower than TILE is copied to scratch and back.
struct Tile {
    const float *W1;
    const std::uint8_t *mask;
    const float *scale, *low, *high;
    float *values;
    std::uint8_t *kept;
    float *errors;
    long stride;
    float *history;       // [b, TILE]: errors of finished steps, weights of those that a group has brought up to date
    float *scores;        // [b, TILE]
    std::uint8_t *chosen; // [b, TILE]
};

// w[i] -= sum over steps j in [from, to) of U[j, s + i] / U_jj * e[j]; u is the panel's part of the packed steps.
template <int H>
inline void absorb(vec (&w)[H][WIDE], const float *u, const float *history, long from, long to) {
    for (long j = from; j < to; ++j) {
        vec e[WIDE];
        for (int k = 0; k < WIDE; ++k) e[k] = load(history + j * TILE + k * LANES);
        for (int i = 0; i < H; ++i) {
            vec step = broadcast(u[j * H + i]);
            for (int k = 0; k < WIDE; ++k) w[i][k] = fnmadd(step, e[k], w[i][k]);
        }
    }
}

// Rows of W lie far apart: ask for what the panel needs before its sums, which take long enough for it to arrive.
template <class T>
inline void prefetch(const T *p, const Tile &t, long s, int height) {
    for (int i = 0; p && i < height; ++i) __builtin_prefetch(p + (s + i) * t.stride);
}

// Bring steps s .. s + H - 1 up to date with all errors before step `to`, where their group starts.
template <int H>
void refresh(const Tile &t, const float *u, long s, long to) {
    vec w[H][WIDE];
    for (int i = 0; i < H; ++i)
        for (int k = 0; k < WIDE; ++k) w[i][k] = load(t.W1 + (s + i) * t.stride + k * LANES);
    absorb<H>(w, u, t.history, 0, to);
    for (int i = 0; i < H; ++i)
        for (int k = 0; k < WIDE; ++k) store(t.history + (s + i) * TILE + k * LANES, w[i][k]);
}

// Finish steps s .. s + H - 1, which are up to date with the errors before `from`.
template <int H, bool MASKED, bool QUANTIZED>
void finish(const Tile &t, const float *u, long s, long from) {
    vec w[H][WIDE];
    for (int i = 0; i < H; ++i)
        for (int k = 0; k < WIDE; ++k) w[i][k] = load(t.history + (s + i) * TILE + k * LANES);
    if (t.chosen) {
        prefetch(t.W1, t, s + H, H);
        prefetch(t.kept, t, s + H, H);
    }
    if (MASKED) prefetch(t.mask, t, s, H);
    if (QUANTIZED) {
        prefetch(t.scale, t, s, H);
        prefetch(t.low, t, s, H);
        prefetch(t.high, t, s, H);
    }
    prefetch(t.values, t, s, H);
    prefetch(t.errors, t, s, H);
    absorb<H>(w, u, t.history, from, s);
    const std::uint8_t *alive = t.chosen ? t.chosen : t.mask;
    const long alive_stride = t.chosen ? TILE : t.stride;
    for (int i = 0; i < H; ++i) {
        vec e[WIDE];
        for (int k = 0; k < WIDE; ++k) {
            const long at = (s + i) * t.stride + k * LANES;
            vec value = w[i][k];
            if (QUANTIZED) {
                value = round_even(value / load(t.scale + at));
                // NaN fails both comparisons and stays.
                const vec low = load(t.low + at), high = load(t.high + at);
                value = value < low ? low : value;
                value = value > high ? high : value;
            }
            if (MASKED) value = load_mask(alive + (s + i) * alive_stride + k * LANES) ? value : vec{};
            e[k] = QUANTIZED ? fnmadd(value, load(t.scale + at), w[i][k]) : w[i][k] - value;
            store(t.values + at, value + vec{});  // -0 + 0 is +0
            store(t.errors + at, e[k]);
            store(t.history + (s + i) * TILE + k * LANES, e[k]);
        }
        for (int j = i + 1; j < H; ++j) {
            vec step = broadcast(u[(s + i) * H + j]);
            for (int k = 0; k < WIDE; ++k) w[j][k] = fnmadd(step, e[k], w[j][k]);
        }
    }
}

// Which steps of the group [from, to) are kept in each row of W: the best by w^2 score, the later of two equals. Scores are
// compared by their bits, which order all floats of one sign: a NaN is the largest, and exactly `budget` are chosen.
void choose(const Sweep &sweep, const Tile &t, long from, long to) {
    const long budget = (sweep.keep * (to - from) + sweep.group - 1) / sweep.group;
    for (long at = from * TILE; at < to * TILE; at += LANES) {
        const vec w = load(t.history + at);
        ivec score = reinterpret_cast<ivec>(w * w * broadcast(sweep.score[at / TILE])) & 0x7fffffff;
        if (t.mask) score |= ~load_mask(t.mask + at / TILE * t.stride + at % TILE);  // -1: below all others
        store(t.scores + at, reinterpret_cast<vec>(score));
    }
    const auto score = [&t](long at) { return reinterpret_cast<ivec>(load(t.scores + at)); };
    for (long at = from * TILE; at < to * TILE; at += LANES) {
        const ivec mine = score(at);
        ivec better = {};  // minus the number of steps that go before this one
        long other = from * TILE + at % TILE;
        for (; other < at; other += TILE) better += score(other) > mine;
        for (other += TILE; other < to * TILE; other += TILE) better += ~(mine > score(other));
        ivec chosen = better > -static_cast<std::int32_t>(budget);
        if (t.mask) chosen &= load_mask(t.mask + at / TILE * t.stride + at % TILE);
        store_mask(t.chosen + at, chosen);
        store_mask(t.kept + at / TILE * t.stride + at % TILE, chosen);
    }
}

template <int H>
void finish_as_asked(const Tile &t, const float *u, long s, long from) {
    const bool masked = t.mask || t.chosen;
    if (masked && t.scale) return finish<H, true, true>(t, u, s, from);
    if (masked) return finish<H, true, false>(t, u, s, from);
    if (t.scale) return finish<H, false, true>(t, u, s, from);
    finish<H, false, false>(t, u, s, from);
}

void refresh_panel(const Tile &t, const float *u, long s, long height, long to) {
    switch (height) {
        case 4: return refresh<4>(t, u, s, to);
        case 3: return refresh<3>(t, u, s, to);
        case 2: return refresh<2>(t, u, s, to);
        default: return refresh<1>(t, u, s, to);
    }
}

void finish_panel(const Tile &t, const float *u, long s, long height, long from) {
    switch (height) {
        case 4: return finish_as_asked<4>(t, u, s, from);
        case 3: return finish_as_asked<3>(t, u, s, from);
        case 2: return finish_as_asked<2>(t, u, s, from);
        default: return finish_as_asked<1>(t, u, s, from);
    }
}

void sweep_full_tile(const Sweep &sweep, const Tile &t) {
    const float *u = sweep.steps;
    for (long from = 0; from < sweep.b; from += sweep.group) {
        const long to = from + sweep.group < sweep.b ? from + sweep.group : sweep.b;
        const float *panel = u;
        for (long s = from; s < to; s += PANEL) {
            const long height = to - s < PANEL ? to - s : PANEL;
            refresh_panel(t, panel, s, height, from);
            panel += (s + height) * height;
        }
        if (t.chosen) choose(sweep, t, from, to);
        for (long s = from; s < to; s += PANEL) {
            const long height = to - s < PANEL ? to - s : PANEL;
            finish_panel(t, u, s, height, from);
            u += (s + height) * height;
        }
    }
}

// Copy `lanes` of each row into rows of TILE; the rest holds `filler`, whose results nobody reads.
template <class T>
const T *widen(T *to, const T *from, const Sweep &sweep, long lanes, T filler) {
    if (!from) return nullptr;
    for (long i = 0; i < sweep.b; ++i)
        for (long k = 0; k < TILE; ++k) to[i * TILE + k] = k < lanes ? from[i * sweep.R + k] : filler;
    return to;
}

template <class T>
void narrow(T *to, const T *from, const Sweep &sweep, long lanes) {
    for (long i = 0; i < sweep.b; ++i) std::memcpy(to + i * sweep.R, from + i * TILE, lanes * sizeof(T));
}

// Floats: history, scores and a narrow tile's W1, scale, low, high, values, errors. Bytes: chosen, mask, kept.
constexpr long SCRATCH = TILE * (8 * sizeof(float) + 3);

void sweep_tile(const Sweep &sweep, long row, long lanes, void *scratch) {
    const long size = sweep.b * TILE;
    float *space = static_cast<float *>(scratch);
    std::uint8_t *marks = reinterpret_cast<std::uint8_t *>(space + 8 * size);
    const auto at = [row](auto *p) { return p ? p + row : p; };
    Tile t = {at(sweep.W1), at(sweep.mask), at(sweep.scale), at(sweep.low), at(sweep.high), at(sweep.values),
              at(sweep.kept), at(sweep.errors), sweep.R, space, space + size, sweep.keep ? marks : nullptr};
    if (lanes == TILE) return sweep_full_tile(sweep, t);
    Tile wide = t;
    wide.stride = TILE;
    wide.W1 = widen(space + 2 * size, t.W1, sweep, lanes, 0.0f);
    wide.scale = widen(space + 3 * size, t.scale, sweep, lanes, 1.0f);
    wide.low = widen(space + 4 * size, t.low, sweep, lanes, 0.0f);
    wide.high = widen(space + 5 * size, t.high, sweep, lanes, 0.0f);
    wide.values = space + 6 * size;
    wide.errors = space + 7 * size;
    wide.mask = widen(marks + size, t.mask, sweep, lanes, std::uint8_t{0});
    wide.kept = marks + 2 * size;
    sweep_full_tile(sweep, wide);
    narrow(t.values, wide.values, sweep, lanes);
    narrow(t.errors, wide.errors, sweep, lanes);
    if (sweep.keep) narrow(t.kept, wide.kept, sweep, lanes);
}

}  // namespace
