// The nested weight in vector order, and what the kernels of one instruction set offer.
//
// Vector order. Rows come in blocks of 16, inputs in spans of 32. A span of a block is eight steps of 16 rows x 4 inputs:
// lane l = 0..63 of a step is row l/4 of the block and input 4*step + l%4 of the span, so that one dot-product instruction
// adds four products to each of 16 rows' sums and no sum ever crosses lanes. A chunk stream of b bits holds a span as b
// vectors of 64 bytes; the byte of a lane holds that lane's fields of 8/b consecutive steps, the first in the lowest bits.
// Streams of one chunk follow block by block, span by span. Rows are padded to whole blocks with zero codes.
//
// The float part of a width: [block][group][16 rows] of scales, and the same of zeros, float16 or float32.

#pragma once

#include <cstdint>

namespace anybit {

constexpr int kBlockRows = 16;
constexpr int kSpanInputs = 32;
constexpr int kSpanSteps = 8;
constexpr int kLanes = 64;
constexpr int kNumChunks = 5;  // c2, c3, c4, c6, c8
constexpr int kChunkBits[kNumChunks] = {2, 1, 1, 2, 2};
constexpr int kNumWidths = 5;
constexpr int kWidths[kNumWidths] = {2, 3, 4, 6, 8};

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

// Rows of activations: q is int8 [rows, in]; per (row, span) x = step * q. A span is never larger than a group, so that an
// outlier costs few others their precision. total is the sum of step * q over a group.
struct Activations {
    const int8_t* q;
    const float* step;   // [rows, spans]
    const float* total;  // [rows, groups]
};

// Rows first .. last-1 are computed at one width.
struct Segment {
    int64_t bit_width;
    int64_t first;
    int64_t last;
};

struct Model;
struct Layer;
struct Pages;
struct Batch;
struct AttentionGroup;

// What every instruction set implements; each gives the same bits. "Rows" are first .. last-1 of a batch.
struct Kernels {
    const char* name;
    // Rows first .. last-1 of x [rows, in] to int8 with one step per span.
    void (*quantize)(const float* x, int64_t first, int64_t last, int64_t in_features, int64_t group_size, int8_t* q,
                     float* step, float* total);
    // Outputs of blocks first .. last-1 for all segments: y float32 [rows, out_features], plus bias unless null.
    // `scratch` holds 32 * in_features bytes, aligned to 64.
    void (*linear)(const Weight& weight, const Activations& x, const Segment* segments, int64_t num_segments,
                   const float* bias, float* y, int64_t first, int64_t last, uint8_t* scratch);
    // out = x / sqrt(mean(x^2) + eps) * weight per row of `size` numbers, a multiple of 16; in place if out == x.
    void (*rms_norm)(const float* x, const float* weight, int64_t first, int64_t last, int64_t size, float eps,
                     float* out);
    // Norms and rotates queries and keys of the fused projection [rows, heads + 2 kv_heads, head_dim] in place and
    // writes keys and values to their pages.
    void (*rotate_and_write)(const Model& model, const Layer& layer, const Batch& batch, const Pages& pages, float* qkv,
                             int64_t first, int64_t last);
    // All new tokens first .. last-1 of one sequence and one key head against its pages; writes their part of
    // out [rows, heads * head_dim]. `scratch` holds 2 * kPageTokens * head_dim floats and head_dim + 2 per query.
    void (*attend)(const Model& model, const Layer& layer, const Batch& batch, const Pages& pages,
                   const AttentionGroup& group, int64_t seq, int64_t kv_head, int64_t first, int64_t last,
                   const float* qkv, float* out, float* scratch);
    // out [rows, size] = activation(gate) * up of the fused projection [rows, 2 size].
    void (*gate)(int64_t activation, const float* gate_up, int64_t first, int64_t last, int64_t size, float* out);
    // x += y, `count` numbers from index `first` on.
    void (*add)(float* x, const float* y, int64_t first, int64_t last);
};

const Kernels* scalar_kernels();
const Kernels* avx2_kernels();         // null where this is not x86
const Kernels* avx512_kernels();       // without byte dot products
const Kernels* avx512_vnni_kernels();

}  // namespace anybit
