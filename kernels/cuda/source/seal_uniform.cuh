// A page encoded in 256 evenly spaced levels, from the least to the largest number of each channel (keys) or token (values).
//
// A thread takes four neighbouring channels of every kStride-th token.
#pragma once
#include "seal_pairs.cuh"

namespace nested {

// Four numbers side by side.
__device__ inline void to_floats(uint2 brains, float (&number)[4]) {
    const float2 first = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&brains.x));
    const float2 second = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&brains.y));
    number[0] = first.x, number[1] = first.y, number[2] = second.x, number[3] = second.y;
}

template <int kClusters, bool kIsKeys>
struct PageSealer<16, kClusters, kIsKeys> {
    using Place = Record<16, kIsKeys>;
    static constexpr int kColumns = HEAD_DIM / 4, kStride = kSealThreads / kColumns, kTokens = kPage / kStride;
    static constexpr int kRanges = Place::kRanges, kLaneRanges = kRanges / 32;
    static constexpr int kTokenLanes = kColumns < 32 ? kColumns : 32;                // of a warp, that have numbers of one token
    static constexpr int kParts = kIsKeys ? kStride : kColumns / kTokenLanes;  // of a range, each with a minimum and a maximum
    struct Workspace {
        float least[kParts][kRanges], most[kParts][kRanges];
        float low[kRanges], step[kRanges];  // as they are read back, but 1 for no step
    };

    static __device__ void prepare(Workspace&, const float2*, const float2*) {}

    // A block's part. If a number is not finite, codes say nothing, for ranges are not-a-number.
    static __device__ void seal(const __nv_bfloat16* rows, Workspace& workspace, u8* record) {
        const int column = threadIdx.x % kColumns, row = threadIdx.x / kColumns;
        uint2 brains[kTokens];
#pragma unroll
        for (int i = 0; i < kTokens; ++i) brains[i] = *reinterpret_cast<const uint2*>(rows + (row + i * kStride) * HEAD_DIM + 4 * column);
        const bool is_finite = store_extremes(brains, row, column, workspace);
        if (threadIdx.x < 32) store_ranges(workspace, is_finite, record);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kTokens; ++i) {
            const int token = row + i * kStride;
            float number[4];
            to_floats(brains[i], number);
            u32 codes = 0;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int range = kIsKeys ? 4 * column + j : token;
                const float offset = __fdiv_rn(number[j] - workspace.low[range], workspace.step[range]);
                codes |= (u32)fminf(fmaxf(rintf(offset), 0.f), 255.f) << (8 * j);
            }
            *reinterpret_cast<u32*>(record + token * Place::kTokenBytes + 4 * column) = codes;
        }
    }

    // Of parts of channels or tokens; returns whether all numbers of the page are finite. Ends with a barrier.
    static __device__ bool store_extremes(const uint2 (&brains)[kTokens], int row, int column, Workspace& workspace) {
        float zeros = 0.f, least[4], most[4];  // of the channels
#pragma unroll
        for (int j = 0; j < 4; ++j) least[j] = kHuge, most[j] = -kHuge;
#pragma unroll
        for (int i = 0; i < kTokens; ++i) {
            float number[4], token_least = kHuge, token_most = -kHuge;
            to_floats(brains[i], number);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                zeros = __fmaf_rn(number[j], 0.f, zeros);
                least[j] = fminf(least[j], number[j]), most[j] = fmaxf(most[j], number[j]);
                token_least = fminf(token_least, number[j]), token_most = fmaxf(token_most, number[j]);
            }
            if constexpr (!kIsKeys) {
#pragma unroll
                for (int distance = 1; distance < kTokenLanes; distance *= 2) {
                    token_least = fminf(token_least, __shfl_xor_sync(~0u, token_least, distance));
                    token_most = fmaxf(token_most, __shfl_xor_sync(~0u, token_most, distance));
                }
                if (column % kTokenLanes == 0) {
                    workspace.least[column / kTokenLanes][row + i * kStride] = token_least;
                    workspace.most[column / kTokenLanes][row + i * kStride] = token_most;
                }
            }
        }
        if constexpr (kIsKeys)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                workspace.least[row][4 * column + j] = least[j];
                workspace.most[row][4 * column + j] = most[j];
            }
        return __syncthreads_or(!(zeros == 0.f)) == 0;
    }

    // A warp's part: minima, and steps from these as they are read back.
    static __device__ void store_ranges(Workspace& workspace, bool is_finite, u8* record) {
        const int lane = threadIdx.x;
        float low[kLaneRanges], step[kLaneRanges];
#pragma unroll
        for (int i = 0; i < kLaneRanges; ++i) {
            low[i] = kHuge;
#pragma unroll
            for (int part = 0; part < kParts; ++part) low[i] = fminf(low[i], workspace.least[part][lane + 32 * i]);
        }
        store_linear(low, is_finite, record + Place::kMinima, record + Place::kMinimumRange);
#pragma unroll
        for (int i = 0; i < kLaneRanges; ++i) {
            float high = -kHuge;
#pragma unroll
            for (int part = 0; part < kParts; ++part) high = fmaxf(high, workspace.most[part][lane + 32 * i]);
            step[i] = __fdiv_rn(fmaxf(high - low[i], 0.f), 255.f);
        }
        store_log(step, is_finite, record + Place::kSteps, record + Place::kStepRange);
#pragma unroll
        for (int i = 0; i < kLaneRanges; ++i) {
            workspace.low[lane + 32 * i] = low[i];
            workspace.step[lane + 32 * i] = step[i] > 0.f ? step[i] : 1.f;
        }
        store_padding<Place::kStepRange + 4, Place::kBytes>(record);
    }
};

}  // namespace nested
