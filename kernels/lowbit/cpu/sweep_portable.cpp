// The sweep in vectors of four, which every compiler target has or emulates; no fused multiply-add.
#include "portable.h"

namespace {

inline ivec load_mask(const std::uint8_t *p) { return -ivec{p[0], p[1], p[2], p[3]}; }

inline void store_mask(std::uint8_t *p, ivec mask) {
    for (int i = 0; i < 4; ++i) p[i] = mask[i] & 1;
}

// Adding 1.5 * 2^23 leaves no bits for a fraction, so the sum is rounded as the hardware rounds: half to even.
inline vec round_even(vec x) {
    const vec big = broadcast(12582912.0f), whole = broadcast(4194304.0f);
    return (x < whole) & (x > -whole) ? (x + big) - big : x;
}

}  // namespace

#include "sweep_tile.h"

const Path portable_path = {sweep_tile, TILE, SCRATCH};
