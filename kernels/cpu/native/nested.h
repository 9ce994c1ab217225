// The nested weight in vector order, and what the kernels of one instruction set offer.
//
// Vector order. Rows come in blocks of 16, inputs in spans of 32. A span of a block is eight steps of 16 rows x 4 inputs:
// lane l = 0..63 of a step is row l/4 of the block and input 4*step + l%4 of the span, so that one dot-product instruction
// adds four products to each of 16 rows' sums and no sum ever crosses lanes. Steps go in pairs: a decoded byte holds the
// nibble of step 2p in its lower half and that of step 2p+1 in its upper half, and a stream holds the fields of both at the
// same distance, so that one shift, or none, brings a pair to its place (kPlaces). A chunk stream of b bits holds a span as
// b vectors of 64 bytes. Streams of one chunk follow block by block, span by span. Rows are padded to whole blocks with
// zero codes.
//
// The float part of a width: [block][group][16 rows] of scales, and the same of zeros, float16 or float32.

#pragma once

#include <cstdint>

namespace anybit {

constexpr int kBlockRows = 16;
constexpr int kSpanInputs = 32;
constexpr int kSpanSteps = 8;
constexpr int kSpanPairs = 4;
constexpr int kLanes = 64;
constexpr int kNumChunks = 5;  // c2, c3, c4, c6, c8
constexpr int kChunkBits[kNumChunks] = {2, 1, 1, 2, 2};
constexpr int kNumWidths = 5;
constexpr int kWidths[kNumWidths] = {2, 3, 4, 6, 8};

// Where pair p of a span lies in a chunk stream: in vector p / pairs_per_vector, its lower field `shift` bits above where it
// belongs in a decoded byte (below, if negative). c2 and c6 belong to bits 3,2; c3 to bit 1; c4 to bit 0; c8 to bits 1,0.
struct Place {
    int vector;
    int shift;
};
constexpr Place kTwoUpper[kSpanPairs] = {{0, 0}, {0, -2}, {1, 0}, {1, -2}};  // c2, c6
constexpr Place kOneUpper[kSpanPairs] = {{0, 0}, {0, -1}, {0, 1}, {0, 2}};   // c3
constexpr Place kOneLower[kSpanPairs] = {{0, 0}, {0, 1}, {0, 2}, {0, 3}};    // c4
constexpr Place kTwoLower[kSpanPairs] = {{0, 0}, {0, 2}, {1, 0}, {1, 2}};    // c8
constexpr const Place* kPlaces[kNumChunks] = {kTwoUpper, kOneUpper, kOneLower, kTwoUpper, kTwoLower};
constexpr int kLowestBit[kNumChunks] = {2, 1, 0, 2, 0};  // of the field in a decoded nibble

// The float part of one width; null where the width was not loaded.
struct FloatPart {
    const void* scale;
    const void* zero;
};

struct Weight {
    int64_t out_features;
    int64_t in_features;
    int64_t group_size;
    int64_t float_bytes;  // 2 or 4: size of a number of the float parts
    const uint8_t* chunks[kNumChunks];
    FloatPart parts[kNumWidths];

    int64_t num_blocks() const { return (out_features + kBlockRows - 1) / kBlockRows; }
    int64_t num_spans() const { return in_features / kSpanInputs; }
    int64_t num_groups() const { return in_features / group_size; }
};

// Rows of activations as fixed point numbers: per (row, group) x = step * (128 * d1 + d0) with int8 digits. The error is below
// half a step, 1/32638 of the group's largest magnitude. `digits` is [rows, 2, in], d1 first; total is step * sum of
// (128 * d1 + d0) over a group.
struct Activations {
    const int8_t* digits;
    const float* step;   // [rows, groups]
    const float* total;  // [rows, groups]
};
constexpr int kDigits = 2;
constexpr int kLargestActivation = 127 * 128 + 63;

// Rows first .. last-1 are computed at one width.
struct Segment {
    int64_t bit_width;
    int64_t first;
    int64_t last;
};

// The index of the largest of some numbers, the first of equals; -1 if one of them is not finite.
struct Likeliest {
    int64_t index;
    float logit;
};

// Columns of one group whose codes are chosen one after the other, each for all widths at once; fields are contiguous.
struct CodeBlock {
    int64_t num_widths;
    int64_t rows;
    int64_t columns;    // a multiple of 16
    int64_t num_codes;  // at most kMaxCodes
    int64_t shifts[kNumWidths];
    const float* origin;    // [widths, rows, columns], or null: the targets
    const float* coupling;  // [widths, columns, columns], zero but above the diagonal
    const float* weights;   // [widths, columns]
    const float* scale;     // [widths, rows]
    const float* zero;      // [widths, rows]
    float* targets;         // [widths, rows, columns], changed
    uint8_t* codes;         // [rows, columns]
    float* values;          // [widths, rows, columns]
};
constexpr int64_t kMaxCodes = 256;
constexpr int64_t kMaxCodeColumns = 128;

struct Model;
struct Layer;
struct Pages;
struct Batch;
struct AttentionGroup;
struct AttentionItem;
struct PairCode;

// What every instruction set implements; each gives the same bits. "Rows" are first .. last-1 of a batch.
struct Kernels {
    const char* name;
    // Rows first .. last-1 of x [rows, in] to digits with one step per group.
    void (*quantize)(const float* x, int64_t first, int64_t last, int64_t in_features, int64_t group_size,
                     int8_t* digits, float* step, float* total);
    // Outputs of blocks first .. last-1 for all segments, plus bias unless null: y float32 [rows, out_features], set, or
    // with `accumulate` added to. `scratch` holds linear_scratch_bytes(rows), aligned to 64.
    void (*linear)(const Weight& weight, const Activations& x, const Segment* segments, int64_t num_segments,
                   const float* bias, bool accumulate, float* y, int64_t first, int64_t last, uint8_t* scratch);
    // out = x / sqrt(mean(x^2) + eps) * weight per row of `size` numbers, a multiple of 16; in place if out == x.
    void (*rms_norm)(const float* x, const float* weight, int64_t first, int64_t last, int64_t size, float eps,
                     float* out);
    // Norms and rotates queries and keys of the fused projection [rows, heads + 2 kv_heads, head_dim] in place, takes rows of
    // sealed formats to their basis, and writes keys and values to their pages.
    void (*rotate_and_write)(const Model& model, const Layer& layer, const Batch& batch, const Pages& pages, float* qkv,
                             int64_t first, int64_t last);
    // New tokens first .. last-1 of one sequence against one key head of the pages of one run (kRunPages): into `states`,
    // one per token and query head.
    void (*attend)(const Model& model, const Layer& layer, const Batch& batch, const Pages& pages,
                   const AttentionGroup& group, const AttentionItem& item, int64_t run, const float* qkv,
                   float* states, float* scratch);
    // into = softmax over what both have seen; `states` of `count` queries each.
    void (*merge_states)(float* into, const float* from, int64_t count, int64_t head_dim);
    // The states' weighted means, to their places in out [rows, heads * head_dim].
    void (*write_attended)(const Model& model, const Pages& pages, const AttentionGroup& group, const AttentionItem& item,
                           const float* states, float* out);
    // out [rows, size] = activation(gate) * up of the fused projection [rows, 2 size].
    void (*gate)(int64_t activation, const float* gate_up, int64_t first, int64_t last, int64_t size, float* out);
    // x += y, numbers first .. last-1.
    void (*add)(float* x, const float* y, int64_t first, int64_t last);
    // Of numbers first .. last-1.
    Likeliest (*greedy)(const float* logits, int64_t first, int64_t last);
    // Of rows first .. last-1.
    void (*choose_codes)(const CodeBlock& block, int64_t first, int64_t last);
    // Encodes an exact page of one key head, `numbers` [kPageTokens, dim] of bfloat16 or float32, to its record.
    void (*seal)(const PairCode& code, const uint8_t* numbers, int64_t number_bytes, int64_t dim, uint8_t* record);
};

// Activations of inputs decoded together while many rows are computed: their codes stay in the first-level cache.
constexpr int64_t kPanelInputs = 512;
constexpr int64_t kMaxTileBlocks = 2;

constexpr int64_t linear_scratch_bytes(int64_t rows) {
    return 2 * kMaxTileBlocks * kBlockRows * kPanelInputs + rows * kMaxTileBlocks * kBlockRows * (int64_t)sizeof(float);
}

const Kernels* scalar_kernels();
const Kernels* avx2_kernels();         // null where this is not x86
const Kernels* avx2_vnni_kernels();    // null also where the compiler does not know them
const Kernels* avx512_kernels();       // without byte dot products
const Kernels* avx512_vnni_kernels();
const Kernels* avx512_vbmi_kernels();  // with VNNI too

}  // namespace anybit
