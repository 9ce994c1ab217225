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
constexpr int64_t scores_floats(int64_t queries) { return queries * kPageTokens + (queries + 15) / 16 * 16; }
constexpr int64_t attend_scratch_floats(int64_t queries) {
    // Sealed pages (SealedScratch): norms of keys and of values, the mean, its products with queries, exact tokens, steps
    // and fixed point numbers of queries, codes, levels.
    return scores_floats(queries) + 2 * kPageTokens + kMaxHeadDim + (queries + 15) / 16 * 16 + kBlockRows * kMaxHeadDim +
           (queries + 7) / 8 * 16 + queries * kMaxHeadDim / 2 + kPageTokens * kMaxHeadDim * 3 / 8 + kLanes / 4;
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

// How sealed records of keys or values are read (kernels/page_layout.py): a record begins with kPageTokens tokens' codes of
// `bits` bits for a pair of numbers, further fields lie at these bytes.
struct PairCode {
    // 128 and what a code's first and second numbers are in steps, [2, 2^bits]; the upper half of the codes stands for the
    // pairs of the lower one, exchanged.
    const uint8_t* levels;
    float step;
    int64_t bits;        // 4, 6 or 8
    int64_t norms;       // [kPageTokens] bytes
    int64_t norm_range;  // log2 of the lowest and the step, in half precision
    int64_t mean;        // [head_dim] bytes; -1: none
    int64_t mean_range;
    // How pages are sealed: points of ordered pairs, [2^(bits-1), 2], those of a cluster side by side, and the points of the
    // clusters, of which the nearest is chosen first.
    const float* entries;
    const float* clusters;
    int64_t num_clusters;
};

// Sealed pages of one layer: records [pages, kv_heads, bytes]. Vectors are in another basis: signs [head_dim] and a Hadamard
// rotation, before which keys are multiplied by weights [kv_heads, head_dim] (null: none) and queries divided by them.
struct SealedPages {
    uint8_t* keys;
    uint8_t* values;
    int64_t key_bytes;
    int64_t value_bytes;
    PairCode key_code, value_code;
    int64_t exact_tokens;  // of a sequence, in bfloat16 in a page of their own
    const float* weights;
    const float* signs;
};

// Exact pages of one layer: [pages, kv_heads, kPageTokens, head_dim], bfloat16 or float32. And its sealed ones, by format.
struct Pages {
    uint8_t* keys;
    uint8_t* values;
    int64_t number_bytes;  // 2 or 4
    const SealedPages* sealed;
};

// Exact pages that become sealed ones of format `sealed`, in every layer.
struct Seals {
    int64_t count;
    const int64_t* exact_pages;   // [count]
    const int64_t* sealed_pages;  // [count]
    int64_t sealed;
};

// Sequences with the same number of new tokens. Of a sealed format, all new tokens of a sequence lie in one page, which is an
// exact one, and the pages before it are sealed ones.
struct AttentionGroup {
    int64_t num_seqs;
    int64_t num_tokens;
    int64_t max_pages;
    const int64_t* row_ids;       // [seqs, tokens]
    const int64_t* block_tables;  // [seqs, max_pages]
    int64_t sealed;               // which of the layer's sealed pages; -1: none
    const int64_t* first_pages;   // [seqs], sealed pages that hold the sequences' first tokens exactly
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
    const int64_t* row_formats;   // [rows], as of AttentionGroup; null: all are exact
    const Segment* segments;
    int64_t num_segments;
    const AttentionGroup* groups;
    int64_t num_groups;
};

}  // namespace anybit
