// Columns of queries, and what they have attended to.
#pragma once
#include "sealed_problem.cuh"

namespace nested {

// Neighbouring numbers of a query; zeros from nowhere. kCopied: it lies in shared memory.
template <bool kCopied, int kCount>
__device__ inline void read_values(const Value* from, float (&number)[kCount]) {
    if constexpr (sizeof(Value) == 2) {
        u32 words[kCount / 2] = {};
        if (from != nullptr) read_bytes<2 * kCount, kCopied>(reinterpret_cast<const u8*>(from), words);
#pragma unroll
        for (int i = 0; i < kCount; ++i) number[i] = to_float(reinterpret_cast<const Value*>(words)[i]);
    } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) number[i] = from == nullptr ? 0.f : to_float(from[i]);
    }
}

using QueryOperands = u32[kKeySteps][2];  // of eight columns

// sum += sixteen rows of keys, of which this lane has two, times the columns.
__device__ inline void multiply_keys(const u32 (&rows)[2][kLanePairs], const QueryOperands& queries, float (&sum)[4]) {
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
        const u32 operand[4] = {rows[0][2 * step], rows[1][2 * step], rows[0][2 * step + 1], rows[1][2 * step + 1]};
        multiply_halves(sum, operand, queries[step][0], queries[step][1]);
    }
}

// Sums of columns 2c and 2c + 1.
__device__ inline float2 sums_of(const QueryOperands& queries) {
    const u32 one = 0x3C003C00, ones[4] = {one, one, one, one};  // twice 1 each
    float total[4] = {};
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) multiply_halves(total, ones, queries[step][0], queries[step][1]);
    return make_float2(total[0], total[1]);
}

// Eight columns of queries as B operands, each over its own largest number so that half precision holds them.
struct ColumnQueries {
    QueryOperands operand;
    float factor[2], sum[2];  // of columns 2c and 2c + 1; the sum is that of the operands
    int last[2], oldest[2];   // tokens that these see

    // `from` and `position` are those of column g; a column that does not exist has a negative position and sees nothing.
    template <bool kCopied = false>
    __device__ void read(const SealedProblem& problem, const Value* from, int position) {
        const int lane = threadIdx.x & 31, c = lane % 4;
        float number[2 * kLanePairs], largest = 0.f;
        read_values<kCopied>(position >= 0 ? from + 2 * kLanePairs * c : nullptr, number);
#pragma unroll
        for (int i = 0; i < 2 * kLanePairs; ++i) largest = fmaxf(largest, fabsf(number[i]));
        largest = fmaxf(of_quad_max(largest), 1e-30f);
        const float inverse = __frcp_rn(largest);
#pragma unroll
        for (int step = 0; step < kKeySteps; ++step)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int at = 2 * (2 * step + i);
                operand[step][i] = halves(number[at] * inverse, number[at + 1] * inverse);
            }
        const float scale = HAS_SOFTCAP ? problem.scale : problem.scale * kLog2e;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            factor[i] = scale * __shfl_sync(~0u, largest, (2 * c + i) * 4);
            last[i] = __shfl_sync(~0u, position, (2 * c + i) * 4);
            oldest[i] = oldest_seen(problem, last[i]);
        }
        const float2 sums = sums_of(operand);
        sum[0] = sums.x, sum[1] = sums.y;
    }
};

// Sums over values. A register of codes looked up is a pair of neighbouring dimensions of one token, so it takes two steps of a
// product: multiplied by (weight, 0) it adds to the pair's first dimension, by (0, weight) to the second. Those are two products of
// eight columns, or one where columns c and c + 4 are those of one query (kIsNarrow).
template <bool kIsNarrow>
struct ValueSums {
    static constexpr int kProducts = kIsNarrow ? 1 : 2;
    float sums[kProducts][kValueTiles][4];  // of tile j, rows g and g + 8 are pairs g * kValuePairs + 2j and the next

    __device__ void clear() {
#pragma unroll
        for (int product = 0; product < kProducts; ++product)
#pragma unroll
            for (int j = 0; j < kValueTiles; ++j) sums[product][j][0] = sums[product][j][1] = sums[product][j][2] = sums[product][j][3] = 0.f;
    }
    // What is there of column 2c + i becomes x * factor + added.
    __device__ void scale(int i, float factor, float added) {
#pragma unroll
        for (int product = 0; product < kProducts; ++product)
#pragma unroll
            for (int j = 0; j < kValueTiles; ++j)
#pragma unroll
                for (int k = i; k < 4; k += 2) sums[product][j][k] = __fmaf_rn(sums[product][j][k], factor, added);
    }
    // Of column 2c + i.
    __device__ float at(int product, int pair, int i) const { return sums[product][pair / 2][pair % 2 * 2 + i]; }
    static __device__ int query_of(int i) {
        const int column = threadIdx.x % 4 * 2 + i;
        return kIsNarrow ? column % 4 : column;
    }
    // All numbers of the query of column 2c + i, to its [HEAD_DIM].
    __device__ void store(int i, float* row) const {
        float* to = row + threadIdx.x % 32 / 4 * 2 * kValuePairs;
#pragma unroll
        for (int pair = 0; pair < kValuePairs; ++pair) {
            if constexpr (kIsNarrow) {
                to[2 * pair + threadIdx.x % 4 / 2] = at(0, pair, i);
            } else {
                *reinterpret_cast<float2*>(to + 2 * pair) = make_float2(at(0, pair, i), at(1, pair, i));
            }
        }
    }
};

// The second operand of those products: of two tokens' weights in one register, each beside a zero.
template <bool kSecond>
__device__ inline void spread(u32 weights, bool is_second, u32 (&operand)[2]) {
    operand[0] = __byte_perm(weights, 0, kSecond || is_second ? 0x1044 : 0x4410);
    operand[1] = __byte_perm(weights, 0, kSecond || is_second ? 0x3244 : 0x4432);
}

// What eight columns have attended to in one page.
template <bool kIsNarrow>
struct ColumnSums : ValueSums<kIsNarrow> {
    float largest[2], norm[2];  // of columns 2c and 2c + 1; the norm is this lane's share

    __device__ void clear() {
        ValueSums<kIsNarrow>::clear();
        largest[0] = largest[1] = kNothing;
        norm[0] = norm[1] = 0.f;
    }
};

}  // namespace nested
