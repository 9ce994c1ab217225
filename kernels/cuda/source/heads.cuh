// Heads on their way from the projection of queries, keys and values to attention: norms of queries and keys where a model has
// them, rotary embeddings (half-split order), and the basis of sealed pages for rows of such formats.
//
// A warp takes one head of one row, a lane its dimensions lane, lane + 32, ...
#pragma once
#include "butterfly.cuh"
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
#ifndef FROM_PROJECTION  // whether attention takes queries, and the newest keys and values, as the projection leaves them
#define FROM_PROJECTION 0
#endif
#ifndef PAGE_VALUE  // number type of the pages: 0 float32, 2 bfloat16
#define PAGE_VALUE 2
#endif

namespace nested {

constexpr int kLaneDims = HEAD_DIM / 32, kTurnedPairs = HEAD_DIM / 64;

#if PAGE_VALUE == 0
using Stored = float;
__device__ inline Stored to_stored(float value) { return value; }
#else
using Stored = __nv_bfloat16;
__device__ inline Stored to_stored(float value) { return __float2bfloat16_rn(value); }
#endif

struct Projected {
    const Value* qkv;  // [rows, heads + 2 * kv heads, HEAD_DIM]
    Stored* keys;      // [pages, kv heads, page size 64, HEAD_DIM]
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

// What heads of a row that share keys and values are turned by, known before they are.
struct HeadFrame {
    float cosines[kTurnedPairs], sines[kTurnedPairs];
    int format = -1;
    float signs[HAS_BASES ? kLaneDims : 1], weights[HAS_BASES ? kLaneDims : 1];

    __device__ HeadFrame(const Projected& projected, size_t row, int kv_head) {
        const int lane = threadIdx.x & 31;
        const size_t angle = (size_t)projected.positions[row] * (HEAD_DIM / 2) + lane;
#pragma unroll
        for (int i = 0; i < kTurnedPairs; ++i) {
            cosines[i] = projected.cosines[angle + 32 * i];
            sines[i] = projected.sines[angle + 32 * i];
        }
        if (!HAS_BASES) return;
        format = (int)projected.row_formats[row];
#pragma unroll
        for (int i = 0; i < kLaneDims; ++i) {
            signs[i] = projected.signs[lane + 32 * i];
            weights[i] = projected.key_weights == nullptr ? 1.f : projected.key_weights[kv_head * HEAD_DIM + lane + 32 * i];
        }
    }
    // Half-split pairs by the angle of their position.
    __device__ void turn(float (&x)[kLaneDims]) const {
#pragma unroll
        for (int i = 0; i < kTurnedPairs; ++i) {
            const float a = x[i], b = x[kTurnedPairs + i];
            x[i] = __fmaf_rn(a, cosines[i], -__fmul_rn(b, sines[i]));  // in every kernel the same
            x[kTurnedPairs + i] = __fmaf_rn(b, cosines[i], __fmul_rn(a, sines[i]));
        }
    }
    // Into the basis of sealed pages: signs, then a butterfly.
    __device__ void rotate(float (&x)[kLaneDims]) const {
#pragma unroll
        for (int i = 0; i < kLaneDims; ++i) x[i] *= signs[i];
        butterfly_of_lanes<1>(x);
        butterfly_of_numbers(x);
#pragma unroll
        for (int i = 0; i < kLaneDims; ++i) x[i] *= __frsqrt_rn((float)HEAD_DIM);
    }
};

// Head `number` of a row: queries come first, then keys, then values.
struct Head {
    size_t row;
    int number, kv_head;
    bool is_query, is_value;

    __device__ Head(const Projected& projected, size_t row, int number)
        : row(row),
          number(number),
          kv_head(number < projected.heads ? number / (projected.heads / projected.kv_heads)
                                           : (number - projected.heads) % projected.kv_heads),
          is_query(number < projected.heads),
          is_value(number >= projected.heads + projected.kv_heads) {}

    // As projected.
    __device__ void read(const Projected& projected, float (&x)[kLaneDims]) const {
        const Value* from = projected.qkv + (row * (projected.heads + 2 * projected.kv_heads) + number) * HEAD_DIM;
#pragma unroll
        for (int i = 0; i < kLaneDims; ++i) x[i] = to_float(from[(threadIdx.x & 31) + 32 * i]);
    }
    // As attention takes it.
    __device__ void finish(const Projected& projected, const HeadFrame& frame, float (&x)[kLaneDims]) const {
        if (!is_value) {
            if (HAS_NORM) normalise(projected, x);
            frame.turn(x);
        }
        if (!HAS_BASES || frame.format < 0) return;
        if (((is_value ? projected.rotated_values : projected.rotated_keys) >> frame.format & 1) == 0) return;
        if (!is_value)
#pragma unroll
            for (int i = 0; i < kLaneDims; ++i) x[i] = is_query ? __fdiv_rn(x[i], frame.weights[i]) : x[i] * frame.weights[i];
        frame.rotate(x);
    }
    __device__ void normalise(const Projected& projected, float (&x)[kLaneDims]) const {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < kTurnedPairs; ++i)
            sum = __fmaf_rn(x[i], x[i], __fmaf_rn(x[kTurnedPairs + i], x[kTurnedPairs + i], sum));
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
        const float factor = __frsqrt_rn(sum / HEAD_DIM + projected.eps);
        const float* gain = is_query ? projected.query_gain : projected.key_gain;
#pragma unroll
        for (int i = 0; i < kLaneDims; ++i) x[i] *= factor * gain[(threadIdx.x & 31) + 32 * i];
    }
    // Where the key or value goes.
    __device__ Stored* place(const Projected& projected) const {
        const size_t page = (size_t)projected.page_ids[row] * projected.kv_heads + kv_head;
        return (is_value ? projected.values : projected.keys) + (page * 64 + projected.page_offsets[row]) * HEAD_DIM;
    }
};

// By a block of attention that takes heads as projected: `count` query heads of a KV head, from number `first` on, of a row to
// shared memory, [count][HEAD_DIM]; with `newest`, the row's key and value to these places there, and to their pages.
template <int kBlockWarps>
__device__ inline void finish_heads(const Projected& projected, const HeadFrame& frame, size_t row, int kv_head, int first, int count,
                                    Value* queries, Stored* const* newest) {
    const int lane = threadIdx.x & 31, group = projected.heads / projected.kv_heads, all = count + (newest == nullptr ? 0 : 2);
    const auto head_at = [&](int at) {
        return Head(projected, row, at < count ? kv_head * group + first + at : projected.heads + (at - count) * projected.kv_heads + kv_head);
    };
    // Two at a time, so that one need not wait for the other's numbers.
    for (int begin = threadIdx.x / 32; begin < all; begin += 2 * kBlockWarps) {
        float x[2][kLaneDims];
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (begin + i * kBlockWarps < all) head_at(begin + i * kBlockWarps).read(projected, x[i]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int at = begin + i * kBlockWarps;
            if (at >= all) break;
            const Head head = head_at(at);
            head.finish(projected, frame, x[i]);
            Stored* to = head.is_query ? nullptr : head.place(projected);
#pragma unroll
            for (int d = 0; d < kLaneDims; ++d) {
                const int dim = lane + 32 * d;
                if (head.is_query) {
                    queries[at * HEAD_DIM + dim] = to_value(x[i][d]);
                } else {
                    to[dim] = newest[at - count][dim] = to_stored(x[i][d]);
                }
            }
        }
    }
}

}  // namespace nested
