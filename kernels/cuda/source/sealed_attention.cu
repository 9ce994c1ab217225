// Attention of one new token a sequence over sealed pages, its sequence's first tokens and its own page; codes stay codes.
//
// The product of keys and queries has tokens as rows and heads as columns, that of values has dimensions as rows: an operand's
// register is a pair of neighbours of one token, which is what a code stands for, or two such pairs with their halves
// exchanged. Norms multiply scores and weights, a page's mean is one more row of keys. A warp takes pages in their order, a
// block the warps' in theirs, and what a block has no room for is merged split by split: a row's result depends on its
// sequence alone.
#include "sealed.cuh"

using namespace nested;

#ifndef SAME_TABLE  // of keys and values
#define SAME_TABLE (KEY_BITS == VALUE_BITS)
#endif
#ifndef WARP_PAGES  // that a warp takes
#define WARP_PAGES 2
#endif

constexpr int kHeads = 8;  // of a tile, columns of a product
constexpr int kSealedWarps = 8, kSealedSplit = kSealedWarps * WARP_PAGES;
constexpr int kLanePairs = HEAD_DIM / 8;    // of a token's keys: a quad has them all
constexpr int kValuePairs = HEAD_DIM / 16;  // of a token's values: eight lanes have them all
constexpr int kKeySteps = HEAD_DIM / 16, kValueTiles = HEAD_DIM / 16;

struct SealedProblem {
    const Value* q;               // [sequences, heads, HEAD_DIM], in the basis of the pages
    const u8* keys;               // [pages, kv heads, KeyRecord::kBytes]
    const u8* values;             // [pages, kv heads, ValueRecord::kBytes]
    const __nv_bfloat16* own_keys;  // [slots, kv heads, kPage, HEAD_DIM]
    const __nv_bfloat16* own_values;
    const u32* key_table;         // [2^KEY_BITS] pairs of half-precision numbers
    const u32* value_table;
    const long long* sealed;     // [sequences, pages of a table]
    const long long* first;      // [sequences]: pages of the first tokens
    const long long* own;        // [sequences]: slots
    const long long* positions;  // [sequences]
    float* partial;               // [sequences, heads, splits, HEAD_DIM]
    float2* partial_norm;         // [sequences, heads, splits]: largest score in base 2, sum of weights
    int heads, kv_heads, table_pages, window;
    float scale, softcap;
};

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

// Queries of eight heads as B operands, each over its own largest number so that half precision holds them.
struct HeadQueries {
    u32 operand[kKeySteps][2];
    float factor[2], sum[2];  // of heads 2c and 2c + 1; the sum is that of the operands

    __device__ void read(const SealedProblem& problem, int sequence, int kv_head, int first_row) {
        const int lane = threadIdx.x & 31, g = lane / 4, c = lane % 4, group = problem.heads / problem.kv_heads;
        const bool exists = first_row + g < group;
        const Value* from = problem.q + ((size_t)sequence * problem.heads + kv_head * group + first_row + g) * HEAD_DIM;
        float number[2 * kLanePairs], largest = 0.f;
#pragma unroll
        for (int i = 0; i < 2 * kLanePairs; ++i) {
            number[i] = exists ? to_float(from[2 * kLanePairs * c + i]) : 0.f;
            largest = fmaxf(largest, fabsf(number[i]));
        }
        largest = fmaxf(of_quad_max(largest), 1e-30f);
#pragma unroll
        for (int step = 0; step < kKeySteps; ++step)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int at = 2 * (2 * step + i);
                operand[step][i] = halves(number[at] / largest, number[at + 1] / largest);
            }
#pragma unroll
        for (int i = 0; i < 2; ++i) factor[i] = problem.scale * __shfl_sync(~0u, largest, (2 * c + i) * 4);
        const u32 one = 0x3C003C00, ones[4] = {one, one, one, one};  // twice 1 each
        float total[4] = {};
#pragma unroll
        for (int step = 0; step < kKeySteps; ++step) multiply_halves(total, ones, operand[step][0], operand[step][1]);
        sum[0] = total[0], sum[1] = total[1];
    }
};

// What eight heads have attended to so far. Of sums[j], rows g and g + 8 are the two dimensions of pair g * kValuePairs + j.
struct HeadSums {
    float sums[kValueTiles][4];
    float largest[2], norm[2];  // of heads 2c and 2c + 1; the norm is this lane's share

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

// A page's keys and values as codes; of a sequence's first page (kIsFirst) the first tokens as they are.
template <bool kIsFirst>
struct SealedPage {
    const u8 *keys, *values;
    const __nv_bfloat16 *exact_keys, *exact_values;
    Table<KEY_BITS> key_table;
    Table<VALUE_BITS> value_table;

    __device__ bool is_exact(int token) const { return kIsFirst && token < FIRST_EXACT; }

    __device__ void key_pairs(int token, u32 (&pairs)[kLanePairs]) const {
        const int first = threadIdx.x % 4 * kLanePairs;
        if (is_exact(token)) {
            read_exact(exact_keys + token * HEAD_DIM + 2 * first, pairs);
        } else {
            look_up(key_table, keys + token * KeyRecord::kTokenBytes, first, pairs);
        }
    }
    __device__ void value_pairs(int token, u32 (&pairs)[kValuePairs]) const {
        const int first = threadIdx.x % 32 / 4 * kValuePairs;
        if (is_exact(token)) {
            read_exact(exact_values + token * HEAD_DIM + 2 * first, pairs);
        } else {
            look_up(value_table, values + token * ValueRecord::kTokenBytes, first, pairs);
        }
    }
    __device__ float key_norm(int token) const {
        return is_exact(token) ? 1.f : norm_of(keys[KeyRecord::kNorms + token], range_at(keys + KeyRecord::kNormRange));
    }
    __device__ float value_norm(int token) const {
        return is_exact(token) ? 1.f : norm_of(values[ValueRecord::kNorms + token], range_at(values + ValueRecord::kNormRange));
    }
    // What the page's mean adds to the scores of heads 2c and 2c + 1. Its codes are numbers above 1024 for the product, which the
    // sum of the queries takes away again.
    __device__ float2 mean_scores(const HeadQueries& queries) const {
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

// A page that is being written.
struct OwnPage {
    const __nv_bfloat16 *keys, *values;

    __device__ bool is_exact(int) const { return true; }
    __device__ void key_pairs(int token, u32 (&pairs)[kLanePairs]) const {
        read_exact(keys + token * HEAD_DIM + 2 * (threadIdx.x % 4 * kLanePairs), pairs);
    }
    __device__ void value_pairs(int token, u32 (&pairs)[kValuePairs]) const {
        read_exact(values + token * HEAD_DIM + 2 * (threadIdx.x % 32 / 4 * kValuePairs), pairs);
    }
    __device__ float key_norm(int) const { return 1.f; }
    __device__ float value_norm(int) const { return 1.f; }
    __device__ float2 mean_scores(const HeadQueries&) const { return make_float2(0.f, 0.f); }
};

// The tokens of one page, of which `first_token` is the first, up to `last` of the sequence and from `oldest` on.
template <class Page>
__device__ inline void attend_page(const SealedProblem& problem, const HeadQueries& queries, const Page& page, int first_token, int last,
                                   int oldest, HeadSums& state) {
    const int lane = threadIdx.x & 31, g = lane / 4, c = lane % 4;
    const float2 means = page.mean_scores(queries);
    const float mean[2] = {means.x, means.y};
    float score[4][4], value_norm[4][2], largest[2] = {state.largest[0], state.largest[1]};
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
        u32 rows[2][kLanePairs];
        page.key_pairs(16 * tile + g, rows[0]);
        page.key_pairs(16 * tile + 8 + g, rows[1]);
        float (&sum)[4] = score[tile];
        sum[0] = sum[1] = sum[2] = sum[3] = 0.f;
#pragma unroll
        for (int step = 0; step < kKeySteps; ++step) {
            const u32 operand[4] = {rows[0][2 * step], rows[1][2 * step], rows[0][2 * step + 1], rows[1][2 * step + 1]};
            multiply_halves(sum, operand, queries.operand[step][0], queries.operand[step][1]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int in_page = 16 * tile + 8 * half + g, token = first_token + in_page;
            const bool seen = token <= last && token >= oldest;
            const float norm = page.key_norm(in_page);
            value_norm[tile][half] = page.value_norm(in_page);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float& s = sum[2 * half + i];
                s = (s * norm + (page.is_exact(in_page) ? 0.f : mean[i])) * queries.factor[i];
                if (HAS_SOFTCAP) s = problem.softcap * tanhf(s / problem.softcap);
                s = seen ? s * kLog2e : kNothing;
                largest[i] = fmaxf(largest[i], s);
            }
        }
    }
    float reference[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        largest[i] = of_eight_max(largest[i]);
        reference[i] = largest[i] == kNothing ? 0.f : largest[i];
        const float factor = power_of_two(state.largest[i] - reference[i]);
        state.largest[i] = largest[i];
        state.norm[i] *= factor;
#pragma unroll
        for (int j = 0; j < kValueTiles; ++j) {
            state.sums[j][i] *= factor;
            state.sums[j][2 + i] *= factor;
        }
    }
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        u32 weights[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float weight[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                weight[i] = power_of_two(score[step][2 * half + i] - reference[i]);
                state.norm[i] += weight[i];
                weight[i] *= value_norm[step][half];
            }
            weights[half] = transposed(halves(weight[0], weight[1]));
        }
        u32 pairs[4][kValuePairs];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = 16 * step + 2 * c + i % 2 + i / 2 * 8;
            page.value_pairs(token, pairs[i]);
            // What lies beyond a sequence's end is left over from another; weighted 0, a number that is not finite would remain.
            if (first_token + token > last)
#pragma unroll
                for (int j = 0; j < kValuePairs; ++j) pairs[i][j] = 0;
        }
#pragma unroll
        for (int j = 0; j < kValueTiles; ++j) {
            const u32 operand[4] = {__byte_perm(pairs[0][j], pairs[1][j], 0x5410), __byte_perm(pairs[0][j], pairs[1][j], 0x7632),
                                    __byte_perm(pairs[2][j], pairs[3][j], 0x5410), __byte_perm(pairs[2][j], pairs[3][j], 0x7632)};
            multiply_halves(state.sums[j], operand, weights[0], weights[1]);
        }
    }
}

// A grid of (splits, kv heads x tiles of kHeads query heads, sequences); the last split of a sequence is its own page.
// Shared memory: tables, of which the sums of the warps [kSealedWarps][kHeads][HEAD_DIM] take the place.
extern "C" __global__ void __launch_bounds__(kSealedWarps * 32, HEAD_DIM <= 128 ? 2 : 1)
attend_sealed(SealedProblem problem, int splits) {
    extern __shared__ __align__(16) u32 tables[];
    __shared__ float2 norms[kSealedWarps][kHeads];
    launch_dependents();
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4, sequence = blockIdx.z;
    const int kv_head = blockIdx.y % problem.kv_heads, first_row = blockIdx.y / problem.kv_heads * kHeads;
    const int position = (int)problem.positions[sequence], own_page = position / kPage;
    const int oldest = HAS_WINDOW ? max(position - problem.window + 1, 0) : 0;
    const bool is_own = blockIdx.x == splits - 1;
    const int begin = is_own ? own_page : max(blockIdx.x * kSealedSplit, oldest / kPage);
    const int end = is_own ? own_page + 1 : min((blockIdx.x + 1) * kSealedSplit, own_page);
    if (begin >= end) {
        wait_for_inputs();
        return;
    }
    Table<KEY_BITS> key_table{tables};
    Table<VALUE_BITS> value_table{SAME_TABLE ? tables : tables + Table<KEY_BITS>::kWords};
    if (!is_own) {
        Table<KEY_BITS>::fill(tables, problem.key_table);
        if (!SAME_TABLE) Table<VALUE_BITS>::fill(tables + Table<KEY_BITS>::kWords, problem.value_table);
    }
    __syncthreads();
    wait_for_inputs();
    HeadQueries queries;
    queries.read(problem, sequence, kv_head, first_row);
    HeadSums state;
    state.clear();
    if (is_own) {
        if (warp == 0) {
            const size_t place = ((size_t)problem.own[sequence] * problem.kv_heads + kv_head) * kPage * HEAD_DIM;
            attend_page(problem, queries, OwnPage{problem.own_keys + place, problem.own_values + place}, own_page * kPage, position, oldest,
                        state);
        }
    } else {
        const int first_page = blockIdx.x * kSealedSplit + warp * WARP_PAGES;
        for (int page = max(first_page, begin); page < min(first_page + WARP_PAGES, end); ++page) {
            const size_t place = (size_t)problem.sealed[(size_t)sequence * problem.table_pages + page] * problem.kv_heads + kv_head;
            const u8 *keys = problem.keys + place * KeyRecord::kBytes, *values = problem.values + place * ValueRecord::kBytes;
            if (page == 0) {
                const size_t exact = (size_t)problem.first[sequence] * problem.kv_heads + kv_head;
                const SealedPage<true> first{keys,
                                             values,
                                             reinterpret_cast<const __nv_bfloat16*>(problem.keys + exact * KeyRecord::kBytes),
                                             reinterpret_cast<const __nv_bfloat16*>(problem.values + exact * ValueRecord::kBytes),
                                             key_table,
                                             value_table};
                attend_page(problem, queries, first, 0, position, oldest, state);
            } else {
                const SealedPage<false> sealed{keys, values, nullptr, nullptr, key_table, value_table};
                attend_page(problem, queries, sealed, page * kPage, position, oldest, state);
            }
        }
    }
    __syncthreads();  // the sums take the place of the tables
    float* sums = reinterpret_cast<float*>(tables);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int head = 2 * c + i;
        const float norm = of_eight_sum(state.norm[i]);
        if (g == 0) norms[warp][head] = make_float2(state.largest[i], norm);
#pragma unroll
        for (int j = 0; j < kValueTiles; ++j)
            *reinterpret_cast<float2*>(sums + (warp * kHeads + head) * HEAD_DIM + 2 * (g * kValuePairs + j)) =
                make_float2(state.sums[j][i], state.sums[j][2 + i]);
    }
    __syncthreads();
    const int rows = min(problem.heads / problem.kv_heads - first_row, kHeads);
    for (int index = threadIdx.x; index < rows * HEAD_DIM; index += kSealedWarps * 32) {
        const int row = index / HEAD_DIM;
        Merged all;
        float sum = 0.f;
        for (int at = 0; at < (is_own ? 1 : kSealedWarps); ++at)
            sum = merged(sum, sums[at * kHeads * HEAD_DIM + index], all.add(norms[at][row].x, norms[at][row].y));
        const int head = kv_head * (problem.heads / problem.kv_heads) + first_row + row;
        const size_t place = ((size_t)sequence * problem.heads + head) * splits + blockIdx.x;
        problem.partial[place * HEAD_DIM + index % HEAD_DIM] = sum;
        if (index % HEAD_DIM == 0) problem.partial_norm[place] = make_float2(all.largest, all.norm);
    }
}

// The result of `attend_sealed`, in the basis of the pages: float32 [sequences, heads, HEAD_DIM]. A block takes a head of a sequence.
extern "C" __global__ void __launch_bounds__(HEAD_DIM)
merge_sealed(SealedProblem problem, float* out, int splits) {
    launch_dependents();
    wait_for_inputs();
    const int sequence = blockIdx.y, position = (int)problem.positions[sequence];
    const int oldest = HAS_WINDOW ? max(position - problem.window + 1, 0) : 0;
    const size_t row = (size_t)sequence * problem.heads + blockIdx.x;
    Merged all;
    float sum = 0.f;
    const auto add = [&](int split) {
        const size_t place = row * splits + split;
        const float2 norm = problem.partial_norm[place];
        sum = merged(sum, problem.partial[place * HEAD_DIM + threadIdx.x], all.add(norm.x, norm.y));
    };
    const int last_sealed = position / kPage - 1;
    for (int split = oldest / kPage / kSealedSplit; split * kSealedSplit <= last_sealed; ++split) add(split);
    add(splits - 1);
    out[row * HEAD_DIM + threadIdx.x] = __fdiv_rn(sum, all.norm);
}
