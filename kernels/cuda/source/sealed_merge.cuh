// Splits of one token a sequence put together, and results in the model's basis.
#pragma once
#include "sealed_problem.cuh"

#ifndef ROTATED_VALUES  // whether the result has to be rotated back
#define ROTATED_VALUES 1
#endif
#ifndef MERGED_TOGETHER  // splits that are read at once when they are merged, at most 32
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

constexpr int kMergedHeads = HEAD_DIM < kColumns ? kColumns / HEAD_DIM : 1, kMergedColumns = kMergedHeads * HEAD_DIM;

// A head's splits in the order in which they are merged: a warp finds what all threads multiply by.
struct SplitFactors {
    float2 factors[MERGED_TOGETHER];
    float norms[MERGED_TOGETHER], largest;  // the largest score so far

    // Of splits `place` + lane, as far as these `exist`; `before` is the largest score of those before them.
    __device__ void find(const float2* place, bool exists, float before) {
        const int lane = threadIdx.x & 31;
        const float2 norm = exists ? place[lane] : make_float2(kNothing, 0.f);  // which changes nothing
        float so_far = norm.x;
#pragma unroll
        for (int distance = 1; distance < MERGED_TOGETHER; distance *= 2) {
            const float earlier = __shfl_up_sync(~0u, so_far, distance);
            if (lane >= distance) so_far = fmaxf(so_far, earlier);
        }
        float previous = __shfl_up_sync(~0u, so_far, 1);
        previous = lane == 0 ? before : fmaxf(before, previous);
        if (lane < MERGED_TOGETHER) {
            factors[lane] = merge_factors(previous, norm.x);
            norms[lane] = norm.y;
        }
        if (lane == MERGED_TOGETHER - 1) largest = previous;
    }
};

// What `attend_sealed_pages` or `attend_sealed_splits` have found for neighbouring heads of a sequence, put together: [heads x
// HEAD_DIM] in `result`, zeros for heads that do not exist. A thread takes a dimension, until a warp rotates a head back.
__device__ inline void merge_heads(const SealedProblem& problem, int splits, int sequence, int first_head, float* result) {
    constexpr int kOwn = HEAD_DIM / 32;
    __shared__ SplitFactors found[2][kMergedHeads];
    const int place = threadIdx.x / HEAD_DIM, head = first_head + place, dim = threadIdx.x % 32 * kOwn;
    // Positions and signs were there before the step began.
    const int position = (int)problem.positions[sequence], own_page = position / kPage;
    const int oldest_page = oldest_seen(problem, position) / kPage;
    float signs[kOwn], sum = 0.f;
    read_signs(problem, dim, signs);
    wait_for_inputs();
    // Splits of sealed pages, if there are some, then the own page, which is the last of all.
    const bool exists = head < problem.heads;
    const int first = oldest_page / kSealedSplit, count = oldest_page < own_page ? (own_page - 1) / kSealedSplit - first + 1 : 0;
    const size_t row = ((size_t)sequence * problem.heads + (exists ? head : 0)) * splits, own_place = row + splits - 1;
    const float* partial = problem.partial + (row + first) * HEAD_DIM + threadIdx.x % HEAD_DIM;
    const float2 own_norm = problem.partial_norm[own_place];
    const float own = problem.partial[own_place * HEAD_DIM + threadIdx.x % HEAD_DIM];
    Merged all;
    for (int begin = 0, turn = 0; begin < count; begin += MERGED_TOGETHER, turn ^= 1) {
        float added[MERGED_TOGETHER];
#pragma unroll
        for (int i = 0; i < MERGED_TOGETHER; ++i) added[i] = begin + i < count ? partial[(size_t)(begin + i) * HEAD_DIM] : 0.f;
        SplitFactors& factors = found[turn][place];
        if (threadIdx.x % HEAD_DIM < 32)
            factors.find(problem.partial_norm + row + first + begin, begin + (int)threadIdx.x % 32 < count, all.largest);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < MERGED_TOGETHER; ++i) {
            sum = merged(sum, added[i], factors.factors[i]);
            all.norm = merged(all.norm, factors.norms[i], factors.factors[i]);
        }
        all.largest = factors.largest;
    }
    sum = merged(sum, own, all.add(own_norm.x, own_norm.y));
    sum = exists ? __fdiv_rn(sum, all.norm) : 0.f;
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
