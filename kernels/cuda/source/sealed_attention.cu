// Attention of new tokens over sealed pages, their sequence's first tokens and their own page; codes stay codes.
//
// The product of keys and queries has tokens as rows and columns of eight (new tokens' heads) as columns, that of values has
// dimensions as rows: an operand's register is a pair of neighbours of one token, which is what a code stands for, or two such
// pairs with their halves exchanged. Norms multiply scores and weights, a page's mean is one more row of keys.
//
// Each page is attended to for itself. Pages are merged in their order to splits of kSplitPages, splits in their order to the
// result, the own page last. A warp takes a page and a block a split where few sequences have one token each, a warp a split
// where many have, and a warp takes its columns through all pages where sequences have many tokens: the sums are the same, and
// a token's result depends on its sequence alone.
#include "sealed.cuh"

using namespace nested;

#ifndef ROTATED_VALUES  // whether the result has to be rotated back
#define ROTATED_VALUES 1
#endif
#ifndef MERGED_TOGETHER  // splits that are read at once when they are merged
#define MERGED_TOGETHER 8
#endif
#ifndef ROW_WARPS  // of a block that takes many tokens
#define ROW_WARPS 8
#endif

constexpr int kQueryColumns = 8;  // of a product
constexpr int kSealedSplit = 8;   // pages; also warps of a block with one token a sequence
constexpr int kLanePairs = HEAD_DIM / 8;    // of a token's keys: a quad has them all
constexpr int kValuePairs = HEAD_DIM / 16;  // of a token's values: eight lanes have them all
constexpr int kKeySteps = HEAD_DIM / 16, kValueTiles = HEAD_DIM / 16;

struct SealedProblem {
    const Value* q;               // [sequences, tokens, heads, HEAD_DIM], in the basis of the pages
    const u8* keys;               // [pages, kv heads, KeyRecord::kBytes]
    const u8* values;             // [pages, kv heads, ValueRecord::kBytes]
    const __nv_bfloat16* own_keys;  // [slots, kv heads, kPage, HEAD_DIM]
    const __nv_bfloat16* own_values;
    const u32* key_table;         // [2^KEY_BITS] pairs of half-precision numbers
    const u32* value_table;
    const long long* sealed;     // [sequences, pages of a table], rows `sealed_stride` apart
    const long long* first;      // [sequences]: pages of the first tokens, `first_stride` apart
    const long long* own;        // [sequences, own pages]: slots, rows `own_stride` apart
    const long long* positions;  // [sequences, tokens], in order; negative: of another format, to be left alone
    const float* signs;          // [HEAD_DIM], of the rotation
    Value* out;                   // as q, in the model's basis
    float* partial;               // [sequences, heads, splits, HEAD_DIM], of one token a sequence
    float2* partial_norm;         // [sequences, heads, splits]: largest score in base 2, sum of weights
    int tokens, heads, kv_heads, window, sealed_stride, first_stride, own_stride;
    float scale, softcap;

    __device__ int group() const { return heads / kv_heads; }
};

__device__ inline int oldest_seen(const SealedProblem& problem, int position) {
    return HAS_WINDOW ? max(position - problem.window + 1, 0) : 0;
}

__device__ inline void multiply_halves(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline u32 halves(float a, float b) {
    const __half2 both = __floats2half2_rn(a, b);
    return *reinterpret_cast<const u32*>(&both);
}
__device__ inline u32 halves(u32 brains) {  // of two bfloat16 numbers
    const float2 both = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&brains));
    return halves(both.x, both.y);
}
// Rows and columns of an 8 x 8 matrix exchanged.
__device__ inline u32 transposed(u32 pair) {
    u32 result;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
}
__device__ inline float of_eight_max(float x) {
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, distance));
    return x;
}
__device__ inline float of_eight_sum(float x) {
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

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

// Where a sequence's only token stands, and a split of its pages; the last split is the own page.
struct TokenSplit {
    int position, begin, end;
    bool is_own;

    __device__ TokenSplit(const SealedProblem& problem, int sequence, int split, int splits) {
        position = (int)problem.positions[sequence];
        const int own_page = position / kPage;
        is_own = split == splits - 1;
        begin = is_own ? own_page : max(split * kSealedSplit, oldest_seen(problem, position) / kPage);
        end = is_own ? own_page + 1 : min((split + 1) * kSealedSplit, own_page);
    }
    __device__ bool is_empty() const { return position < 0 || begin >= end; }
};

// The query heads of one KV head that are a tile's columns.
struct HeadTile {
    int kv_head, first_row;

    __device__ HeadTile(const SealedProblem& problem, int tile)
        : kv_head(tile % problem.kv_heads), first_row(tile / problem.kv_heads * kQueryColumns) {}
    __device__ int rows(const SealedProblem& problem) const { return min(problem.group() - first_row, kQueryColumns); }
    __device__ size_t row(const SealedProblem& problem, int sequence, int column) const {
        return (size_t)sequence * problem.heads + kv_head * problem.group() + first_row + column;
    }
    __device__ void read(const SealedProblem& problem, int sequence, int position, ColumnQueries& queries) const {
        const int g = (threadIdx.x & 31) / 4;
        queries.read(problem, problem.q + row(problem, sequence, g) * HEAD_DIM, g < rows(problem) ? position : -1);
    }
};

// Few sequences of one token: a warp takes a page. A grid of (splits, kv heads x tiles of their query heads, sequences).
// Shared memory: tables, of which the sums of the warps [kSealedSplit][kQueryColumns][HEAD_DIM] take the place.
extern "C" __global__ void __launch_bounds__(kSealedSplit * 32, HEAD_DIM <= 128 ? 2 : 1)
attend_sealed_pages(SealedProblem problem, int splits) {
    extern __shared__ __align__(16) u32 tables[];
    __shared__ float2 norms[kSealedSplit][kQueryColumns];
    launch_dependents();
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4, sequence = blockIdx.z;
    const HeadTile tile(problem, blockIdx.y);
    const TokenSplit split(problem, sequence, blockIdx.x, splits);
    if (split.is_empty()) {
        wait_for_inputs();
        return;
    }
    const int page = split.is_own ? split.begin + warp : (int)blockIdx.x * kSealedSplit + warp;
    const bool has_page = page >= split.begin && page < split.end;
    if (!split.is_own) {
        if (has_page) fetch_keys(problem, sequence, tile.kv_head, page);
        fill_tables(problem, tables);
    }
    __syncthreads();
    wait_for_inputs();
    ColumnSums state;
    if (has_page) {
        ColumnQueries queries;
        tile.read(problem, sequence, split.position, queries);
        if (split.is_own) {
            attend_own_page(problem, queries, sequence, 0, tile.kv_head, split.position, state);
        } else {
            attend_sealed_page(problem, queries, tables, sequence, tile.kv_head, page, state, [] {});
        }
    }
    __syncthreads();  // the sums take the place of the tables
    float* sums = reinterpret_cast<float*>(tables);
    if (has_page) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int column = 2 * c + i;
            const float norm = of_eight_sum(state.norm[i]);
            if (g == 0) norms[warp][column] = make_float2(state.largest[i], norm);
#pragma unroll
            for (int j = 0; j < kValueTiles; ++j)
                *reinterpret_cast<float2*>(sums + (warp * kQueryColumns + column) * HEAD_DIM + 2 * (g * kValuePairs + j)) =
                    make_float2(state.sums[j][i], state.sums[j][2 + i]);
        }
    }
    __syncthreads();
    const int first = split.is_own ? 0 : split.begin % kSealedSplit, count = split.end - split.begin;
    for (int index = threadIdx.x; index < tile.rows(problem) * HEAD_DIM; index += kSealedSplit * 32) {
        const int row = index / HEAD_DIM;
        Merged all;
        float sum = 0.f;
        for (int at = first; at < first + count; ++at)
            sum = merged(sum, sums[at * kQueryColumns * HEAD_DIM + index], all.add(norms[at][row].x, norms[at][row].y));
        const size_t place = tile.row(problem, sequence, row) * splits + blockIdx.x;
        problem.partial[place * HEAD_DIM + index % HEAD_DIM] = sum;
        if (index % HEAD_DIM == 0) problem.partial_norm[place] = make_float2(all.largest, all.norm);
    }
}

// Sums of a warp's columns in shared memory, four numbers of a lane side by side.
struct StoredSums {
    float4* place;
    Merged norms[2];

    __device__ explicit StoredSums(void* memory) : place(reinterpret_cast<float4*>(memory) + (threadIdx.x & 31)) {}
    __device__ void clear() {
        for (int j = 0; j < kValueTiles; ++j) place[j * 32] = make_float4(0.f, 0.f, 0.f, 0.f);
        norms[0] = norms[1] = Merged();
    }
    __device__ void add(int j, float4 added, float2 even, float2 odd) {
        float4& sum = place[j * 32];
        sum = make_float4(merged(sum.x, added.x, even), merged(sum.y, added.y, odd), merged(sum.z, added.z, even), merged(sum.w, added.w, odd));
    }
    __device__ void add(const ColumnSums& state) {
        const float2 even = norms[0].add(state.largest[0], of_eight_sum(state.norm[0]));
        const float2 odd = norms[1].add(state.largest[1], of_eight_sum(state.norm[1]));
#pragma unroll
        for (int j = 0; j < kValueTiles; ++j) add(j, make_float4(state.sums[j][0], state.sums[j][1], state.sums[j][2], state.sums[j][3]), even, odd);
    }
    __device__ void add(const StoredSums& other) {
        const float2 even = norms[0].add(other.norms[0].largest, other.norms[0].norm);
        const float2 odd = norms[1].add(other.norms[1].largest, other.norms[1].norm);
        for (int j = 0; j < kValueTiles; ++j) add(j, other.place[j * 32], even, odd);
    }
    // The two dimensions of value pair g * kValuePairs + j of column 2c + i.
    __device__ float2 of(int j, int i) const {
        const float4 sum = place[j * 32];
        return i == 0 ? make_float2(sum.x, sum.z) : make_float2(sum.y, sum.w);
    }
};

// Pages begin .. end - 1 of a sequence, at most a split.
__device__ inline void attend_split(const SealedProblem& problem, const ColumnQueries& queries, const u32* tables, int sequence, int kv_head,
                                    int begin, int end, StoredSums& sums) {
    sums.clear();
    for (int page = begin; page < end; ++page) {
        ColumnSums state;
        attend_sealed_page(problem, queries, tables, sequence, kv_head, page, state, [&] {
            if (page + 1 < end) fetch_keys(problem, sequence, kv_head, page + 1);
        });
        sums.add(state);
    }
}

// Many sequences of one token: a warp takes a split. A grid of (splits x kv heads x tiles / kSealedSplit, sequences).
// Shared memory: tables, then sums of the warps [kSealedSplit][kQueryColumns][HEAD_DIM].
extern "C" __global__ void __launch_bounds__(kSealedSplit * 32, HEAD_DIM <= 128 ? 2 : 1)
attend_sealed_splits(SealedProblem problem, int splits, int tiles) {
    extern __shared__ __align__(16) u32 tables[];
    launch_dependents();
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4, sequence = blockIdx.y;
    const int item = blockIdx.x * kSealedSplit + warp, number = item / tiles;
    const HeadTile tile(problem, item % tiles);
    const TokenSplit split(problem, sequence, number, splits);
    const bool has_work = number < splits && !split.is_empty();
    if (has_work && !split.is_own) fetch_keys(problem, sequence, tile.kv_head, split.begin);
    if (__syncthreads_or(has_work && !split.is_own)) fill_tables(problem, tables);
    __syncthreads();
    wait_for_inputs();
    if (!has_work) return;
    ColumnQueries queries;
    tile.read(problem, sequence, split.position, queries);
    StoredSums sums(reinterpret_cast<u8*>(tables) + kTableBytes + warp * kQueryColumns * HEAD_DIM * sizeof(float));
    if (split.is_own) {
        ColumnSums state;
        attend_own_page(problem, queries, sequence, 0, tile.kv_head, split.position, state);
        sums.clear();
        sums.add(state);
    } else {
        attend_split(problem, queries, tables, sequence, tile.kv_head, split.begin, split.end, sums);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int column = 2 * c + i;
        if (column >= tile.rows(problem)) continue;
        const size_t place = tile.row(problem, sequence, column) * splits + number;
        if (g == 0) problem.partial_norm[place] = make_float2(sums.norms[i].largest, sums.norms[i].norm);
#pragma unroll
        for (int j = 0; j < kValueTiles; ++j)
            *reinterpret_cast<float2*>(problem.partial + place * HEAD_DIM + 2 * (g * kValuePairs + j)) = sums.of(j, i);
    }
}

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

// A grid of (heads / kMergedHeads, sequences).
extern "C" __global__ void __launch_bounds__(kMergedColumns)
merge_sealed(SealedProblem problem, int splits) {
    __shared__ __align__(16) float result[kMergedColumns];
    launch_dependents();
    const int sequence = blockIdx.y, first = blockIdx.x * kMergedColumns, columns = problem.heads * HEAD_DIM;
    if (problem.positions[sequence] < 0) {
        wait_for_inputs();
        return;
    }
    merge_heads(problem, splits, sequence, blockIdx.x * kMergedHeads, result);
    if (first + (int)threadIdx.x < columns) problem.out[(size_t)sequence * columns + first + threadIdx.x] = to_value(result[threadIdx.x]);
}

// The same as inputs of a product, of sequences from `first_sequence` on; the grid covers all slots.
extern "C" __global__ void __launch_bounds__(kMergedColumns)
merge_sealed_prepare(SealedProblem problem, int splits, int first_sequence, int sequences, u32* inputs, float2* scales, int slots,
                     int pass_tiles) {
    constexpr int kTiles = kMergedColumns / kColumns;
    __shared__ __align__(16) float result[kMergedColumns];
    launch_dependents();
    const int slot = blockIdx.y, tile = threadIdx.x / 32, tiles = (problem.heads * HEAD_DIM + kColumns - 1) / kColumns;
    const bool exists = slot < sequences;
    if (exists) {
        merge_heads(problem, splits, first_sequence + slot, blockIdx.x * kMergedHeads, result);
    } else {
        wait_for_inputs();
    }
    if (tile >= kTiles) return;
    float value[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = exists ? result[4 * threadIdx.x + i] : 0.f;
    store_inputs(value, slot, blockIdx.x * kTiles + tile, tiles, slots, pass_tiles, inputs, scales);
}

// Several tokens a sequence. A grid of (own pages x tiles of a page, kv heads, sequences); a page's columns are its tokens times
// the query heads of a KV head, of which a warp takes kQueryColumns through all pages.
// Shared memory: tables, then [ROW_WARPS][2][kQueryColumns][HEAD_DIM] floats, the sums of a split and those of all before it.
extern "C" __global__ void __launch_bounds__(ROW_WARPS * 32)
attend_sealed_rows(SealedProblem problem, int page_tiles) {
    extern __shared__ __align__(16) u32 tables[];
    launch_dependents();
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
    const int kv_head = blockIdx.y, sequence = blockIdx.z, group = problem.group();
    wait_for_inputs();
    const int start = (int)problem.positions[(size_t)sequence * problem.tokens], stop = start + problem.tokens;
    // The last pages have most to do, so they begin first.
    const int number = gridDim.x / page_tiles - 1 - blockIdx.x / page_tiles, own_page = start / kPage + number;
    if (start < 0 || own_page * kPage >= stop) return;
    if (own_page > 0) fill_tables(problem, tables);
    __syncthreads();
    const int first_column = (blockIdx.x % page_tiles * ROW_WARPS + warp) * kQueryColumns;
    const auto position_of = [&](int column) {
        const int token = column / group, position = own_page * kPage + token;
        return token < kPage && position >= start && position < stop ? position : -1;
    };
    const auto row_of = [&](int column) {  // of queries and results
        const size_t token = (size_t)sequence * problem.tokens + position_of(column) - start;
        return (token * problem.heads + kv_head * group + column % group) * HEAD_DIM;
    };
    const int position = position_of(first_column + g);
    if (!__any_sync(~0u, position >= 0)) return;
    ColumnQueries queries;
    queries.read(problem, position >= 0 ? problem.q + row_of(first_column + g) : nullptr, position);
    float* stored = reinterpret_cast<float*>(reinterpret_cast<u8*>(tables) + kTableBytes) + warp * 2 * kQueryColumns * HEAD_DIM;
    StoredSums of_split(stored), of_all(stored + kQueryColumns * HEAD_DIM);
    of_all.clear();
    int oldest_page = 0;
    if (HAS_WINDOW) oldest_page = oldest_seen(problem, max(own_page * kPage, start)) / kPage;
    for (int split = oldest_page / kSealedSplit; split * kSealedSplit < own_page; ++split) {
        attend_split(problem, queries, tables, sequence, kv_head, max(split * kSealedSplit, oldest_page),
                     min((split + 1) * kSealedSplit, own_page), of_split);
        of_all.add(of_split);
    }
    ColumnSums state;
    attend_own_page(problem, queries, sequence, number, kv_head, min(own_page * kPage + kPage, stop) - 1, state);
    of_all.add(state);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float sum[2 * kValuePairs];
#pragma unroll
        for (int j = 0; j < kValueTiles; ++j) {
            const float2 both = of_all.of(j, i);
            sum[2 * j] = __fdiv_rn(both.x, of_all.norms[i].norm);
            sum[2 * j + 1] = __fdiv_rn(both.y, of_all.norms[i].norm);
        }
        if (ROTATED_VALUES) unrotate<2 * kValuePairs, 4>(sum);
        const int column = first_column + 2 * c + i;
        float signs[2 * kValuePairs];
        read_signs(problem, 2 * g * kValuePairs, signs);
        finish(signs, sum);
        if (position_of(column) >= 0) {
            Value* to = problem.out + row_of(column) + 2 * g * kValuePairs;
#pragma unroll
            for (int k = 0; k < 2 * kValuePairs; ++k) to[k] = to_value(sum[k]);
        }
    }
}
