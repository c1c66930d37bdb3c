// One panel of tokens of the sparse linear. Included once per instruction set, by a file that has defined vec, load, store,
// broadcast and fmadd.
//
// Tokens lie across the vectors, so a nonzero weight is one broadcast and a multiply-add on each of the panel's vectors, whose sums stay
// in registers while a row passes over a tile. Zeros cost nothing; the product is bound by loads, one for each multiply-add.
#include "sparse_linear.h"

namespace {

constexpr long LANES = sizeof(vec) / sizeof(float);
constexpr int VECTORS = 8;  // sums at a time: enough to hide their latency; with more, a tile would outgrow the cache

// columns[c][t] = x[from + t][channel + c]; tokens beyond `to` are 0.
template <int V>
void gather_tile(const SparseLinear &p, long from, long to, long channel, long channels, float *columns) {
    constexpr long WIDTH = V * LANES;
    const float *x = p.x + from * p.C + channel;
    const long C = p.C, tokens = to - from;
    for (long t = 0; t < WIDTH; t += LANES)
        for (long c = 0; c < channels; ++c) {
            vec side_by_side = {};
            for (long k = 0; k < LANES; ++k) side_by_side[k] = t + k < tokens ? x[(t + k) * C + c] : 0.0f;
            store(columns + c * WIDTH + t, side_by_side);
        }
}

template <int V>
inline void add_entry(const SparseLinear &p, std::int64_t entry, const float *columns, vec (&sum)[V]) {
    const vec value = broadcast(p.values[entry]);
    const float *column = columns + p.index[entry] * V * LANES;
    for (int v = 0; v < V; ++v) sum[v] = fmadd(value, load(column + v * LANES), sum[v]);
}

// sums[r] += the tile's part of row r.
template <int V>
void add_tile(const SparseLinear &p, const std::int64_t *starts, long rows, const float *columns, float *sums, bool begin) {
    for (long r = 0; r < rows; ++r, sums += V * LANES) {
        vec sum[V];
        for (int v = 0; v < V; ++v) sum[v] = begin ? vec{} : load(sums + v * LANES);
        std::int64_t entry = starts[r];
        for (; entry + 2 <= starts[r + 1]; entry += 2) {
            add_entry<V>(p, entry, columns, sum);
            add_entry<V>(p, entry + 1, columns, sum);
        }
        if (entry < starts[r + 1]) add_entry<V>(p, entry, columns, sum);
        for (int v = 0; v < V; ++v) store(sums + v * LANES, sum[v]);
    }
}

template <int V>
void panel(const SparseLinear &p, long from, long to, long first, long last, float *scratch) {
    constexpr long WIDTH = V * LANES, ROWS = 16;  // rows written side by side fill whole cache lines
    float *columns = scratch, *sums = scratch + TILE_CHANNELS * WIDTH;
    for (long channel = 0, tile = 0; channel < p.C; channel += TILE_CHANNELS, ++tile) {
        const long channels = p.C - channel < TILE_CHANNELS ? p.C - channel : TILE_CHANNELS;
        gather_tile<V>(p, from, to, channel, channels, columns);
        add_tile<V>(p, p.starts + tile * (p.R + 1) + first, last - first, columns, sums, tile == 0);
    }
    for (long start = first; start < last; start += ROWS) {
        const long stop = start + ROWS < last ? start + ROWS : last;
        for (long t = from; t < to; ++t)
            for (long r = start; r < stop; ++r)
                p.y[t * p.R + r] = sums[(r - first) * WIDTH + t - from] + (p.bias ? p.bias[r] : 0.0f);
    }
}

void sparse_panel(const SparseLinear &p, long from, long to, long first, long last, float *scratch) {
    switch ((to - from + LANES - 1) / LANES) {
        case 1: return panel<1>(p, from, to, first, last, scratch);
        case 2: return panel<2>(p, from, to, first, last, scratch);
        case 3: return panel<3>(p, from, to, first, last, scratch);
        case 4: return panel<4>(p, from, to, first, last, scratch);
        case 5: return panel<5>(p, from, to, first, last, scratch);
        case 6: return panel<6>(p, from, to, first, last, scratch);
        case 7: return panel<7>(p, from, to, first, last, scratch);
        default: return panel<VECTORS>(p, from, to, first, last, scratch);
    }
}

}  // namespace
