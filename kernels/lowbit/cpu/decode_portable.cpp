// One decoded token without instructions of its own.
#include "decode.h"
#include "portable.h"

namespace {

// Eight codes from BITS bytes, as numbers.
template <int BITS>
inline void codes8(const std::uint8_t *p, float *x) {
    std::uint64_t bytes = 0;
    for (int i = 0; i < BITS; ++i) bytes |= static_cast<std::uint64_t>(p[i]) << 8 * i;
    for (int i = 0; i < 8; ++i) x[i] = static_cast<float>(bytes >> i * BITS & ((1 << BITS) - 1));
}

void add_across(const vec *v, float *sums) {
    for (int i = 0; i < 4; ++i) sums[i] = (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
}

}  // namespace

#include "decode_math.h"

const DecodePath portable_decode_path = {norm, rotate, activate, attend};
