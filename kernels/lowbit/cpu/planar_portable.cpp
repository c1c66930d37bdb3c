// The integer linear over the planar layout without instructions of its own: a row's codes, then a product with each token.
#include <cmath>
#include <cstring>

#include "planar.h"

namespace {

// Centred codes of one unit.
void spread_unit(int bits, const std::uint8_t *first, const std::uint8_t *second, std::int8_t *v) {
    for (long j = 0; j < PLANAR_UNIT; ++j) {
        int q = 0;
        if (bits == 8) q = first[j] ^ 128;
        else if (bits == 4) q = (first[j % 64] >> (j / 64 * 4) & 15) ^ 8;
        else q = first[j % 32] >> (j / 32 * 2) & 3;
        if (bits == 3) q |= ((second[j % 16] >> (j / 16) & 1) ^ 1) << 2;
        if (bits == 2) q ^= 2;
        v[j] = static_cast<std::int8_t>(q - (1 << (bits - 1)));
    }
}

// A float16 that is finite and not negative.
float from_half(std::uint16_t half) {
    const int exponent = half >> 10, fraction = half & 1023;
    return exponent ? std::ldexp(static_cast<float>(1024 + fraction), exponent - 25) : std::ldexp(static_cast<float>(fraction), -24);
}

float scale_of(const PlanarBlock &w, long place) {
    const std::uint8_t *p = w.scale + w.scale_bytes() * place;
    float wide;
    std::uint16_t half;
    std::memcpy(&wide, p, w.wide ? sizeof wide : 0);
    std::memcpy(&half, p, sizeof half);
    return w.wide ? wide : from_half(half);
}

float add_tile(const PlanarActivations &x, const PlanarBlock &w, long t, long g, long r, const std::int8_t *v, float y) {
    const std::int8_t *a = x.a + (t * x.tiles + g) * PLANAR_TILE;
    int dot = 0;
    for (long i = 0; i < PLANAR_TILE; ++i) dot += a[i] * v[i];
    const long place = g * PLANAR_ROWS + r;
    float sum = static_cast<float>(dot) * x.step[t * x.grid_stride + g];
    if (w.zero) sum -= w.zero[place] * x.count[t * x.tiles + g];
    if (x.shift) sum += w.sum[place] * x.shift[t * x.grid_stride + g];
    return y + sum * scale_of(w, place);
}

void planar_rows(const PlanarActivations &x, int bits, const PlanarBlock &w, long rows, long from, long to, float *y, long R) {
    const long units = x.tiles / 2, tokens = x.T / x.terms;
    for (long r = 0; r < rows; ++r) {
        for (long t = from; t < to && t < tokens; ++t) y[t * R + r] = w.bias ? w.bias[r] : 0.0f;
        for (long u = 0; u < units; ++u) {
            std::int8_t v[PLANAR_UNIT];
            const std::uint8_t *second = w.second ? w.second + (r * units + u) * second_bytes(bits) : nullptr;
            spread_unit(bits, w.first + (r * units + u) * first_bytes(bits), second, v);
            for (long t = from; t < to; ++t)
                for (long g = 0; g < 2; ++g) {
                    float &sum = y[t % tokens * R + r];
                    sum = add_tile(x, w, t, 2 * u + g, r, v + g * PLANAR_TILE, sum);
                }
        }
    }
}

void pack_nothing(const PlanarActivations &, int, long, long) {}

bool extremes(const float *x, long n, float *low, float *high) {
    bool nan = false;
    *low = *high = 0;
    for (long i = 0; i < n; ++i) {
        nan |= x[i] != x[i];
        if (x[i] < *low) *low = x[i];
        if (x[i] > *high) *high = x[i];
    }
    return nan;
}

bool codes(const float *x, long n, float scale, float zero, float top, float offset, std::int8_t *a) {
    bool nan = false;
    for (long i = 0; i < PLANAR_TILE; ++i) {
        if (i >= n || x[i] != x[i]) {
            nan |= i < n;
            a[i] = 0;
            continue;
        }
        const float q = std::rint(x[i] / scale) + zero;
        a[i] = static_cast<std::int8_t>((q < 0 ? 0 : q > top ? top : q) - offset);
    }
    return nan;
}

}  // namespace

const PlanarPath portable_planar_path = {pack_nothing, planar_rows, extremes, codes};
