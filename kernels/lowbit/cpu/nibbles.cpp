// 4-bit codes of whole units from the order of the disk format into that of lowbit/planar.py.
#include <cstdint>

#include "cpu.h"

namespace {

constexpr long HALF = 32, BYTES = 64;  // of a unit of 128 codes
constexpr int MIDDLE = 8, SIGNS = 0x88, LOW = 0x0F, HIGH = 0xF0;

}  // namespace

// packed, plane: `units` units, one after another. sums: of the centred codes of each tile, two a unit.
EXPORT void lowbit_nibbles(int threads, long units, const std::uint8_t *packed, std::uint8_t *plane, std::int32_t *sums) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long u = 0; u < units; ++u) {
        const std::uint8_t *first = packed + u * BYTES, *second = first + HALF;  // a tile each
        std::uint8_t *out = plane + u * BYTES;
        int one = 0, two = 0;
        for (long k = 0; k < HALF; ++k) {
            const int a = first[k], b = second[k];
            out[2 * k] = static_cast<std::uint8_t>(((a & LOW) | (b & LOW) << 4) ^ SIGNS);
            out[2 * k + 1] = static_cast<std::uint8_t>((a >> 4 | (b & HIGH)) ^ SIGNS);
            one += (a & LOW) + (a >> 4);
            two += (b & LOW) + (b >> 4);
        }
        sums[2 * u] = one - MIDDLE * 2 * static_cast<int>(HALF);
        sums[2 * u + 1] = two - MIDDLE * 2 * static_cast<int>(HALF);
    }
}
