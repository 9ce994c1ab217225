// Between the projection of queries, keys and values and attention: norms of queries and keys where a model has them,
// rotary embeddings (half-split order), the basis of sealed pages for rows of such formats, and the write of keys and values to
// their pages. A warp takes one head of one row.
#include "nested.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 64
#endif
#ifndef HAS_NORM
#define HAS_NORM 0
#endif
#ifndef HAS_BASES  // whether rows may be of sealed formats
#define HAS_BASES 0
#endif
#ifndef PAGE_VALUE  // number type of the pages: 0 float32, 2 bfloat16
#define PAGE_VALUE 2
#endif

using namespace nested;

constexpr int kWarps = 4, kPage = 64, kPairs = HEAD_DIM / 64;

#if PAGE_VALUE == 0
using Stored = float;
__device__ inline Stored to_stored(float value) { return value; }
#else
using Stored = __nv_bfloat16;
__device__ inline Stored to_stored(float value) { return __float2bfloat16_rn(value); }
#endif

struct Step {
    const Value* qkv;  // [rows, heads + 2 * kv heads, HEAD_DIM]
    Value* q;          // [rows, heads, HEAD_DIM]
    Stored* keys;      // [pages, kv heads, kPage, HEAD_DIM]
    Stored* values;
    const float* cosines;  // [positions, HEAD_DIM / 2]
    const float* sines;
    const float* query_gain;  // [HEAD_DIM]
    const float* key_gain;
    const long long* positions;  // [rows], like the next two
    const long long* page_ids;
    const long long* page_offsets;
    const long long* row_formats;  // [rows]: numbers of sealed formats, or -1
    const float* key_weights;      // [kv heads, HEAD_DIM], or null
    const float* signs;            // [HEAD_DIM]
    int heads, kv_heads;
    float eps;
    u32 rotated_keys, rotated_values;  // a bit for each format
};

// A head's dimensions in a warp: lane + 32 i.
constexpr int kLaneDims = HEAD_DIM / 32;

// Into the basis of sealed pages: signs, then a butterfly.
__device__ inline void rotate(const Step& step, float (&x)[kLaneDims]) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) x[i] *= step.signs[lane + 32 * i];
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2)
#pragma unroll
        for (int i = 0; i < kLaneDims; ++i) {
            const float other = __shfl_xor_sync(~0u, x[i], distance);
            x[i] = lane & distance ? other - x[i] : x[i] + other;
        }
#pragma unroll
    for (int span = 1; span < kLaneDims; span *= 2)
#pragma unroll
        for (int i = 0; i < kLaneDims; ++i)
            if ((i & span) == 0) {
                const float a = x[i], b = x[i + span];
                x[i] = a + b, x[i + span] = a - b;
            }
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) x[i] *= __frsqrt_rn((float)HEAD_DIM);
}

// A grid of (heads / kWarps, rows).
extern "C" __global__ void __launch_bounds__(kWarps * 32)
rotate_and_store(Step step) {
    launch_dependents();
    wait_for_inputs();
    const int lane = threadIdx.x & 31, head = blockIdx.x * kWarps + threadIdx.x / 32;
    const int all_heads = step.heads + 2 * step.kv_heads;
    const size_t row = blockIdx.y;
    if (head >= all_heads) return;
    const Value* from = step.qkv + (row * all_heads + head) * HEAD_DIM;
    float x[kLaneDims];
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) x[i] = to_float(from[lane + 32 * i]);
    const bool is_query = head < step.heads, is_value = head >= step.heads + step.kv_heads;
    if (!is_value) {
        if (HAS_NORM) {
            float sum = 0.f;
#pragma unroll
            for (int i = 0; i < kPairs; ++i) sum = __fmaf_rn(x[i], x[i], __fmaf_rn(x[kPairs + i], x[kPairs + i], sum));
#pragma unroll
            for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
            const float factor = __frsqrt_rn(sum / HEAD_DIM + step.eps);
            const float* gain = is_query ? step.query_gain : step.key_gain;
#pragma unroll
            for (int i = 0; i < kLaneDims; ++i) x[i] *= factor * gain[lane + 32 * i];
        }
        const size_t angle = (size_t)step.positions[row] * (HEAD_DIM / 2) + lane;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            const float cosine = step.cosines[angle + 32 * i], sine = step.sines[angle + 32 * i];
            const float a = x[i], b = x[kPairs + i];
            x[i] = a * cosine - b * sine;
            x[kPairs + i] = b * cosine + a * sine;
        }
    }
    const int kv_head = is_query ? head / (step.heads / step.kv_heads) : (head - step.heads) % step.kv_heads;
    if (HAS_BASES) {
        const int format = (int)step.row_formats[row];
        if (format >= 0 && (is_value ? step.rotated_values : step.rotated_keys) >> format & 1) {
            if (!is_value && step.key_weights != nullptr) {
                const float* weights = step.key_weights + kv_head * HEAD_DIM + lane;
#pragma unroll
                for (int i = 0; i < kLaneDims; ++i) x[i] = is_query ? __fdiv_rn(x[i], weights[32 * i]) : x[i] * weights[32 * i];
            }
            rotate(step, x);
        }
    }
    if (is_query) {
        Value* to = step.q + (row * step.heads + head) * HEAD_DIM;
#pragma unroll
        for (int i = 0; i < kLaneDims; ++i) to[lane + 32 * i] = to_value(x[i]);
        return;
    }
    const size_t place = ((size_t)step.page_ids[row] * step.kv_heads + kv_head) * kPage + step.page_offsets[row];
    Stored* to = (is_value ? step.values : step.keys) + place * HEAD_DIM;
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) to[lane + 32 * i] = to_stored(x[i]);
}
