// A step of decoding without instructions of its own.
#include "decode.h"
#include "portable.h"

namespace {

// Eight codes from BITS bytes, as numbers.
template <int BITS>
inline void codes8(const std::uint8_t *p, vec (&x)[2]) {
    std::uint64_t bytes = 0;
    for (int i = 0; i < BITS; ++i) bytes |= static_cast<std::uint64_t>(p[i]) << 8 * i;
    float eight[8];
    for (int i = 0; i < 8; ++i) eight[i] = static_cast<float>(bytes >> i * BITS & ((1 << BITS) - 1));
    x[0] = load(eight), x[1] = load(eight + 4);
}

void add_across(const vec *v, float *sums) {
    for (int i = 0; i < 4; ++i) sums[i] = (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
}

}  // namespace

#include "decode_math.h"
#include "decode_panel.h"

const DecodePath portable_decode_path = {norm, rotate, activate, score, mix, append, attend_panel};
