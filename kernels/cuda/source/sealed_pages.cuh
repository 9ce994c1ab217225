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

template <int kCount>
__device__ inline void read_exact(const __nv_bfloat16* from, u32 (&pairs)[kCount]) {
    read_bytes<4 * kCount>(reinterpret_cast<const u8*>(from), pairs);
#pragma unroll
    for (int i = 0; i < kCount; ++i) pairs[i] = halves(pairs[i]);
}

// The token, of eight, that row `row` of a product stands for: so that the four lanes which read values together read neighbours.
__device__ inline int token_of(int row) { return row % 2 * 4 + row / 2; }
// The token of a page that is row g of half a tile.
__device__ inline int token_in_page(int tile, int half) { return 16 * tile + 8 * half + token_of(threadIdx.x % 32 / 4); }

// Norms of a page's tokens: each lane decodes two, token `lane` and the one 32 further on.
struct PageNorms {
    float own[2];

    __device__ void read(const u8* codes, const u8* range) {
        const int lane = threadIdx.x & 31;
        const float2 of_page = range_at(range);
        own[0] = norm_of(codes[lane], of_page);
        own[1] = norm_of(codes[lane + 32], of_page);
    }
    __device__ float of(int token) const { return __shfl_sync(~0u, own[token / 32], token % 32); }
};

// A page's keys and values as codes; of a sequence's first page (kIsFirst) the first tokens as they are. kCopied: records lie in
// shared memory, values in the place of `values` only when keys are done with.
template <bool kIsFirst, bool kCopied>
struct SealedPage {
    static constexpr bool kIsWhole = true;  // no token of it comes after a query
    static constexpr bool kReadsAhead = !kCopied;
    static __device__ constexpr bool has_tile(int) { return true; }
    using Keys = Codes<KEY_BITS, kLanePairs>;
    using Values = Codes<VALUE_BITS, kValuePairs>;
    const u8 *keys, *values;
    const __nv_bfloat16 *exact_keys, *exact_values;
    KeyTable key_table;
    ValueTable value_table;
    PageNorms key_norms, value_norms;
    Keys key_codes[4][2];
    u32 mean_codes[kLanePairs / 2];

    __device__ SealedPage(const SealedProblem& problem, const u32* tables, int sequence, int kv_head) : key_table(tables), value_table(tables) {
        if (kIsFirst) {
            const size_t exact = (size_t)problem.first[(size_t)sequence * problem.first_stride] * problem.kv_heads + kv_head;
            exact_keys = reinterpret_cast<const __nv_bfloat16*>(problem.keys + exact * KeyRecord::kBytes);
            exact_values = reinterpret_cast<const __nv_bfloat16*>(problem.values + exact * ValueRecord::kBytes);
        }
    }
    // Where the records lie.
    __device__ void find(const SealedProblem& problem, int sequence, int kv_head, int page) {
        const size_t place = (size_t)problem.sealed[(size_t)sequence * problem.sealed_stride + page] * problem.kv_heads + kv_head;
        keys = problem.keys + place * KeyRecord::kBytes;
        values = problem.values + place * ValueRecord::kBytes;
    }
    static __device__ bool is_exact(int token) { return kIsFirst && token < FIRST_EXACT; }

    __device__ void read_keys() {
        const int c = threadIdx.x % 4;
#pragma unroll
        for (int tile = 0; tile < 4; ++tile)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                key_codes[tile][half].template read<kCopied>(keys + token_in_page(tile, half) * KeyRecord::kTokenBytes, c * kLanePairs);
        read_bytes<2 * kLanePairs, kCopied>(keys + KeyRecord::kMean + c * 2 * kLanePairs, mean_codes);
        key_norms.read(keys + KeyRecord::kNorms, keys + KeyRecord::kNormRange);
    }
    __device__ void read_value_norms() { value_norms.read(values + ValueRecord::kNorms, values + ValueRecord::kNormRange); }
    __device__ void key_pairs(int tile, int half, u32 (&pairs)[kLanePairs]) const {
        const int token = token_in_page(tile, half);
        if (is_exact(token)) {
            read_exact(exact_keys + token * HEAD_DIM + threadIdx.x % 4 * 2 * kLanePairs, pairs);
        } else {
            key_codes[tile][half].look_up(key_table, pairs);
        }
    }
    __device__ void read_values(int token, Values& codes) const {
        codes.template read<kCopied>(values + token * ValueRecord::kTokenBytes, threadIdx.x % 32 / 4 * kValuePairs);
    }
    __device__ void value_pairs(int token, const Values& codes, u32 (&pairs)[kValuePairs]) const {
        if (is_exact(token)) {
            read_exact(exact_values + token * HEAD_DIM + threadIdx.x % 32 / 4 * 2 * kValuePairs, pairs);
        } else {
            codes.look_up(value_table, pairs);
        }
    }
    __device__ float key_norm(int token) const {
        const float norm = key_norms.of(token);
        return is_exact(token) ? 1.f : norm;
    }
    __device__ float value_norm(int token) const {
        const float norm = value_norms.of(token);
        return is_exact(token) ? 1.f : norm;
    }
    // What the page's mean adds to the scores of columns 2c and 2c + 1. Its codes are numbers above 1024 for the product, which
    // the sum of the queries takes away again.
    __device__ float2 mean_scores(const ColumnQueries& queries) const {
        float above[4] = {};
#pragma unroll
        for (int step = 0; step < kKeySteps; ++step) {
            u32 codes[4];
#pragma unroll
            for (int i = 0; i < 2; ++i) codes[2 * i] = codes[2 * i + 1] = __byte_perm(mean_codes[step], 0x64646464, i == 0 ? 0x4140 : 0x4342);
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
    static constexpr bool kIsWhole = false, kReadsAhead = true;
    struct Values {};
    const __nv_bfloat16 *keys, *values;
    int written;

    __device__ OwnPage(const SealedProblem& problem, long long slot, int kv_head, int written) : written(written) {
        const size_t place = ((size_t)slot * problem.kv_heads + kv_head) * kPage * HEAD_DIM;
        keys = problem.own_keys + place;
        values = problem.own_values + place;
    }
    static __device__ bool is_exact(int) { return true; }
    __device__ bool has_tile(int tile) const { return 16 * tile <= written % kPage; }
    __device__ void read_keys() {}
    __device__ void read_value_norms() {}
    __device__ void read_values(int, Values&) const {}
    __device__ void key_pairs(int tile, int half, u32 (&pairs)[kLanePairs]) const {
        read_exact(keys + token_in_page(tile, half) * HEAD_DIM + threadIdx.x % 4 * 2 * kLanePairs, pairs);
    }
    __device__ void value_pairs(int token, const Values&, u32 (&pairs)[kValuePairs]) const {
        read_exact(values + token * HEAD_DIM + threadIdx.x % 32 / 4 * 2 * kValuePairs, pairs);
        // What lies beyond a sequence's end is left over from another; weighted 0, a number that is not finite would remain.
        if (token > written % kPage)
#pragma unroll
            for (int j = 0; j < kValuePairs; ++j) pairs[j] = 0;
    }
    __device__ float key_norm(int) const { return 1.f; }
    __device__ float value_norm(int) const { return 1.f; }
    __device__ float2 mean_scores(const ColumnQueries&) const { return make_float2(0.f, 0.f); }
};

// The tokens of one page, of which `first_token` is the first, as far as the queries see them. Its keys are read before; `halfway`
// is called when they are done with.
template <bool kIsNarrow, class Page, class Halfway>
__device__ inline void attend_page(const SealedProblem& problem, const ColumnQueries& queries, Page& page, int first_token,
                                   ColumnSums<kIsNarrow>& state, Halfway halfway) {
    state.clear();
    const int lane = threadIdx.x & 31, c = lane % 4;
    typename Page::Values values[4][4];
    const auto read_values = [&](int step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) page.read_values(16 * step + i / 2 * 8 + token_of(2 * c + i % 2), values[step][i]);
    };
    if (Page::kReadsAhead) page.read_value_norms();
    const float2 means = page.mean_scores(queries);
    const float mean[2] = {means.x, means.y};
    float score[4][4];
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
        float (&sum)[4] = score[tile];
        if (!page.has_tile(tile)) {
            sum[0] = sum[1] = sum[2] = sum[3] = kNothing;
            continue;
        }
        sum[0] = sum[1] = sum[2] = sum[3] = 0.f;
        u32 rows[2][kLanePairs];
#pragma unroll
        for (int half = 0; half < 2; ++half) page.key_pairs(tile, half, rows[half]);
        if (Page::kReadsAhead) read_values(tile);  // the values' codes take the registers of the keys'
#pragma unroll
        for (int step = 0; step < kKeySteps; ++step) {
            const u32 operand[4] = {rows[0][2 * step], rows[1][2 * step], rows[0][2 * step + 1], rows[1][2 * step + 1]};
            multiply_halves(sum, operand, queries.operand[step][0], queries.operand[step][1]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int in_page = token_in_page(tile, half), token = first_token + in_page;
            const float norm = page.key_norm(in_page);
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
    if (!Page::kReadsAhead) page.read_value_norms();
    float reference[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        state.largest[i] = of_eight_max(state.largest[i]);
        reference[i] = state.largest[i] == kNothing ? 0.f : state.largest[i];
    }
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        if (!page.has_tile(step)) continue;
        if (!Page::kReadsAhead) read_values(step);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float norm = page.value_norm(token_in_page(step, half));
            float weight[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                weight[i] = power_of_two(score[step][2 * half + i] - reference[i]);
                state.norm[i] += weight[i];
                weight[i] *= norm;
            }
            const u32 weights = transposed(halves(weight[0], weight[1]));
            u32 pairs[2][kValuePairs];
#pragma unroll
            for (int i = 0; i < 2; ++i) page.value_pairs(16 * step + 8 * half + token_of(2 * c + i), values[step][2 * half + i], pairs[i]);
            u32 first[2], second[2];
            spread<false>(weights, kIsNarrow && lane >= 16, first);
            spread<true>(weights, true, second);
#pragma unroll
            for (int j = 0; j < kValueTiles; ++j) {
                const u32 operand[4] = {pairs[0][2 * j], pairs[0][2 * j + 1], pairs[1][2 * j], pairs[1][2 * j + 1]};
                multiply_halves(state.sums[0][j], operand, first[0], first[1]);
                if constexpr (!kIsNarrow) multiply_halves(state.sums[1][j], operand, second[0], second[1]);
            }
        }
    }
}

// A page of a sequence before the queries' own, where it lies. `read_queries` is called when its keys are under way.
template <bool kIsFirst, bool kIsNarrow, class ReadQueries, class Halfway>
__device__ inline void attend_records(const SealedProblem& problem, const u32* tables, int sequence, int kv_head, int page,
                                      ColumnSums<kIsNarrow>& state, ReadQueries read_queries, Halfway halfway) {
    SealedPage<kIsFirst, false> sealed(problem, tables, sequence, kv_head);
    sealed.find(problem, sequence, kv_head, page);
    sealed.read_keys();
    const ColumnQueries& queries = read_queries();
    attend_page(problem, queries, sealed, page * kPage, state, halfway);
}
template <bool kIsNarrow, class ReadQueries, class Halfway>
__device__ inline void attend_sealed_page(const SealedProblem& problem, const u32* tables, int sequence, int kv_head, int page,
                                          ColumnSums<kIsNarrow>& state, ReadQueries read_queries, Halfway halfway) {
    if (page == 0) {
        attend_records<true>(problem, tables, sequence, kv_head, 0, state, read_queries, halfway);
    } else {
        attend_records<false>(problem, tables, sequence, kv_head, page, state, read_queries, halfway);
    }
}
// The same where a stream brings its records.
template <bool kIsFirst, bool kIsNarrow, class Stream>
__device__ inline void attend_records_of(Stream& stream, const SealedProblem& problem, const ColumnQueries& queries, const u32* tables,
                                         int sequence, int kv_head, int page, ColumnSums<kIsNarrow>& state) {
    SealedPage<kIsFirst, true> sealed(problem, tables, sequence, kv_head);
    sealed.keys = stream.wait_for_record();
    sealed.read_keys();
    attend_page(problem, queries, sealed, page * kPage, state, [&] {
        stream.done();
        sealed.values = stream.wait_for_record();
    });
    stream.done();
}
template <bool kIsNarrow, class Stream>
__device__ inline void attend_streamed_page(Stream& stream, const SealedProblem& problem, const ColumnQueries& queries, const u32* tables,
                                            int sequence, int kv_head, int page, ColumnSums<kIsNarrow>& state) {
    if (page == 0) {
        attend_records_of<true>(stream, problem, queries, tables, sequence, kv_head, 0, state);
    } else {
        attend_records_of<false>(stream, problem, queries, tables, sequence, kv_head, page, state);
    }
}
template <bool kIsNarrow>
__device__ inline void attend_own_page(const SealedProblem& problem, const ColumnQueries& queries, int sequence, int number, int kv_head,
                                       int written, ColumnSums<kIsNarrow>& state) {
    OwnPage own(problem, problem.own[(size_t)sequence * problem.own_stride + number], kv_head, written);
    attend_page(problem, queries, own, written / kPage * kPage, state, [] {});
}

// Begin to bring records of a page nearer, a line a lane.
template <int kBytes>
__device__ inline void fetch_record(const u8* record) {
    for (int line = (threadIdx.x & 31) * 128; line < kBytes; line += 32 * 128) asm volatile("prefetch.global.L2 [%0];" ::"l"(record + line));
}
// Not values where another page comes first: those would be driven out again before their turn.
__device__ inline void fetch_page(const SealedProblem& problem, int sequence, int kv_head, int page, bool with_values) {
    const size_t place = (size_t)problem.sealed[(size_t)sequence * problem.sealed_stride + page] * problem.kv_heads + kv_head;
    fetch_record<KeyRecord::kBytes>(problem.keys + place * KeyRecord::kBytes);
    if (with_values) fetch_record<ValueRecord::kBytes>(problem.values + place * ValueRecord::kBytes);
}

template <int kThreads>
__device__ inline void fill_tables(const SealedProblem& problem, u32* tables) {
    KeyTable::fill<kThreads>(tables, problem.key_table);
    if (!SAME_TABLE) ValueTable::fill<kThreads>(tables, problem.value_table);
}

}  // namespace nested
