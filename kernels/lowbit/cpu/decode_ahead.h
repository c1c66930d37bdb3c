// Weights that a thread multiplies next, brought into its cache while it waits for other threads, which leave memory idle.
//
// The weights of a thread's own runs are stretches of memory, in the order of the products: SITES a block, then the head, LINEARS each, and
// of a linear its first planes, second planes and tables. Some of them, or all, may be empty.
#pragma once
#include <algorithm>

#include "decode.h"

namespace {

constexpr long SITES = 4, LINEARS = 3, PARTS = 3, STRETCHES = LINEARS * PARTS;
constexpr long AHEAD = 128 << 10;  // bytes that are fetched between two products at most: a part of what a core caches

inline long blocks_of(const DecodeLinear &linear) { return (linear.weight.R + PLANAR_ROWS - 1) / PLANAR_ROWS; }

// The site of product i of the step.
inline const DecodeSite &site_of(const DecodeStep &step, long i) {
    if (i == SITES * step.blocks) return step.end->head;
    const DecodeBlock &block = step.block[i / SITES];
    const DecodeSite *const sites[] = {&block.qkv, &block.output, &block.up, &block.down};
    return *sites[i % SITES];
}

struct Stretch {
    const std::uint8_t *at, *end;
};

// Blocks [from, to) of a linear's first planes, second planes or tables.
inline Stretch part_of(const PlanarWeight &w, long part, long from, long to) {
    const std::uint8_t *const starts[PARTS] = {w.first, w.second, w.tables};
    if (!starts[part]) return {nullptr, nullptr};
    const long rows[] = {w.units * first_bytes(w.bits), w.units * second_bytes(w.bits), w.octets * 2 * w.units};
    const long block = PLANAR_ROWS * rows[part], all = part == PARTS - 1 ? to * block : w.R * rows[part];
    return {starts[part] + from * block, starts[part] + std::min(to * block, all)};
}

struct Ahead {
    const DecodeStep &step;
    long team, thread;
    Stretch now = {nullptr, nullptr};
    long next = 0, left = AHEAD;  // the stretch after this one; bytes that may be fetched before the next product

    // The run of a product is what `each` hands to the thread first: of all its linears' blocks, or, of those beside each other, of any's.
    Stretch stretch(long i) const {
        const DecodeSite &site = site_of(step, i / STRETCHES);
        const long which = i / PARTS % LINEARS, own = which < site.count ? blocks_of(site.linears[which]) : 0;
        const bool beside = i / STRETCHES % SITES == 2;
        long before = 0, all = beside ? own : 0;
        for (long j = 0; !beside && j < site.count; ++j) {
            before += j < which ? blocks_of(site.linears[j]) : 0;
            all += blocks_of(site.linears[j]);
        }
        const long from = std::clamp(all * thread / team - before, 0L, own), to = std::clamp(all * (thread + 1) / team - before, 0L, own);
        return part_of(site.linears[which].weight, i % PARTS, from, to);
    }

    void fetch() {
        const long stretches = STRETCHES * (SITES * step.blocks + (step.end ? 1 : 0));
        while (now.at >= now.end) {
            if (left <= 0 || next >= stretches) return;
            now = stretch(next++);
            const long bytes = std::min<long>(now.end - now.at, left);
            now.end = now.at + bytes, left -= bytes;
        }
        __builtin_prefetch(now.at, 0, 2);
        now.at += 64;
    }

    // Product i begins.
    void pass(long i) {
        if (next < STRETCHES * (i + 1)) next = STRETCHES * (i + 1), now = {nullptr, nullptr};
        left = AHEAD;
    }
};

}  // namespace
