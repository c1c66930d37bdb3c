// C entries of the integer linear over the planar layout: quantize activations, and spread blocks of rows over threads.
#include "planar.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

const PlanarPath *planar_path(int path) {
#ifdef LOWBIT_X86
    if (path != PORTABLE && has_avx2()) return &avx2_planar_path;
#endif
    return path == AVX2 ? nullptr : &portable_planar_path;
}

namespace {

// Rounded to bfloat16, to even; not for NaN.
float brief(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

struct Grid {
    float scale, zero, top, offset;
    bool broken;  // no grid, because of NaN or infinities
};

Grid own_grid(const PlanarPath &path, const PlanarClusters &clusters, long c, const float *x) {
    Grid grid = {0, 0, static_cast<float>((1 << clusters.bits[c]) - 1), 128, false};
    float low, high;
    grid.broken = path.extremes(x, clusters.sizes[c], &low, &high);
    const float width = (high - low) / grid.top, tiny = std::numeric_limits<float>::min();
    grid.scale = width > tiny ? width : tiny;
    if (clusters.brief) grid.scale = brief(grid.scale);
    grid.broken |= !(grid.scale <= std::numeric_limits<float>::max());
    grid.zero = grid.broken ? 0 : std::rint(-low / grid.scale);
    if (clusters.bits[c] < 8) grid.offset = grid.zero;
    return grid;
}

Grid static_grid(const PlanarClusters &clusters, long c) {
    const float middle = static_cast<float>(1 << (clusters.bits[c] - 1));
    return {clusters.scale[c], clusters.zero[c], 2 * middle - 1, middle, false};
}

// One tile of a token; `step` is null where all tokens share theirs.
void quantize_tile(const PlanarPath &path, const Grid &grid, const float *x, long n, std::int8_t *a, float *step, float *shift,
                   float *count) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    bool broken = grid.broken;
    if (broken) std::memset(a, 0, PLANAR_TILE);
    else broken = path.codes(x, n, grid.scale, grid.zero, grid.top, grid.offset, a);
    int sum = 0;
    for (long i = 0; i < PLANAR_TILE; ++i) sum += a[i];
    *count = broken ? nan : grid.scale * static_cast<float>(sum);
    if (!step) return;
    *step = broken ? nan : grid.scale;
    if (shift) *shift = grid.offset == grid.zero ? 0.0f : *step * (grid.offset - grid.zero);
}

}  // namespace

void planar_quantize_token(const PlanarPath &path, const PlanarClusters &clusters, long tiles, const float *x, std::int8_t *a,
                           float *step, float *shift, float *count) {
    long tile = 0;
    for (long c = 0; c < clusters.count; ++c) {
        const long size = clusters.sizes[c];
        const Grid grid = clusters.scale ? static_grid(clusters, c) : own_grid(path, clusters, c, x);
        for (long done = 0; done < size; done += PLANAR_TILE, ++tile) {
            const long n = size - done < PLANAR_TILE ? size - done : PLANAR_TILE;
            quantize_tile(path, grid, x + done, n, a + tile * PLANAR_TILE, step ? step + tile : nullptr,
                          shift ? shift + tile : nullptr, count + tile);
        }
        x += size;
    }
    for (long e = 0; e < clusters.again; ++e, ++tile) {
        const long source = clusters.repeats[e];
        std::memcpy(a + tile * PLANAR_TILE, a + source * PLANAR_TILE, PLANAR_TILE);
        count[tile] = count[source];
        if (step) step[tile] = step[source];
        if (shift) shift[tile] = shift[source];
    }
    for (; tile < tiles; ++tile) {
        std::memset(a + tile * PLANAR_TILE, 0, PLANAR_TILE);
        count[tile] = 0;
        if (step) step[tile] = 1;
        if (shift) shift[tile] = 0;
    }
}

void planar_exact_token(const PlanarPath &path, long C, long tiles, long stride, const float *x, std::int8_t *a, float *step,
                        float *shift, float *count) {
    const float tiny = std::numeric_limits<float>::min(), nan = std::numeric_limits<float>::quiet_NaN();
    for (long g = 0; g < tiles; ++g) {
        const long from = g * PLANAR_TILE, left = C - from, n = left < 0 ? 0 : left < PLANAR_TILE ? left : PLANAR_TILE;
        float rest[PLANAR_TILE] = {}, low = 0, high = 0;
        std::memcpy(rest, x + from, n * sizeof(float));
        const bool broken = path.extremes(rest, PLANAR_TILE, &low, &high) || high - low > std::numeric_limits<float>::max();
        float size = (high > -low ? high : -low) / 127;
        size = size > tiny ? size : tiny;
        for (long term = 0; term < EXACT_TERMS; ++term) {
            const long at = term * stride * tiles + g;
            std::int8_t *codes = a + at * PLANAR_TILE;
            int sum = 0;
            for (long i = 0; i < PLANAR_TILE; ++i) {
                float code = broken ? 0 : std::rint(rest[i] / size);
                code = code > 127 ? 127 : code < -127 ? -127 : code;
                rest[i] -= code * size;
                codes[i] = static_cast<std::int8_t>(code);
                sum += codes[i];
            }
            step[at] = broken ? nan : size;
            if (shift) shift[at] = 0;
            count[at] = broken ? nan : size * static_cast<float>(sum);
            size = size / 254 > tiny ? size / 254 : tiny;
        }
    }
}

namespace {

// The step and shift of all tokens.
void share_grids(const PlanarClusters &clusters, long tiles, float *step, float *shift) {
    long tile = 0;
    for (long c = 0; c < clusters.count; ++c) {
        const Grid grid = static_grid(clusters, c);
        for (long done = 0; done < clusters.sizes[c]; done += PLANAR_TILE, ++tile) {
            step[tile] = grid.scale;
            shift[tile] = grid.scale * (grid.offset - grid.zero);
        }
    }
    for (long e = 0; e < clusters.again; ++e, ++tile) {
        step[tile] = step[clusters.repeats[e]];
        shift[tile] = shift[clusters.repeats[e]];
    }
    for (; tile < tiles; ++tile) step[tile] = 1, shift[tile] = 0;
}

// Whether clusters cover C channels, boundaries between tiles, at bits the kernels take, and repeats are among their tiles.
bool fits(const PlanarClusters &clusters, long C) {
    long end = 0;
    for (long e = 0; e < clusters.again; ++e)
        if (clusters.repeats[e] < 0 || clusters.repeats[e] * PLANAR_TILE >= C) return false;
    for (long c = 0; c < clusters.count; ++c) {
        const std::int64_t size = clusters.sizes[c];
        if (size < 0 || size > C - end || clusters.bits[c] < 2 || clusters.bits[c] > 8) return false;
        if (size && end % PLANAR_TILE) return false;
        end += size;
    }
    return end == C;
}

std::size_t whole_lines(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

void planar_tokens(const PlanarPath &path, const PlanarActivations &x, int bits, const PlanarBlock &w, long rows, float *y, long R) {
    for (long from = 0; from < x.T; from += PLANAR_TOKENS) {
        const long to = from + PLANAR_TOKENS < x.T ? from + PLANAR_TOKENS : x.T;
        path.rows(x, bits, w, rows, from, to, y, R);
    }
}

PlanarBlock planar_block(const PlanarWeight &w, long row) {
    const long cells = 2 * w.units * PLANAR_ROWS, next = w.octets * cells;
    const std::uint8_t *tables = w.tables + row / PLANAR_ROWS * next, *sums = tables + next - sizeof(std::int16_t) * cells;
    const bool zeros = w.octets % 2;
    return {w.first + row * w.units * first_bytes(w.bits),
            w.second ? w.second + row * w.units * second_bytes(w.bits) : nullptr,
            tables,
            zeros ? reinterpret_cast<const std::int8_t *>(sums - cells) : nullptr,
            reinterpret_cast<const std::int16_t *>(sums),
            w.octets > 5,
            w.bias ? w.bias + row : nullptr,
            next};
}

namespace {

// The last rows where they do not fill a block, zeros after them. Returns what to free; null where memory ran out.
void *pad_tail(const PlanarWeight &w, PlanarBlock &tail) {
    const long full = w.R / PLANAR_ROWS * PLANAR_ROWS, rows = w.R - full;
    const std::size_t a = w.units * first_bytes(w.bits), b = w.units * second_bytes(w.bits);
    char *memory = static_cast<char *>(std::calloc(PLANAR_ROWS, a + b + sizeof(float)));
    if (!memory) return nullptr;
    tail = planar_block(w, full);
    char *second = memory + PLANAR_ROWS * a, *bias = second + PLANAR_ROWS * b;
    std::memcpy(memory, tail.first, rows * a);
    tail.first = reinterpret_cast<std::uint8_t *>(memory);
    if (tail.second) tail.second = static_cast<std::uint8_t *>(std::memcpy(second, tail.second, rows * b));
    if (tail.bias) tail.bias = static_cast<float *>(std::memcpy(bias, tail.bias, rows * sizeof(float)));
    return memory;
}

// y of all tokens, by the threads of the parallel region that this is called in.
void spread_rows(const PlanarPath &path, int threads, const PlanarActivations &x, const PlanarWeight &w, const PlanarBlock &tail,
                 float *y) {
    constexpr long SHARES = 8;  // of each thread: whoever wakes late or loses its core holds up the others by one
    const long blocks = (w.R + PLANAR_ROWS - 1) / PLANAR_ROWS, team = blocks < threads ? blocks : threads;
    const long wanted = team == 1 ? 1 : team * SHARES, parts = blocks < wanted ? blocks : wanted;
#pragma omp for schedule(dynamic)
    for (long part = 0; part < parts; ++part)
        // All rows for some tokens before the next ones: their codes stay in the cache.
        for (long from = 0; from < x.T; from += PLANAR_TOKENS) {
            const long to = from + PLANAR_TOKENS < x.T ? from + PLANAR_TOKENS : x.T;
            for (long block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block) {
                const long row = block * PLANAR_ROWS, left = w.R - row;
                const bool whole = left >= PLANAR_ROWS;
                path.rows(x, w.bits, whole ? planar_block(w, row) : tail, whole ? PLANAR_ROWS : left, from, to, y + row, w.R);
            }
        }
}

// A token with NaN in its counts has NaN in its outputs, also where no zero point multiplies them.
void spread_nan(const PlanarActivations &x, long R, float *y) {
    for (long t = 0; t < x.T; ++t) {
        bool nan = false;
        for (long g = 0; g < x.tiles; ++g) nan |= x.count[t * x.tiles + g] != x.count[t * x.tiles + g];
        if (nan)
            for (long r = 0; r < R; ++r) y[t % (x.T / x.terms) * R + r] = std::numeric_limits<float>::quiet_NaN();
    }
}

// y, when ready(t) has been called for each token, whose codes it may make. False where memory ran out.
template <class Ready>
bool multiply(const PlanarPath &path, int threads, const PlanarActivations &x, const PlanarWeight &w, float *y, Ready ready) {
    PlanarBlock tail = {};
    void *padded = pad_tail(w, tail);
    if (!padded) return false;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long t = 0; t < x.T; ++t) {
            ready(t);
            path.pack(x, static_cast<int>(w.bits), t, t + 1);
        }
        spread_rows(path, threads, x, w, tail, y);
    }
    spread_nan(x, w.R, y);
    std::free(padded);
    return true;
}

// Memory that ends with its scope: `bytes` in whole lines, null where there is none.
struct Scratch {
    char *start;
    explicit Scratch(std::size_t bytes) : start(static_cast<char *>(std::aligned_alloc(64, whole_lines(bytes)))) {}
    ~Scratch() { std::free(start); }
    Scratch(const Scratch &) = delete;
};

}  // namespace

// Codes a [T, 64 tiles], count [T, tiles], step and shift [T, tiles]; with scale and zero, of static grids, step and shift [tiles].
// Without them shift may be null.
// Returns 0; 2 where this machine lacks the path; 3 for clusters that do not fit.
EXPORT int lowbit_planar_quantize(int path, int threads, long T, long C, long tiles, long clusters, long again, long brief_steps,
                                  const float *x, const float *scale, const float *zero, const std::uint8_t *bits,
                                  const std::int64_t *sizes, const std::int64_t *repeats, std::int8_t *a, float *step,
                                  float *shift, float *count) {
    const PlanarPath *chosen = planar_path(path);
    if (!chosen) return 2;
    const PlanarClusters all = {clusters, scale, zero, bits, sizes, repeats, again, brief_steps != 0};
    if (!fits(all, C)) return 3;
    if (scale) {
        share_grids(all, tiles, step, shift);
        step = shift = nullptr;
    }
    // Fewer numbers than this are not worth a thread.
    const long worth = T * C >> 15, parts = worth < 1 ? 1 : worth < threads ? worth : threads;
#pragma omp parallel for num_threads(parts) schedule(static)
    for (long t = 0; t < T; ++t)
        planar_quantize_token(*chosen, all, tiles, x + t * C, a + t * tiles * PLANAR_TILE, step ? step + t * tiles : nullptr,
                              shift ? shift + t * tiles : nullptr, count + t * tiles);
    return 0;
}

// Tokens x [T, C] that have no grid: a [EXACT_TERMS T, 64 tiles], step and count [EXACT_TERMS T, tiles], all first codes before all second
// ones. Returns 0; 2 where this machine lacks the path.
EXPORT int lowbit_planar_exact(int path, int threads, long T, long C, long tiles, const float *x, std::int8_t *a, float *step, float *count) {
    const PlanarPath *chosen = planar_path(path);
    if (!chosen) return 2;
    const long worth = T * C >> 15, parts = worth < 1 ? 1 : worth < threads ? worth : threads;
#pragma omp parallel for num_threads(parts) schedule(static)
    for (long t = 0; t < T; ++t)
        planar_exact_token(*chosen, C, tiles, T, x + t * C, a + t * tiles * PLANAR_TILE, step + t * tiles, nullptr, count + t * tiles);
    return 0;
}

// y [T / terms, R]. Returns 0; 1 where memory ran out; 2 where this machine lacks the path. Absent arrays are null.
EXPORT int lowbit_planar_linear(int path, int threads, long bits, long T, long terms, long tiles, long R, long octets, long grid_stride,
                                const std::int8_t *a, const float *step, const float *shift, const float *count,
                                const std::uint8_t *first, const std::uint8_t *second, const std::uint8_t *tables, const float *bias, float *y) {
    const PlanarPath *chosen = planar_path(path);
    if (!chosen) return 2;
    const std::size_t entries = T * tiles * PLANAR_TILE;
    const Scratch scratch(entries + T * tiles * sizeof(std::int32_t));
    if (!scratch.start) return 1;
    const PlanarWeight w = {bits, tiles / 2, R, first, second, tables, octets, bias};
    const PlanarActivations x = {T,           tiles, terms, a, step, shift, grid_stride, count, reinterpret_cast<std::int8_t *>(scratch.start),
                                 reinterpret_cast<std::int32_t *>(scratch.start + entries)};
    return multiply(*chosen, threads, x, w, y, [](long) {}) ? 0 : 1;
}

// lowbit_planar_quantize and lowbit_planar_linear of what it makes, in one go: x [T, C], y [T, R].
// Returns 0; 1 where memory ran out; 2 where this machine lacks the path; 3 for clusters that do not fit.
EXPORT int lowbit_planar_product(int path, int threads, long T, long C, long tiles, long clusters, long again, long brief_steps, long bits,
                                 long R, long octets, const float *x, const float *scale, const float *zero, const std::uint8_t *widths,
                                 const std::int64_t *sizes, const std::int64_t *repeats, const std::uint8_t *first,
                                 const std::uint8_t *second, const std::uint8_t *tables, const float *bias, float *y) {
    const PlanarPath *chosen = planar_path(path);
    if (!chosen) return 2;
    const PlanarClusters all = {clusters, scale, zero, widths, sizes, repeats, again, brief_steps != 0};
    if (!fits(all, C)) return 3;
    bool shifted = scale != nullptr;
    for (long c = 0; c < clusters; ++c) shifted |= widths[c] == 8;
    const long cells = T * tiles, grids = scale ? tiles : cells, entries = cells * PLANAR_TILE;
    const Scratch scratch(2 * entries + sizeof(float) * (cells + 2 * grids) + sizeof(std::int32_t) * cells);
    if (!scratch.start) return 1;
    std::int8_t *a = reinterpret_cast<std::int8_t *>(scratch.start), *packed = a + entries;
    float *step = reinterpret_cast<float *>(packed + entries), *shift = step + grids, *count = shift + grids;
    if (scale) share_grids(all, tiles, step, shift);
    const PlanarWeight w = {bits, tiles / 2, R, first, second, tables, octets, bias};
    const PlanarActivations codes = {T,     tiles,  1, a, step, shifted ? shift : nullptr, scale ? 0 : tiles, count, packed,
                                     reinterpret_cast<std::int32_t *>(count + cells)};
    const bool done = multiply(*chosen, threads, codes, w, y, [&](long t) {
        planar_quantize_token(*chosen, all, tiles, x + t * C, a + t * tiles * PLANAR_TILE, scale ? nullptr : step + t * tiles,
                              scale || !shifted ? nullptr : shift + t * tiles, count + t * tiles);
    });
    return done ? 0 : 1;
}
