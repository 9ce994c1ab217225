// A stack of pre-norm decoder layers as the native step sees it: addresses and sizes only. All memory is the caller's.

#pragma once

#include "nested.h"

namespace anybit {

constexpr int kPageTokens = 64;
constexpr int kMaxHeadDim = 256;
// Attention goes page by page within a run of pages, and then run by run: runs can be attended at the same time.
constexpr int kRunPages = 4;
constexpr int kStateHead = 16;  // floats before the values of a query's state: largest score, sum of weights, padding

constexpr int64_t state_floats(int64_t head_dim) { return kStateHead + head_dim; }
// Floats of working memory, a multiple of 16, that `attend` needs.
constexpr int64_t attend_scratch_floats(int64_t queries) {
    return queries * kPageTokens + (queries + 15) / 16 * 16;
}

enum Activation : int64_t { kSilu = 0, kGeluTanh = 1 };

struct Linear {
    const Weight* weight;
    const float* bias;  // null: none
};

struct Layer {
    const float* attention_norm;         // [hidden]
    const float* attention_output_norm;  // null in most families
    const float* mlp_norm;
    const float* mlp_output_norm;
    const float* query_norm;  // [head_dim], null in most families
    const float* key_norm;
    const float* cosines;  // [positions, head_dim / 2]
    const float* sines;
    Linear qkv, output, gate_up, down;
    int64_t window;  // a query sees this many tokens, itself included; 0: all
};

struct Model {
    int64_t hidden_size;
    int64_t intermediate_size;
    int64_t num_heads;
    int64_t num_kv_heads;
    int64_t head_dim;
    int64_t num_layers;
    int64_t activation;
    float norm_eps;
    float attention_scale;
    float softcap;  // of attention scores; 0: none
    const Layer* layers;
};

// Pages of one layer: [pages, kv_heads, kPageTokens, head_dim], bfloat16 or float32.
struct Pages {
    uint8_t* keys;
    uint8_t* values;
    int64_t number_bytes;  // 2 or 4
};

// Sequences with the same number of new tokens.
struct AttentionGroup {
    int64_t num_seqs;
    int64_t num_tokens;
    int64_t max_pages;
    const int64_t* row_ids;       // [seqs, tokens]
    const int64_t* block_tables;  // [seqs, max_pages]
};

// Tokens first .. last-1 of one of a group's sequences, for the query heads of one key head.
struct AttentionItem {
    int64_t seq;
    int64_t kv_head;
    int64_t first;
    int64_t last;
};

struct Batch {
    int64_t rows;
    const int64_t* positions;     // [rows]
    const int64_t* page_ids;      // [rows]
    const int64_t* page_offsets;  // [rows]
    const Segment* segments;
    int64_t num_segments;
    const AttentionGroup* groups;
    int64_t num_groups;
};

}  // namespace anybit
