// Some tokens of each sequence through consecutive decoder blocks: what lowbit/cpu/decode.py fills in, and what one instruction set does of it.
#pragma once
#include <cstdint>

#include "planar.h"

// Runs of `block` channels times a Hadamard matrix, which is a Sylvester matrix (x) `matrix` [base, base], that already divided by
// sqrt(block). block 1: none.
struct DecodeRotation {
    long block, base;
    const float *matrix;
};

struct DecodeNorm {
    long centred;                // LayerNorm; else RMSNorm
    double eps;
    const float *weight, *bias;  // or null
    const std::int32_t *permutation;
    DecodeRotation rotation;
};

struct DecodeLinear {
    PlanarWeight weight;
    const std::uint8_t *tail_first, *tail_second;  // the rows after the last whole block, padded to one; null where there are none
    const float *tail_bias;
    const std::int32_t *reads;                     // [tiles of the weight] which tile of the activation each multiplies; null: its own
    const float *scale, *zero, *top;               // grid of each output, top below 0 for none; null: no output has one
};

// Linears that share an input, and what happens to it before.
struct DecodeSite {
    DecodeRotation rotation;
    long channels, tiles;
    long exact;    // no grid: every number is a sum of EXACT_TERMS codes
    long shifted;  // a grid may have a shift
    PlanarClusters clusters;
    long count;
    DecodeLinear linears[3];
};

// `bits` 16: keys, already rotated, and values are float32. Else codes, bits D / 8 bytes a token, keys before rotation.
struct DecodeCache {
    long bits;
    std::uint8_t *keys, *values;  // [B, heads, capacity, bytes of a token]
    const float *key_scale, *key_zero, *value_scale, *value_zero;  // [heads, D]
    // Columns that some rows hold in full precision: [B, heads, spared, D], keys rotated; rows [B, spared]; columns ascending.
    long spared;
    const float *spared_keys, *spared_values;
    const std::uint8_t *spared_rows;
    const std::int64_t *spared_at;
};

struct DecodeBlock {
    DecodeNorm attention_norm, mlp_norm;
    DecodeSite qkv, output, up, down;  // up: the gate, if there is one, then up
    double scaling;                    // of queries
    long softmax_levels;               // 0: probabilities stay as they are
    long activation;
    DecodeCache cache;
};

// What makes logits of the hidden states: the last norm and the output head.
struct DecodeEnd {
    DecodeNorm norm;
    DecodeSite head;
};

enum DecodeActivation { RELU = 0, SILU = 1 };

struct DecodeStep {
    long B, T, C, heads, kv_heads, width;
    long spared;                        // no input and no output is rounded: the tokens are attention sinks
    long held, capacity;                // tokens in the cache before these, and room for
    long half;                          // pairs of channels that rotate, i and half + i; 0 without rotary embedding
    const float *cos, *sin;             // [B or 1, T, half] of these tokens
    long turn_stride;                   // 0 where one row serves all sequences
    const float *all_cos, *all_sin;     // [B or 1, capacity, half], these tokens included
    long turns_stride;
    const float *mask;                  // added to the scores: [B or 1, T, held + T]; null: each token looks at those up to itself
    long mask_stride;
    long blocks;
    const DecodeBlock *block;
    float *hidden;                      // [B, T, C]
    const DecodeEnd *end;               // null: no logits
    float *logits;                      // [B, T, vocabulary]
};

constexpr long DECODE_RUN = 16;                           // cached tokens that are decoded at a time
constexpr long DECODE_TOKENS = 64, DECODE_CHANNELS = 32;  // of a KV head: tokens scored, and channels mixed, as one item

// The query heads of token t of sequence b that share KV head `head`. query [heads / kv_heads, D], key, value [D] before rotation; they are
// used up.
struct DecodeHeads {
    const DecodeStep *step;
    const DecodeBlock *block;
    long b, t, head;
    float *query, *key, *value;
    float *run;     // [DECODE_RUN, D]
    float *scores;  // [heads / kv_heads, held + 1]: `score` writes some of each row, `mix` uses all up
    float *y;       // [heads / kv_heads, D]
};

// Several tokens' query heads, rotated and scaled, that share a KV head, and what they attend to, from all that the cache holds. Token t
// of `tokens`, which begin at heads.t, has them at query and y + t * stride.
struct DecodePanel {
    DecodeHeads heads;
    long tokens, stride;
    const float *query;
    float *y;
    float *rows;    // [tokens heads / kv_heads, padded to DECODE_ROWS, D]
    float *scores;  // [as many, held + T padded to DECODE_RUN]
    float *turned;  // [D, DECODE_RUN]
};

constexpr long DECODE_ROWS = 4;          // query rows that are multiplied at a time
constexpr long DECODE_PANEL = 64;        // tokens of a panel at most
constexpr long DECODE_SCORES = 1 << 16;  // scores that a panel should hold at most, for the cache's sake

struct DecodePath {
    // y = norm(x), permuted but not rotated. `spare` [C].
    void (*norm)(const DecodeNorm &norm, const float *x, long C, float *spare, float *y);
    // In place. `spare` [block].
    void (*rotate)(const DecodeRotation &rotation, float *x, long C, float *spare);
    // y = activation(x) times `other`, which may be null.
    void (*activate)(long activation, const float *x, const float *other, long n, float *y);
    // One token a sequence. Scores of tokens [from, to). Those who score this token append key and value before.
    void (*score)(const DecodeHeads &heads, long from, long to);
    // `width` channels of what is attended to, from `channel` on, when all is scored.
    void (*mix)(const DecodeHeads &heads, long channel, long width);
    // Several tokens a sequence. Appends key and value of one, then turns and scales its queries in place.
    void (*append)(const DecodeHeads &heads);
    // When all are appended.
    void (*attend)(const DecodePanel &panel);
};

extern const DecodePath portable_decode_path;
#ifdef LOWBIT_X86
extern const DecodePath avx2_decode_path;
#endif
