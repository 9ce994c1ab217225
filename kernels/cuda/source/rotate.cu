// Between the projection of queries, keys and values and attention: norms of queries and keys where a model has them,
// rotary embeddings (half-split order), and the write of keys and values to their pages. A warp takes one head of one row.
#include "nested.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 64
#endif
#ifndef HAS_NORM
#define HAS_NORM 0
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
    int heads, kv_heads;
    float eps;
};

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
    float first[kPairs], second[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
        first[i] = to_float(from[lane + 32 * i]);
        second[i] = to_float(from[lane + 32 * i + HEAD_DIM / 2]);
    }
    const bool is_query = head < step.heads, is_value = head >= step.heads + step.kv_heads;
    if (!is_value) {
        if (HAS_NORM) {
            float sum = 0.f;
#pragma unroll
            for (int i = 0; i < kPairs; ++i) sum = __fmaf_rn(first[i], first[i], __fmaf_rn(second[i], second[i], sum));
#pragma unroll
            for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
            const float factor = __frsqrt_rn(sum / HEAD_DIM + step.eps);
            const float* gain = is_query ? step.query_gain : step.key_gain;
#pragma unroll
            for (int i = 0; i < kPairs; ++i) {
                first[i] *= factor * gain[lane + 32 * i];
                second[i] *= factor * gain[lane + 32 * i + HEAD_DIM / 2];
            }
        }
        const size_t angle = (size_t)step.positions[row] * (HEAD_DIM / 2) + lane;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            const float cosine = step.cosines[angle + 32 * i], sine = step.sines[angle + 32 * i];
            const float a = first[i], b = second[i];
            first[i] = a * cosine - b * sine;
            second[i] = b * cosine + a * sine;
        }
    }
    if (is_query) {
        Value* to = step.q + (row * step.heads + head) * HEAD_DIM;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            to[lane + 32 * i] = to_value(first[i]);
            to[lane + 32 * i + HEAD_DIM / 2] = to_value(second[i]);
        }
        return;
    }
    const int kv_head = (head - step.heads) % step.kv_heads;
    const size_t place = ((size_t)step.page_ids[row] * step.kv_heads + kv_head) * kPage + step.page_offsets[row];
    Stored* to = (is_value ? step.values : step.keys) + place * HEAD_DIM;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
        to[lane + 32 * i] = to_stored(first[i]);
        to[lane + 32 * i + HEAD_DIM / 2] = to_stored(second[i]);
    }
}
