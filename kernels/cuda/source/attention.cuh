// Attention of new tokens over paged bfloat16 keys and values: what it is given, the few instructions that its parts share, and how
// parts are put together.
//
// A warp, or two that share it, takes 16 rows (a row is one head of one token; rows share a key/value head) through one page. Pages
// are merged in their order to splits of kSplitPages, splits in their order to the result: in shared memory and over blocks where
// a sequence has one token (attend_splits.cu, merge_splits.cu), in one warp where it has many (attend_rows.cu). A row's result depends
// on its keys alone. Queries and weights are each two bfloat16 numbers, so that only keys and values are rounded.
#pragma once
#include <cuda_bf16.h>

#include "inputs.cuh"

#ifndef HEAD_DIM  // a multiple of 64
#define HEAD_DIM 64
#endif
#ifndef HAS_WINDOW
#define HAS_WINDOW 0
#endif
#ifndef HAS_SOFTCAP
#define HAS_SOFTCAP 0
#endif

namespace nested {

constexpr int kPage = 64, kSplitPages = 4, kSplit = kPage * kSplitPages;
constexpr int kTileRows = 16, kWarps = 4;
constexpr int kPageWarps = 2;  // that share a page of a split
constexpr int kKeyBlocks = HEAD_DIM / 32, kValueBlocks = HEAD_DIM / 64;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kNothing = -1e38f;  // a score that nothing has

struct Problem {
    const Value* q;            // [sequences, tokens, heads, HEAD_DIM]
    const __nv_bfloat16* keys;  // [pages, kv heads, kPage, HEAD_DIM]
    const __nv_bfloat16* values;
    const long long* tables;     // [sequences, pages of a table]
    const long long* positions;  // [sequences, tokens]; negative where a sequence's only token is to be left alone
    Value* out;                  // as q
    float* partial;              // [sequences, heads, splits, HEAD_DIM], of one token a sequence
    float2* partial_norm;        // [sequences, heads, splits]: largest score in base 2, sum of weights
    int tokens, heads, kv_heads, table_pages, window;
    float scale, softcap;
};

__device__ inline u32 pair(float a, float b) {
    __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<u32*>(&both);
}
// The upper halves of two floats and what these leave over.
__device__ inline void split_pair(float a, float b, u32& high, u32& low) {
    high = pair(a, b);
    const float2 rounded = __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&high));
    low = pair(a - rounded.x, b - rounded.y);
}
__device__ inline uint4 load_operand(const void* from) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}
__device__ inline void multiply(float (&sum)[4], const u32* a, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline float of_quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ inline float of_quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// How two neighbours merge: factors of what came before and of what is added.
__device__ inline float2 merge_factors(float& largest, float added) {
    const float highest = fmaxf(largest, added), reference = highest == kNothing ? 0.f : highest;
    const float2 factors = make_float2(power_of_two(largest - reference), power_of_two(added - reference));
    largest = highest;
    return factors;
}
__device__ inline float merged(float before, float added, float2 factors) {
    return __fmaf_rn(added, factors.y, __fmul_rn(before, factors.x));
}
// The first page that a position sees.
__device__ inline int first_page(const Problem& problem, int position) {
    return HAS_WINDOW ? max(position - problem.window + 1, 0) / kPage : 0;
}

// A running merge of rows' sums, in the order in which they are added.
struct Merged {
    float largest = kNothing, norm = 0.f;

    __device__ float2 add(float added_largest, float added_norm) {
        const float2 factors = merge_factors(largest, added_largest);
        norm = merged(norm, added_norm, factors);
        return factors;
    }
};

// Four neighbouring sums of a row, of a block's pages from `first` to `last`, put together in their order. `sums` and `norms` are
// those of page 0, and so far apart are those of the next.
__device__ inline Merged merge_pages(const float* sums, int sums_apart, const float2* norms, int norms_apart, int first, int last, float* to) {
    Merged all;
    float sum[4] = {};
    for (int page = first; page < last; ++page) {
        const float2 norm = norms[page * norms_apart], factors = all.add(norm.x, norm.y);
        const float4 added = *reinterpret_cast<const float4*>(sums + page * sums_apart);
        sum[0] = merged(sum[0], added.x, factors), sum[1] = merged(sum[1], added.y, factors);
        sum[2] = merged(sum[2], added.z, factors), sum[3] = merged(sum[3], added.w, factors);
    }
    *reinterpret_cast<float4*>(to) = make_float4(sum[0], sum[1], sum[2], sum[3]);
    return all;
}

}  // namespace nested
