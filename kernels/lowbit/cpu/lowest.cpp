// The `count` smallest of many floats: a radix select over their ordered bits, in digits of 11, 11 and 10.
//
// All scores are read twice: to count the first digit, then to write the mask and to set aside the candidates, those
// whose first digit is the threshold's. These stay in memory order, so that equals are taken from the front.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "cpu.h"

namespace {

constexpr long DIGIT = 11, BINS = 1 << DIGIT, LAST_DIGIT = 32 - 2 * DIGIT;
// A candidate is the rest of its ordered bits above its place in memory.
constexpr int PLACE = 64 - (32 - DIGIT);
// Fewer scores than this, about half a millisecond, are not worth a thread.
constexpr long LEAST_PART = 1 << 17;

struct Scores {
    const float *data;
    long columns, stride;  // rows of `columns` contiguous floats, `stride` floats apart
};

// Orders as the float does: negative numbers turn around, positive ones go above them, -0 is 0.
inline std::uint32_t ordered(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (bits == 0x80000000u) bits = 0;
    return bits ^ (-(bits >> 31) | 0x80000000u);
}

// Calls use(scores, place, length) for each contiguous piece of the places from .. to - 1.
template <class Use>
void for_pieces(const Scores &scores, long from, long to, Use use) {
    while (from < to) {
        const long row = from / scores.columns, column = from % scores.columns, left = scores.columns - column;
        const long length = left < to - from ? left : to - from;
        use(scores.data + row * scores.stride + column, from, length);
        from += length;
    }
}

void count_digits(const Scores &scores, long from, long to, long *counts) {
    for_pieces(scores, from, to, [=](const float *score, long, long length) {
        for (long i = 0; i < length; ++i) ++counts[ordered(score[i]) >> (32 - DIGIT)];
    });
}

// Writes the mask but for the candidates, and the candidates, with room for one more: all scores are written, few stay.
void split(const Scores &scores, long from, long to, std::uint32_t digit, std::uint8_t *mask,
           std::uint64_t *candidates) {
    for_pieces(scores, from, to, [=, &candidates](const float *score, long place, long length) {
        std::uint64_t *next = candidates;
        for (long i = 0; i < length; ++i) {
            const std::uint32_t bits = ordered(score[i]), first = bits >> (32 - DIGIT);
            mask[place + i] = first < digit;
            *next = static_cast<std::uint64_t>(bits) << PLACE | static_cast<std::uint64_t>(place + i);
            next += first == digit;
        }
        candidates = next;
    });
}

// The digit of the rank-th smallest, ranks from 1; rank becomes the rank among those that share the digit.
std::uint32_t digit_of(const long *counts, long &rank) {
    std::uint32_t digit = 0;
    while (rank > counts[digit]) rank -= counts[digit++];
    return digit;
}

// The second and the third digit of the rank-th smallest candidate; rank as above. `counts` is used up.
std::uint64_t rest_of(const std::uint64_t *candidates, long n, long &rank, long *counts) {
    std::memset(counts, 0, sizeof(long) * BINS);
    for (long i = 0; i < n; ++i) ++counts[candidates[i] >> (64 - DIGIT)];
    const std::uint32_t second = digit_of(counts, rank);
    std::memset(counts, 0, sizeof(long) * BINS);
    for (long i = 0; i < n; ++i) {
        const std::uint32_t rest = candidates[i] >> PLACE;
        counts[rest & ((1 << LAST_DIGIT) - 1)] += rest >> LAST_DIGIT == second;
    }
    return second << LAST_DIGIT | digit_of(counts, rank);
}

// Ends the mask where the digit is the threshold's: the `rank` smallest candidates, the first of equals.
void choose(const std::uint64_t *candidates, long n, long rank, long *counts, std::uint8_t *mask) {
    const std::uint64_t threshold = rest_of(candidates, n, rank, counts);
    for (long i = 0; i < n; ++i) {
        const std::uint64_t rest = candidates[i] >> PLACE;
        const bool equal = rest == threshold;
        mask[candidates[i] & ((std::uint64_t(1) << PLACE) - 1)] = rest < threshold || (equal && rank > 0);
        rank -= equal;
    }
}

}  // namespace

// The mask, contiguous: 1 for the `count` smallest scores, 0 for the others. 0 < count <= rows * columns; no NaN.
// Returns 0; 1 where memory ran out.
EXPORT int lowbit_lowest(int threads, long rows, long columns, long stride, long count, const float *score,
                         std::uint8_t *mask) {
    const Scores scores = {score, columns, stride};
    const long n = rows * columns, worth = n / LEAST_PART < threads ? n / LEAST_PART : threads;
    const long parts = worth < 1 ? 1 : worth;
    long *counts = static_cast<long *>(std::calloc((parts + 1) * (BINS + 1), sizeof(long)));
    if (!counts) return 1;
#pragma omp parallel for num_threads(parts) schedule(static)
    for (long part = 0; part < parts; ++part)
        count_digits(scores, n * part / parts, n * (part + 1) / parts, counts + part * BINS);

    long *total = counts + parts * BINS, *starts = total + BINS, rank = count;
    for (long i = 0; i < parts * BINS; ++i) total[i % BINS] += counts[i];
    const std::uint32_t digit = digit_of(total, rank);
    for (long part = 0; part < parts; ++part) starts[part + 1] = starts[part] + counts[part * BINS + digit];
    const long found = starts[parts];
    // Parts stand one apart while they are written: no thread writes into another's.
    std::uint64_t *candidates = static_cast<std::uint64_t *>(std::malloc(sizeof(std::uint64_t) * (found + parts)));
    const bool ready = candidates != nullptr;
    if (ready) {
#pragma omp parallel for num_threads(parts) schedule(static)
        for (long part = 0; part < parts; ++part)
            split(scores, n * part / parts, n * (part + 1) / parts, digit, mask, candidates + starts[part] + part);
        for (long part = 1; part < parts; ++part)
            std::memmove(candidates + starts[part], candidates + starts[part] + part,
                         sizeof(std::uint64_t) * (starts[part + 1] - starts[part]));
        choose(candidates, found, rank, counts, mask);
    }
    std::free(candidates);
    std::free(counts);
    return ready ? 0 : 1;
}
