// Splits of one token a sequence put together, and results in the model's basis.
#pragma once
#include "sealed_problem.cuh"

#ifndef ROTATED_VALUES  // whether the result has to be rotated back
#define ROTATED_VALUES 1
#endif
#ifndef MERGED_TOGETHER  // splits that are read at once when they are merged
#define MERGED_TOGETHER 8
#endif

namespace nested {

// Neighbouring dimensions of a result in the model's basis and rounded; `signs` are theirs.
template <int kCount>
__device__ inline void finish(const float (&signs)[kCount], float (&x)[kCount]) {
    const float scale = __frsqrt_rn((float)HEAD_DIM);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        if (ROTATED_VALUES) x[i] = __fmul_rn(__fmul_rn(x[i], scale), signs[i]);
        x[i] = to_float(to_value(x[i]));
    }
}
template <int kCount>
__device__ inline void read_signs(const SealedProblem& problem, int first, float (&signs)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) signs[i] = ROTATED_VALUES ? problem.signs[first + i] : 1.f;
}

// What `attend_sealed_pages` or `attend_sealed_splits` have found for neighbouring heads of a sequence, put together: [heads x
// HEAD_DIM] in `result`, zeros for heads that do not exist. A thread takes a dimension, until a warp rotates a head back.
constexpr int kMergedHeads = HEAD_DIM < kColumns ? kColumns / HEAD_DIM : 1, kMergedColumns = kMergedHeads * HEAD_DIM;

__device__ inline void merge_heads(const SealedProblem& problem, int splits, int sequence, int first_head, float* result) {
    constexpr int kOwn = HEAD_DIM / 32;
    const int head = first_head + threadIdx.x / HEAD_DIM, dim = threadIdx.x % 32 * kOwn;
    // Positions and signs were there before the step began.
    const int position = (int)problem.positions[sequence], own_page = position / kPage;
    const int oldest_page = oldest_seen(problem, position) / kPage;
    float signs[kOwn], sum = 0.f;
    read_signs(problem, dim, signs);
    wait_for_inputs();
    if (head < problem.heads) {
        // Splits of sealed pages, if there are some, then the own page, which is the last of all.
        const int first = oldest_page / kSealedSplit, count = oldest_page < own_page ? (own_page - 1) / kSealedSplit - first + 2 : 1;
        const size_t row = ((size_t)sequence * problem.heads + head) * splits;
        Merged all;
        for (int begin = 0; begin < count; begin += MERGED_TOGETHER) {
            float added[MERGED_TOGETHER];
            float2 norm[MERGED_TOGETHER];
#pragma unroll
            for (int i = 0; i < MERGED_TOGETHER; ++i) {
                const size_t place = row + (begin + i >= count - 1 ? splits - 1 : first + begin + i);
                added[i] = 0.f, norm[i] = make_float2(kNothing, 0.f);  // changes nothing
                if (begin + i < count) added[i] = problem.partial[place * HEAD_DIM + threadIdx.x % HEAD_DIM], norm[i] = problem.partial_norm[place];
            }
#pragma unroll
            for (int i = 0; i < MERGED_TOGETHER; ++i) sum = merged(sum, added[i], all.add(norm[i].x, norm[i].y));
        }
        sum = __fdiv_rn(sum, all.norm);
    }
    result[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x / 32 < kMergedHeads) {
        float* of_head = result + threadIdx.x / 32 * HEAD_DIM + dim;
        float x[kOwn];
#pragma unroll
        for (int i = 0; i < kOwn; ++i) x[i] = of_head[i];
        if (ROTATED_VALUES) unrotate<kOwn, 1>(x);
        finish(signs, x);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) of_head[i] = x[i];
    }
    __syncthreads();
}

}  // namespace nested
