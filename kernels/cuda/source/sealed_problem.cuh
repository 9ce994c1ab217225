// Attention of new tokens over sealed pages, their sequence's first tokens and their own page; codes stay codes. Here is what it is
// given, and the few instructions that its parts share.
//
// The product of keys and queries has tokens as rows and columns of eight (new tokens' heads) as columns, that of values has pairs
// of dimensions as rows and two of its steps for each token (ValueSums). Norms multiply scores and weights, a page's mean is one
// more row of keys. Evenly spaced levels are multiplied as they are, by queries and weights times their steps (sealed_scales.cuh).
//
// Each page is attended to for itself. Pages are merged in their order to splits of kSealedSplit, splits in their order to the
// result, the own page last. A warp takes a page and a block a split where few sequences have one token each
// (attend_sealed_pages.cu), a warp takes splits where many have (attend_sealed_splits.cu), and a warp takes its columns through all
// pages where sequences have many tokens (attend_sealed_rows.cu): the sums are the same, and a token's result depends on its
// sequence alone.
#pragma once
#include "sealed.cuh"

#ifndef TILE_HEADS  // query heads of a KV head that a warp takes together for one token: 4 or 8
#define TILE_HEADS 8
#endif

namespace nested {

constexpr int kQueryColumns = 8;  // of a product
constexpr bool kNarrow = TILE_HEADS == 4;
constexpr int kSealedSplit = 8;   // pages; also warps of a block with one token a sequence
constexpr int kLanePairs = HEAD_DIM / 8;    // of a token's keys: a quad has them all
constexpr int kValuePairs = HEAD_DIM / 16;  // of a token's values: eight lanes have them all
constexpr int kKeySteps = HEAD_DIM / 16, kValueTiles = HEAD_DIM / 32;

struct SealedProblem {
    const Value* q;               // [sequences, tokens, heads, HEAD_DIM], in the basis of the pages
    const u8* keys;               // [pages, kv heads, KeyRecord::kBytes]
    const u8* values;             // [pages, kv heads, ValueRecord::kBytes]
    const __nv_bfloat16* own_keys;  // [slots, kv heads, kPage, HEAD_DIM]
    const __nv_bfloat16* own_values;
    const u32* key_table;         // [2^KEY_BITS] pairs of half-precision numbers
    const u32* value_table;
    const long long* sealed;     // [sequences, pages of a table], rows `sealed_stride` apart
    const long long* first;      // [sequences]: pages of the first tokens, `first_stride` apart
    const long long* own;        // [sequences, own pages]: slots, rows `own_stride` apart
    const long long* positions;  // [sequences, tokens], in order; negative: of another format, to be left alone
    const float* signs;          // [HEAD_DIM], of the rotation
    Value* out;                   // as q, in the model's basis
    float* partial;               // [sequences, heads, splits, HEAD_DIM], of one token a sequence
    float2* partial_norm;         // [sequences, heads, splits]: largest score in base 2, sum of weights
    int tokens, heads, kv_heads, window, sealed_stride, first_stride, own_stride;
    float scale, softcap;

    __device__ int group() const { return heads / kv_heads; }
};

__device__ inline int oldest_seen(const SealedProblem& problem, int position) {
    return HAS_WINDOW ? max(position - problem.window + 1, 0) : 0;
}

// Where a sequence's only token stands, and a split of its pages; the last split is the own page.
struct TokenSplit {
    int position, begin, end;
    bool is_own;

    __device__ TokenSplit(const SealedProblem& problem, int sequence, int split, int splits) {
        position = (int)problem.positions[sequence];
        const int own_page = position / kPage;
        is_own = split == splits - 1;
        begin = is_own ? own_page : max(split * kSealedSplit, oldest_seen(problem, position) / kPage);
        end = is_own ? own_page + 1 : min((split + 1) * kSealedSplit, own_page);
    }
    __device__ bool is_empty() const { return position < 0 || begin >= end; }
};

__device__ inline void multiply_halves(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline u32 halves(float a, float b) {
    const __half2 both = __floats2half2_rn(a, b);
    return *reinterpret_cast<const u32*>(&both);
}
__device__ inline u32 halves(u32 brains) {  // of two bfloat16 numbers
    const float2 both = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&brains));
    return halves(both.x, both.y);
}
// Rows and columns of an 8 x 8 matrix exchanged.
__device__ inline u32 transposed(u32 pair) {
    u32 result;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
}
__device__ inline float of_eight_max(float x) {
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, distance));
    return x;
}
__device__ inline float of_eight_sum(float x) {
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

}  // namespace nested
