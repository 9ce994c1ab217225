// One page: as codes, or as it is being written.
#pragma once
#include "copies.cuh"
#include "sealed_scales.cuh"

namespace nested {

template <bool kCopied = false, int kCount>
__device__ inline void read_exact(const __nv_bfloat16* from, u32 (&pairs)[kCount]) {
    read_bytes<4 * kCount, kCopied>(reinterpret_cast<const u8*>(from), pairs);
#pragma unroll
    for (int i = 0; i < kCount; ++i) pairs[i] = halves(pairs[i]);
}

// The token, of eight, that row `row` of a product stands for: so that the four lanes which read values together read neighbours.
__device__ inline int token_of(int row) { return row % 2 * 4 + row / 2; }
// The token of a page that is row g of half a tile.
__device__ inline int token_in_page(int tile, int half) { return 16 * tile + 8 * half + token_of(threadIdx.x % 32 / 4); }

// A page's keys and values as codes; of a sequence's first page (kIsFirst) the first tokens as they are. kCopied: records lie in
// shared memory, values in the place of `values` only when keys are done with.
template <bool kIsFirst, bool kCopied>
struct SealedPage {
    static constexpr bool kIsWhole = true;  // no token of it comes after a query
    static constexpr bool kReadsAhead = !kCopied;
    // Tiles of codes that are read ahead: as many as there are registers for.
    static constexpr int kTilesAhead = KeyRecord::kIsUniform || ValueRecord::kIsUniform ? 2 : 4;
    static __device__ constexpr bool has_tile(int) { return true; }
    using Keys = Codes<KEY_BITS, kLanePairs>;
    using Values = Codes<VALUE_BITS, kValuePairs>;
    const u8 *keys, *values;
    const __nv_bfloat16 *exact_keys, *exact_values;
    KeyTable key_table;
    ValueTable value_table;
    KeyScales<KeyRecord> key_scales;
    ValueScales<ValueRecord> value_scales;
    Keys key_codes[4][2];

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

    // All that is known of keys before queries are.
    __device__ void begin() {
#pragma unroll
        for (int tile = 0; tile < kTilesAhead; ++tile) read_keys(tile);
        key_scales.template read<kCopied>(keys);
    }
    __device__ void read_keys(int tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
            key_codes[tile][half].template read<kCopied>(keys + token_in_page(tile, half) * KeyRecord::kTokenBytes, threadIdx.x % 4 * kLanePairs);
    }
    __device__ void read_value_scales() { value_scales.read(values); }
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
    __device__ float key_scale(int token) const {
        const float scale = key_scales.of(token);
        return is_exact(token) ? 1.f : scale;
    }
    // sum += rows `tile` of keys times the queries.
    __device__ void multiply_tile(int tile, const u32 (&rows)[2][kLanePairs], const ColumnQueries& queries, float (&sum)[4]) const {
        constexpr int kExact = kIsFirst && KeyRecord::kIsUniform ? FIRST_EXACT : 0;  // tokens whose queries are not those of the others
        if (16 * tile + 16 <= kExact) {
            multiply_keys(rows, queries.operand, sum);
            return;
        }
        multiply_keys(rows, key_scales.operand(queries), sum);
        if (16 * tile >= kExact) return;
        float exact[4] = {};
        multiply_keys(rows, queries.operand, exact);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (is_exact(token_in_page(tile, i / 2))) sum[i] = exact[i];
    }
    // What channels add to the scores of columns 2c and 2c + 1.
    __device__ float2 added_scores(const ColumnQueries& queries) { return key_scales.template scores<kCopied>(keys, queries); }
    __device__ float value_scale(int token) const {
        const float scale = value_scales.of(token);
        return is_exact(token) ? value_scales.of_exact() : scale;
    }
    // Of one token: its weights, and these times its scale as they are multiplied.
    __device__ void add_weights(int token, const float (&weight)[2], u32 scaled) { value_scales.add(token, is_exact(token), weight, scaled); }
    template <bool kIsNarrow>
    __device__ void finish(ColumnSums<kIsNarrow>& state) const {
        value_scales.finish(state);
    }
};

// A page that is being written, up to token `written` of its sequence. kCopied: to shared memory, rows a little apart, so that lanes
// which read together meet in no bank.
template <bool kCopied>
struct OwnPage {
    static constexpr bool kIsWhole = false, kReadsAhead = true;
    static constexpr int kTilesAhead = 4, kStride = kCopied ? HEAD_DIM + 8 : HEAD_DIM;
    struct Values {};
    const __nv_bfloat16 *keys, *values;
    int written;

    __device__ OwnPage(const __nv_bfloat16* keys, const __nv_bfloat16* values, int written) : keys(keys), values(values), written(written) {}
    __device__ OwnPage(const SealedProblem& problem, int sequence, int number, int kv_head, int written) : written(written) {
        const long long slot = problem.own[(size_t)sequence * problem.own_stride + number];
        const size_t place = ((size_t)slot * problem.kv_heads + kv_head) * kPage * HEAD_DIM;
        keys = problem.own_keys + place;
        values = problem.own_values + place;
    }
    // The first `count` tokens on their way to shared memory, by a block.
    __device__ OwnPage<true> copy(__nv_bfloat16* to, int count) const {
        const OwnPage<true> copied(to, to + kPage * OwnPage<true>::kStride, written);
        constexpr int kChunks = HEAD_DIM / 8;  // of 16 bytes
        for (int at = threadIdx.x; at < 2 * count * kChunks; at += blockDim.x) {
            const bool is_key = at < count * kChunks;
            const int chunk = at % kChunks * 8, token = (is_key ? at : at - count * kChunks) / kChunks;
            const __nv_bfloat16* target = (is_key ? copied.keys : copied.values) + token * OwnPage<true>::kStride + chunk;
            copy_16(shared_address(target), (is_key ? keys : values) + token * HEAD_DIM + chunk);
        }
        return copied;
    }
    static __device__ bool is_exact(int) { return true; }
    __device__ bool has_tile(int tile) const { return 16 * tile <= written % kPage; }
    __device__ void begin() {}
    __device__ void read_keys(int) {}
    __device__ void read_value_scales() {}
    __device__ void read_values(int, Values&) const {}
    __device__ void key_pairs(int tile, int half, u32 (&pairs)[kLanePairs]) const {
        read_exact<kCopied>(keys + token_in_page(tile, half) * kStride + threadIdx.x % 4 * 2 * kLanePairs, pairs);
    }
    __device__ void value_pairs(int token, const Values&, u32 (&pairs)[kValuePairs]) const {
        read_exact<kCopied>(values + token * kStride + threadIdx.x % 32 / 4 * 2 * kValuePairs, pairs);
        // What lies beyond a sequence's end is left over from another; weighted 0, a number that is not finite would remain.
        if (token > written % kPage)
#pragma unroll
            for (int j = 0; j < kValuePairs; ++j) pairs[j] = 0;
    }
    __device__ float key_scale(int) const { return 1.f; }
    __device__ void multiply_tile(int, const u32 (&rows)[2][kLanePairs], const ColumnQueries& queries, float (&sum)[4]) const {
        multiply_keys(rows, queries.operand, sum);
    }
    __device__ float2 added_scores(const ColumnQueries&) const { return make_float2(0.f, 0.f); }
    __device__ float value_scale(int) const { return 1.f; }
    __device__ void add_weights(int, const float (&)[2], u32) {}
    template <bool kIsNarrow>
    __device__ void finish(ColumnSums<kIsNarrow>&) const {}
};

// The tokens of one page that has begun, of which `first_token` is the first, as far as the queries see them. `halfway` is called
// when keys are done with.
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
    if (Page::kReadsAhead) page.read_value_scales();
    const float2 all_added = page.added_scores(queries);
    const float added[2] = {all_added.x, all_added.y};
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
        if (tile + Page::kTilesAhead < 4) {
            page.read_keys(tile + Page::kTilesAhead);
        } else if (Page::kReadsAhead) {
            read_values(tile + Page::kTilesAhead - 4);  // the values' codes take the registers of the keys'
        }
        page.multiply_tile(tile, rows, queries, sum);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int in_page = token_in_page(tile, half), token = first_token + in_page;
            const float scale = page.key_scale(in_page);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float& s = sum[2 * half + i];
                s = (__fmul_rn(s, scale) + (Page::is_exact(in_page) ? 0.f : added[i])) * queries.factor[i];
                if (HAS_SOFTCAP) s = problem.softcap * tanhf(s / problem.softcap) * kLog2e;
                if ((!Page::kIsWhole && token > queries.last[i]) || (HAS_WINDOW && token < queries.oldest[i])) s = kNothing;
                state.largest[i] = fmaxf(state.largest[i], s);
            }
        }
    }
    halfway();
    if (!Page::kReadsAhead) page.read_value_scales();
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
            const int in_page = token_in_page(step, half);
            const float scale = page.value_scale(in_page);
            float weight[2], scaled[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                weight[i] = power_of_two(score[step][2 * half + i] - reference[i]);
                state.norm[i] += weight[i];
                scaled[i] = weight[i] * scale;
            }
            const u32 rounded = halves(scaled[0], scaled[1]), weights = transposed(rounded);
            page.add_weights(in_page, weight, rounded);
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
        if (Page::kReadsAhead && step + Page::kTilesAhead < 4) read_values(step + Page::kTilesAhead);
    }
    page.finish(state);
}

// A page of a sequence before the queries' own, where it lies. `read_queries` is called when its keys are under way.
template <bool kIsFirst, bool kIsNarrow, class ReadQueries, class Halfway>
__device__ inline void attend_records(const SealedProblem& problem, const u32* tables, int sequence, int kv_head, int page,
                                      ColumnSums<kIsNarrow>& state, ReadQueries read_queries, Halfway halfway) {
    SealedPage<kIsFirst, false> sealed(problem, tables, sequence, kv_head);
    sealed.find(problem, sequence, kv_head, page);
    sealed.begin();
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
    sealed.begin();
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
template <bool kIsNarrow, bool kCopied>
__device__ inline void attend_own_page(const SealedProblem& problem, const ColumnQueries& queries, OwnPage<kCopied> own,
                                       ColumnSums<kIsNarrow>& state) {
    attend_page(problem, queries, own, own.written / kPage * kPage, state, [] {});
}

// Begin to bring records of a page nearer, a line a lane.
template <int kBytes>
__device__ inline void fetch_record(const u8* record) {
    for (int line = (threadIdx.x & 31) * 128; line < kBytes; line += 32 * 128) asm volatile("prefetch.global.L2 [%0];" ::"l"(record + line));
}
// The same of a sequence's first tokens.
__device__ inline void fetch_first(const SealedProblem& problem, int sequence, int kv_head) {
    const size_t place = (size_t)problem.first[(size_t)sequence * problem.first_stride] * problem.kv_heads + kv_head;
    fetch_record<FIRST_EXACT * HEAD_DIM * 2>(problem.keys + place * KeyRecord::kBytes);
    fetch_record<FIRST_EXACT * HEAD_DIM * 2>(problem.values + place * ValueRecord::kBytes);
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
