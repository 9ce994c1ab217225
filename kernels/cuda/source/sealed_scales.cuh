// What multiplies the codes of a sealed page, and what is added to them.
//
// Ordered pairs are what the table says times the norm of their token, and keys have the page's mean besides. Evenly spaced levels
// are code * step + minimum, of a key's channel or of a value's token. Their codes are numbers above 1024 for the product, so that
// 1024 times the sum of what they are multiplied by, as it was rounded, is taken away again.
#pragma once
#include "sealed_columns.cuh"

namespace nested {

// A number for each token of a page: each lane decodes two, token `lane` and the one 32 further on.
struct TokenNumbers {
    float own[2];

    __device__ void read_log(const u8* codes, float2 range) {
        const int lane = threadIdx.x & 31;
        own[0] = norm_of(codes[lane], range);
        own[1] = norm_of(codes[lane + 32], range);
    }
    __device__ void read_linear(const u8* codes, float2 range) {
        const int lane = threadIdx.x & 31;
        own[0] = __fmaf_rn(range.y, (float)codes[lane], range.x);
        own[1] = __fmaf_rn(range.y, (float)codes[lane + 32], range.x);
    }
    __device__ float of(int token) const { return __shfl_sync(~0u, own[token / 32], token % 32); }
};

// A number for each channel, of linear levels: a lane has those of its part of a key.
struct ChannelNumbers {
    u32 codes[kLanePairs / 2];
    float2 range;

    template <bool kCopied>
    __device__ void read(const u8* place, const u8* range_place) {
        read_bytes<2 * kLanePairs, kCopied>(place + threadIdx.x % 4 * 2 * kLanePairs, codes);
        range = range_at(range_place);
    }
    // What they add to the scores of columns 2c and 2c + 1.
    __device__ float2 scores(const ColumnQueries& queries) const {
        float above[4] = {};
#pragma unroll
        for (int step = 0; step < kKeySteps; ++step) {
            u32 operand[4];
#pragma unroll
            for (int i = 0; i < 2; ++i) operand[2 * i] = operand[2 * i + 1] = above_1024(codes[step], i);
            multiply_halves(above, operand, queries.operand[step][0], queries.operand[step][1]);
        }
        float result[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) result[i] = range.y * (above[i] - 1024.f * queries.sum[i]) + range.x * queries.sum[i];
        return make_float2(result[0], result[1]);
    }
};

// Of the largest level of logarithmic ones, its log2.
__device__ inline float log2_of_largest(float2 range) { return __fmaf_rn(range.y, 253.f, range.x); }

// Of keys.
template <class Record, bool kIsUniform = Record::kIsUniform>
struct KeyScales {
    TokenNumbers norms;
    ChannelNumbers mean;

    template <bool kCopied>
    __device__ void read(const u8* record) {
        mean.read<kCopied>(record + Record::kMean, record + Record::kMeanRange);
        norms.read_log(record + Record::kNorms, range_at(record + Record::kNormRange));
    }
    // What the page's mean adds to the scores of columns 2c and 2c + 1.
    template <bool kCopied>
    __device__ float2 scores(const u8*, const ColumnQueries& queries) const {
        return mean.scores(queries);
    }
    __device__ float of(int token) const { return norms.of(token); }
    static __device__ const QueryOperands& operand(const ColumnQueries& queries) { return queries.operand; }
};

// Steps multiply the queries instead of the codes: over the page's largest one, so that half precision holds them.
template <class Record>
struct KeyScales<Record, true> {
    QueryOperands scaled;
    float largest;

    template <bool kCopied>
    __device__ void read(const u8* record) {
        largest = power_of_two(log2_of_largest(range_at(record + Record::kStepRange)));
    }
    // What the minima add to the scores, less what the codes are above. Scales the queries.
    template <bool kCopied>
    __device__ float2 scores(const u8* record, const ColumnQueries& queries) {
        const float2 range = range_at(record + Record::kStepRange), relative = make_float2(-253.f * range.y, range.y);
        u32 words[kLanePairs / 2];
        read_bytes<2 * kLanePairs, kCopied>(record + Record::kSteps + threadIdx.x % 4 * 2 * kLanePairs, words);
#pragma unroll
        for (int step = 0; step < kKeySteps; ++step)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const u32 codes = words[step] >> (16 * i);
                const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&queries.operand[step][i]));
                scaled[step][i] = halves(both.x * norm_of(codes & 0xFF, relative), both.y * norm_of(codes >> 8 & 0xFF, relative));
            }
        ChannelNumbers minima;
        minima.read<kCopied>(record + Record::kMinima, record + Record::kMinimumRange);
        const float2 of_minima = minima.scores(queries), sums = sums_of(scaled);
        const float above = -1024.f * largest;
        return make_float2(__fmaf_rn(above, sums.x, of_minima.x), __fmaf_rn(above, sums.y, of_minima.y));
    }
    __device__ float of(int) const { return largest; }
    __device__ const QueryOperands& operand(const ColumnQueries&) const { return scaled; }
};

// Of values.
template <class Record, bool kIsUniform = Record::kIsUniform>
struct ValueScales {
    TokenNumbers norms;

    __device__ void read(const u8* record) { norms.read_log(record + Record::kNorms, range_at(record + Record::kNormRange)); }
    __device__ float of(int token) const { return norms.of(token); }
    static __device__ float of_exact() { return 1.f; }
    __device__ void add(int, bool, const float (&)[2], u32) {}
    template <bool kIsNarrow>
    __device__ void finish(ColumnSums<kIsNarrow>&) const {}
};

// Steps, which may be far smaller than the numbers, multiply weights: times a power of two that half precision holds, weights of
// exact tokens too.
template <class Record>
struct ValueScales<Record, true> {
    TokenNumbers steps, minima;
    float power, inverse;
    float added[2];  // to all sums of columns 2c and 2c + 1: this lane's share

    __device__ void read(const u8* record) {
        const float2 range = range_at(record + Record::kStepRange);
        const float exponent = fminf(fmaxf(floorf(-log2_of_largest(range)), 0.f), 15.f);
        power = power_of_two(exponent);
        inverse = power_of_two(-exponent);
        steps.read_log(record + Record::kSteps, make_float2(range.x + exponent, range.y));
        minima.read_linear(record + Record::kMinima, range_at(record + Record::kMinimumRange));
        added[0] = added[1] = 0.f;
    }
    __device__ float of(int token) const { return steps.of(token); }
    __device__ float of_exact() const { return power; }
    __device__ void add(int token, bool is_exact, const float (&weight)[2], u32 scaled) {
        const float of_token = minima.of(token);
        const float minimum = is_exact ? 0.f : of_token, above = is_exact ? 0.f : -1024.f * inverse;
        const float2 rounded = __half22float2(*reinterpret_cast<const __half2*>(&scaled));
        added[0] = __fmaf_rn(above, rounded.x, __fmaf_rn(weight[0], minimum, added[0]));
        added[1] = __fmaf_rn(above, rounded.y, __fmaf_rn(weight[1], minimum, added[1]));
    }
    template <bool kIsNarrow>
    __device__ void finish(ColumnSums<kIsNarrow>& state) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) state.scale(i, inverse, of_eight_sum(added[i]));
    }
};

}  // namespace nested
