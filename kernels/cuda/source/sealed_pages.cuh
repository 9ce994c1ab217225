// Columns of queries and one page: as codes, or as it is being written.
#pragma once
#include "sealed_problem.cuh"

namespace nested {

// Neighbouring numbers of a query; zeros from nowhere.
template <int kCount>
__device__ inline void read_values(const Value* from, float (&number)[kCount]) {
    if constexpr (sizeof(Value) == 2) {
        u32 words[kCount / 2] = {};
        if (from != nullptr) read_bytes<2 * kCount>(reinterpret_cast<const u8*>(from), words);
#pragma unroll
        for (int i = 0; i < kCount; ++i) number[i] = to_float(reinterpret_cast<const Value*>(words)[i]);
    } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) number[i] = from == nullptr ? 0.f : to_float(from[i]);
    }
}

// Eight columns of queries as B operands, each over its own largest number so that half precision holds them.
struct ColumnQueries {
    u32 operand[kKeySteps][2];
    float factor[2], sum[2];  // of columns 2c and 2c + 1; the sum is that of the operands
    int last[2], oldest[2];   // tokens that these see

    // `from` and `position` are those of column g; a column that does not exist has a negative position and sees nothing.
    __device__ void read(const SealedProblem& problem, const Value* from, int position) {
        const int lane = threadIdx.x & 31, c = lane % 4;
        float number[2 * kLanePairs], largest = 0.f;
        read_values(position >= 0 ? from + 2 * kLanePairs * c : nullptr, number);
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
        const u32 one = 0x3C003C00, ones[4] = {one, one, one, one};  // twice 1 each
        float total[4] = {};
#pragma unroll
        for (int step = 0; step < kKeySteps; ++step) multiply_halves(total, ones, operand[step][0], operand[step][1]);
        sum[0] = total[0], sum[1] = total[1];
    }
};

// What eight columns have attended to in one page. Of sums[j], rows g and g + 8 are the two dimensions of pair
// g * kValuePairs + j.
struct ColumnSums {
    float sums[kValueTiles][4];
    float largest[2], norm[2];  // of columns 2c and 2c + 1; the norm is this lane's share

    __device__ void clear() {
#pragma unroll
        for (int j = 0; j < kValueTiles; ++j) sums[j][0] = sums[j][1] = sums[j][2] = sums[j][3] = 0.f;
        largest[0] = largest[1] = kNothing;
        norm[0] = norm[1] = 0.f;
    }
};

template <int kCount>
__device__ inline void read_exact(const __nv_bfloat16* from, u32 (&pairs)[kCount]) {
    read_bytes<4 * kCount>(reinterpret_cast<const u8*>(from), pairs);
#pragma unroll
    for (int i = 0; i < kCount; ++i) pairs[i] = halves(pairs[i]);
}

// Norms of a page's tokens: each lane decodes two, token `lane` and the one 32 further on.
struct PageNorms {
    float own[2];

    __device__ void read(const u8* codes, const u8* range) {
        const int lane = threadIdx.x & 31;
        const float2 of_page = range_at(range);
        own[0] = norm_of(codes[lane], of_page);
        own[1] = norm_of(codes[lane + 32], of_page);
    }
    // Of token 16 * tile + 8 * half + g.
    __device__ float of(int tile, int half) const {
        return __shfl_sync(~0u, own[tile / 2], tile % 2 * 16 + half * 8 + (threadIdx.x & 31) / 4);
    }
};

// A page's keys and values as codes; of a sequence's first page (kIsFirst) the first tokens as they are.
template <bool kIsFirst>
struct SealedPage {
    static constexpr bool kIsWhole = true;  // no token of it comes after a query
    using Keys = Codes<KEY_BITS, kLanePairs>;
    using Values = Codes<VALUE_BITS, kValuePairs>;
    const u8 *keys, *values;
    const __nv_bfloat16 *exact_keys, *exact_values;
    KeyTable key_table;
    ValueTable value_table;
    PageNorms key_norms, value_norms;

    __device__ SealedPage(const SealedProblem& problem, const KeyTable& key_table, const ValueTable& value_table, int sequence, int kv_head,
                          int page)
        : key_table(key_table), value_table(value_table) {
        const size_t place = (size_t)problem.sealed[(size_t)sequence * problem.sealed_stride + page] * problem.kv_heads + kv_head;
        keys = problem.keys + place * KeyRecord::kBytes;
        values = problem.values + place * ValueRecord::kBytes;
        if (kIsFirst) {
            const size_t exact = (size_t)problem.first[(size_t)sequence * problem.first_stride] * problem.kv_heads + kv_head;
            exact_keys = reinterpret_cast<const __nv_bfloat16*>(problem.keys + exact * KeyRecord::kBytes);
            exact_values = reinterpret_cast<const __nv_bfloat16*>(problem.values + exact * ValueRecord::kBytes);
        }
    }
    static __device__ bool is_exact(int token) { return kIsFirst && token < FIRST_EXACT; }

    __device__ void read_norms() {
        key_norms.read(keys + KeyRecord::kNorms, keys + KeyRecord::kNormRange);
        value_norms.read(values + ValueRecord::kNorms, values + ValueRecord::kNormRange);
    }
    __device__ void read_keys(int token, Keys& codes) const {
        codes.read(keys + token * KeyRecord::kTokenBytes, threadIdx.x % 4 * kLanePairs);
    }
    __device__ void key_pairs(int token, const Keys& codes, u32 (&pairs)[kLanePairs]) const {
        if (is_exact(token)) {
            read_exact(exact_keys + token * HEAD_DIM + threadIdx.x % 4 * 2 * kLanePairs, pairs);
        } else {
            codes.look_up(key_table, pairs);
        }
    }
    __device__ void read_values(int token, Values& codes) const {
        codes.read(values + token * ValueRecord::kTokenBytes, threadIdx.x % 32 / 4 * kValuePairs);
    }
    __device__ void value_pairs(int token, const Values& codes, u32 (&pairs)[kValuePairs]) const {
        if (is_exact(token)) {
            read_exact(exact_values + token * HEAD_DIM + threadIdx.x % 32 / 4 * 2 * kValuePairs, pairs);
        } else {
            codes.look_up(value_table, pairs);
        }
    }
    __device__ float key_norm(int tile, int half) const {
        const float norm = key_norms.of(tile, half);
        return is_exact(16 * tile + 8 * half + threadIdx.x % 32 / 4) ? 1.f : norm;
    }
    __device__ float value_norm(int tile, int half) const {
        const float norm = value_norms.of(tile, half);
        return is_exact(16 * tile + 8 * half + threadIdx.x % 32 / 4) ? 1.f : norm;
    }
    // What the page's mean adds to the scores of columns 2c and 2c + 1. Its codes are numbers above 1024 for the product, which
    // the sum of the queries takes away again.
    __device__ float2 mean_scores(const ColumnQueries& queries) const {
        u32 words[kLanePairs / 2];
        read_bytes<2 * kLanePairs>(keys + KeyRecord::kMean + threadIdx.x % 4 * 2 * kLanePairs, words);
        float above[4] = {};
#pragma unroll
        for (int step = 0; step < kKeySteps; ++step) {
            u32 codes[4];
#pragma unroll
            for (int i = 0; i < 2; ++i) codes[2 * i] = codes[2 * i + 1] = __byte_perm(words[step], 0x64646464, i == 0 ? 0x4140 : 0x4342);
            multiply_halves(above, codes, queries.operand[step][0], queries.operand[step][1]);
        }
        const float2 range = range_at(keys + KeyRecord::kMeanRange);
        float result[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) result[i] = range.y * (above[i] - 1024.f * queries.sum[i]) + range.x * queries.sum[i];
        return make_float2(result[0], result[1]);
    }
};

// A page that is being written, up to token `written` of its sequence.
struct OwnPage {
    static constexpr bool kIsWhole = false;
    struct Keys {};
    struct Values {};
    const __nv_bfloat16 *keys, *values;
    int written;

    __device__ OwnPage(const SealedProblem& problem, long long slot, int kv_head, int written) : written(written) {
        const size_t place = ((size_t)slot * problem.kv_heads + kv_head) * kPage * HEAD_DIM;
        keys = problem.own_keys + place;
        values = problem.own_values + place;
    }
    static __device__ bool is_exact(int) { return true; }
    __device__ void read_norms() {}
    __device__ void read_keys(int, Keys&) const {}
    __device__ void read_values(int, Values&) const {}
    __device__ void key_pairs(int token, const Keys&, u32 (&pairs)[kLanePairs]) const {
        read_exact(keys + token * HEAD_DIM + threadIdx.x % 4 * 2 * kLanePairs, pairs);
    }
    __device__ void value_pairs(int token, const Values&, u32 (&pairs)[kValuePairs]) const {
        read_exact(values + token * HEAD_DIM + threadIdx.x % 32 / 4 * 2 * kValuePairs, pairs);
        // What lies beyond a sequence's end is left over from another; weighted 0, a number that is not finite would remain.
        if (token > written % kPage)
#pragma unroll
            for (int j = 0; j < kValuePairs; ++j) pairs[j] = 0;
    }
    __device__ float key_norm(int, int) const { return 1.f; }
    __device__ float value_norm(int, int) const { return 1.f; }
    __device__ float2 mean_scores(const ColumnQueries&) const { return make_float2(0.f, 0.f); }
};

// The tokens of one page, of which `first_token` is the first, as far as the queries see them. `halfway` is called when keys are
// done with and values are under way.
template <class Page, class Halfway>
__device__ inline void attend_page(const SealedProblem& problem, const ColumnQueries& queries, Page& page, int first_token,
                                   ColumnSums& state, Halfway halfway) {
    state.clear();
    const int lane = threadIdx.x & 31, g = lane / 4, c = lane % 4;
    typename Page::Keys keys[4][2];
    typename Page::Values values[4][4];
#pragma unroll
    for (int tile = 0; tile < 4; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half) page.read_keys(16 * tile + 8 * half + g, keys[tile][half]);
    page.read_norms();
    const float2 means = page.mean_scores(queries);
    const float mean[2] = {means.x, means.y};
    float score[4][4];
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
        float (&sum)[4] = score[tile];
        sum[0] = sum[1] = sum[2] = sum[3] = 0.f;
        u32 rows[2][kLanePairs];
#pragma unroll
        for (int half = 0; half < 2; ++half) page.key_pairs(16 * tile + 8 * half + g, keys[tile][half], rows[half]);
        // The values' codes take the registers of the keys'.
#pragma unroll
        for (int i = 0; i < 4; ++i) page.read_values(16 * tile + 2 * c + i % 2 + i / 2 * 8, values[tile][i]);
#pragma unroll
        for (int step = 0; step < kKeySteps; ++step) {
            const u32 operand[4] = {rows[0][2 * step], rows[1][2 * step], rows[0][2 * step + 1], rows[1][2 * step + 1]};
            multiply_halves(sum, operand, queries.operand[step][0], queries.operand[step][1]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int in_page = 16 * tile + 8 * half + g, token = first_token + in_page;
            const float norm = page.key_norm(tile, half);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float& s = sum[2 * half + i];
                s = (__fmul_rn(s, norm) + (Page::is_exact(in_page) ? 0.f : mean[i])) * queries.factor[i];
                if (HAS_SOFTCAP) s = problem.softcap * tanhf(s / problem.softcap) * kLog2e;
                if ((!Page::kIsWhole && token > queries.last[i]) || (HAS_WINDOW && token < queries.oldest[i])) s = kNothing;
                state.largest[i] = fmaxf(state.largest[i], s);
            }
        }
    }
    halfway();
    float reference[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        state.largest[i] = of_eight_max(state.largest[i]);
        reference[i] = state.largest[i] == kNothing ? 0.f : state.largest[i];
    }
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        u32 weights[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float norm = page.value_norm(step, half);
            float weight[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                weight[i] = power_of_two(score[step][2 * half + i] - reference[i]);
                state.norm[i] += weight[i];
                weight[i] *= norm;
            }
            weights[half] = transposed(halves(weight[0], weight[1]));
        }
        u32 pairs[4][kValuePairs];
#pragma unroll
        for (int i = 0; i < 4; ++i) page.value_pairs(16 * step + 2 * c + i % 2 + i / 2 * 8, values[step][i], pairs[i]);
#pragma unroll
        for (int j = 0; j < kValueTiles; ++j) {
            const u32 operand[4] = {__byte_perm(pairs[0][j], pairs[1][j], 0x5410), __byte_perm(pairs[0][j], pairs[1][j], 0x7632),
                                    __byte_perm(pairs[2][j], pairs[3][j], 0x5410), __byte_perm(pairs[2][j], pairs[3][j], 0x7632)};
            multiply_halves(state.sums[j], operand, weights[0], weights[1]);
        }
    }
}

// A page of a sequence before the queries' own.
template <class Halfway>
__device__ inline void attend_sealed_page(const SealedProblem& problem, const ColumnQueries& queries, const u32* tables, int sequence,
                                          int kv_head, int page, ColumnSums& state, Halfway halfway) {
    if (page == 0) {
        SealedPage<true> first(problem, KeyTable(tables), ValueTable(tables), sequence, kv_head, 0);
        attend_page(problem, queries, first, 0, state, halfway);
    } else {
        SealedPage<false> sealed(problem, KeyTable(tables), ValueTable(tables), sequence, kv_head, page);
        attend_page(problem, queries, sealed, page * kPage, state, halfway);
    }
}
__device__ inline void attend_own_page(const SealedProblem& problem, const ColumnQueries& queries, int sequence, int number, int kv_head,
                                       int written, ColumnSums& state) {
    OwnPage own(problem, problem.own[(size_t)sequence * problem.own_stride + number], kv_head, written);
    attend_page(problem, queries, own, written / kPage * kPage, state, [] {});
}

// Begin to bring the keys of a page nearer, a line a lane. Not values: those would be driven out again before their turn.
__device__ inline void fetch_keys(const SealedProblem& problem, int sequence, int kv_head, int page) {
    const size_t place = (size_t)problem.sealed[(size_t)sequence * problem.sealed_stride + page] * problem.kv_heads + kv_head;
    const u8* keys = problem.keys + place * KeyRecord::kBytes;
    for (int line = (threadIdx.x & 31) * 128; line < KeyRecord::kBytes; line += 32 * 128)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(keys + line));
}

__device__ inline void fill_tables(const SealedProblem& problem, u32* tables) {
    KeyTable::fill(tables, problem.key_table);
    if (!SAME_TABLE) ValueTable::fill(tables, problem.value_table);
}

}  // namespace nested
