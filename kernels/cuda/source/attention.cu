// Attention of new tokens over paged bfloat16 keys and values.
//
// The keys of a sequence are cut into splits of kSplit, counted from its start. A warp takes 16 rows (a row is one head of
// one token; rows share a key/value head) through a split; splits are then merged in their order. Both regimes do this with
// the same instructions, one in registers, one over splits that other warps have computed: a row's result depends on its
// keys alone. Queries and weights are each two bfloat16 numbers, so that only keys and values are rounded.
//
// Operands come straight from memory, 16 bytes a load. A product's terms may take any order, so in a block of 32
// dimensions lane (g, c) of a quad supplies dimensions 8c .. 8c+7 of key g; of values it loads 8 dimensions of keys
// 2c, 2c+1, 2c+8, 2c+9 and pairs the keys: column n of product j is dimension 8n + j of a block of 64.
#include <cuda_bf16.h>

#include "nested.cuh"

#ifndef HEAD_DIM  // a multiple of 64
#define HEAD_DIM 64
#endif
#ifndef HAS_WINDOW
#define HAS_WINDOW 0
#endif
#ifndef HAS_SOFTCAP
#define HAS_SOFTCAP 0
#endif

using namespace nested;

constexpr int kPage = 64, kSplitPages = 2, kSplit = kPage * kSplitPages;
constexpr int kTileRows = 16, kWarps = 4;
constexpr int kKeyBlocks = HEAD_DIM / 32, kValueBlocks = HEAD_DIM / 64;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kNothing = -1e38f;  // a score that nothing has

struct Problem {
    const Value* q;            // [sequences, tokens, heads, HEAD_DIM]
    const __nv_bfloat16* keys;  // [pages, kv heads, kPage, HEAD_DIM]
    const __nv_bfloat16* values;
    const long long* tables;     // [sequences, pages of a table]
    const long long* positions;  // [sequences, tokens]
    Value* out;                  // as q
    float* partial;              // [sequences, heads, splits, HEAD_DIM], of one token a sequence
    float2* partial_norm;        // [sequences, heads, splits]: largest score in base 2, sum of weights
    int tokens, heads, kv_heads, table_pages, window;
    float scale, softcap;
};

__device__ inline u32 pair(float a, float b) {
    __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<u32*>(&both);
}
// The upper halves of two floats and what these leave over.
__device__ inline void split_pair(float a, float b, u32& high, u32& low) {
    high = pair(a, b);
    const float2 rounded = __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&high));
    low = pair(a - rounded.x, b - rounded.y);
}
__device__ inline uint4 load(const void* from) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}
__device__ inline void multiply(float (&sum)[4], const u32* a, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline float of_quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ inline float of_quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// 16 rows of queries in the order of A fragments.
struct Queries {
    u32 high[kKeyBlocks][2][4], low[kKeyBlocks][2][4];
    int position[2];  // of rows g and g + 8; -1 where there is none

    __device__ void read(const Problem& problem, int sequence, int kv_head, int first_row) {
        const int lane = threadIdx.x & 31, group = problem.heads / problem.kv_heads;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + lane / 4 + 8 * half, token = row / group, head = kv_head * group + row % group;
            const bool exists = token < problem.tokens;
            position[half] = exists ? (int)problem.positions[(size_t)sequence * problem.tokens + token] : -1;
            const Value* from = problem.q + (((size_t)sequence * problem.tokens + token) * problem.heads + head) * HEAD_DIM;
#pragma unroll
            for (int block = 0; block < kKeyBlocks; ++block)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int dim = 32 * block + 8 * (lane % 4) + 2 * i;
                    const float a = exists ? to_float(from[dim]) * problem.scale : 0.f;
                    const float b = exists ? to_float(from[dim + 1]) * problem.scale : 0.f;
                    const int at = i % 2 * 2 + half;
                    split_pair(a, b, high[block][i / 2][at], low[block][i / 2][at]);
                }
        }
    }
    __device__ int last() const { return __reduce_max_sync(~0u, max(position[0], position[1])); }
    __device__ int first() const {
        const int a = position[0] < 0 ? 0x7fffffff : position[0], b = position[1] < 0 ? 0x7fffffff : position[1];
        return __reduce_min_sync(~0u, min(a, b));
    }
};

// What 16 rows have attended to: weighted values, sums of weights, and the largest score these are relative to.
struct Attended {
    float sum[kValueBlocks][8][4];
    float norm[2], largest[2];  // norm: this lane's share until `finish`

    __device__ void clear() {
#pragma unroll
        for (int block = 0; block < kValueBlocks; ++block)
#pragma unroll
            for (int j = 0; j < 8; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[block][j][i] = 0.f;
        norm[0] = norm[1] = 0.f;
        largest[0] = largest[1] = kNothing;
    }

    __device__ void attend_page(const Problem& problem, const Queries& queries, size_t page, int kv_head, int first_key,
                                int last_position) {
        const int lane = threadIdx.x & 31, g = lane / 4, c = lane % 4;
        const size_t base = (page * problem.kv_heads + kv_head) * kPage;
        float score[8][4];
#pragma unroll
        for (int tile = 0; tile < 8; ++tile) {
            const __nv_bfloat16* from = problem.keys + (base + 8 * tile + g) * HEAD_DIM + 8 * c;
            score[tile][0] = score[tile][1] = score[tile][2] = score[tile][3] = 0.f;
#pragma unroll
            for (int block = 0; block < kKeyBlocks; ++block) {
                const uint4 k = load(from + 32 * block);
                multiply(score[tile], queries.high[block][0], k.x, k.y);
                multiply(score[tile], queries.high[block][1], k.z, k.w);
                multiply(score[tile], queries.low[block][0], k.x, k.y);
                multiply(score[tile], queries.low[block][1], k.z, k.w);
            }
        }
        float highest[2] = {largest[0], largest[1]};
#pragma unroll
        for (int tile = 0; tile < 8; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int key = first_key + 8 * tile + 2 * c + i % 2, position = queries.position[i / 2];
                float s = score[tile][i];
                if (HAS_SOFTCAP) s = problem.softcap * tanhf(s / problem.softcap);
                const bool seen = key <= position && (!HAS_WINDOW || key > position - problem.window);
                score[tile][i] = seen ? s * kLog2e : kNothing;
                highest[i / 2] = fmaxf(highest[i / 2], score[tile][i]);
            }
        float reference[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            highest[half] = of_quad_max(highest[half]);
            reference[half] = highest[half] == kNothing ? 0.f : highest[half];
            const float rescale = power_of_two(largest[half] - reference[half]);
            largest[half] = highest[half];
            norm[half] *= rescale;
#pragma unroll
            for (int block = 0; block < kValueBlocks; ++block)
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    sum[block][j][2 * half] *= rescale;
                    sum[block][j][2 * half + 1] *= rescale;
                }
        }
#pragma unroll
        for (int tile = 0; tile < 8; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                score[tile][i] = power_of_two(score[tile][i] - reference[i / 2]);
                norm[i / 2] += score[tile][i];
            }
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            u32 high[4], low[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* weights = score[2 * step + i / 2] + 2 * (i % 2);
                split_pair(weights[0], weights[1], high[i], low[i]);
            }
#pragma unroll
            for (int block = 0; block < kValueBlocks; ++block) {
                u32 v[4][4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int key = 16 * step + 2 * c + i % 2 + i / 2 * 8;
                    uint4 loaded = load(problem.values + (base + key) * HEAD_DIM + 64 * block + 8 * g);
                    // What lies beyond a sequence's end is left over from another; weighted 0, a number that is not finite would remain.
                    if (first_key + key > last_position) loaded = make_uint4(0, 0, 0, 0);
                    v[i][0] = loaded.x, v[i][1] = loaded.y, v[i][2] = loaded.z, v[i][3] = loaded.w;
                }
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const u32 choice = j % 2 ? 0x7632 : 0x5410;
                    const u32 b0 = __byte_perm(v[0][j / 2], v[1][j / 2], choice), b1 = __byte_perm(v[2][j / 2], v[3][j / 2], choice);
                    multiply(sum[block][j], high, b0, b1);
                    multiply(sum[block][j], low, b0, b1);
                }
            }
        }
    }

    // The split's keys that `queries` may see.
    __device__ void attend_split(const Problem& problem, const Queries& queries, int sequence, int kv_head, int split, int last_position) {
        clear();
        const long long* table = problem.tables + (size_t)sequence * problem.table_pages;
        for (int page = split * kSplitPages; page < (split + 1) * kSplitPages && page * kPage <= last_position; ++page)
            attend_page(problem, queries, (size_t)table[page], kv_head, page * kPage, last_position);
        norm[0] = of_quad_sum(norm[0]);
        norm[1] = of_quad_sum(norm[1]);
    }
};

// How two neighbours merge: factors of what came before and of what is added.
__device__ inline float2 merge_factors(float& largest, float added) {
    const float highest = fmaxf(largest, added), reference = highest == kNothing ? 0.f : highest;
    const float2 factors = make_float2(power_of_two(largest - reference), power_of_two(added - reference));
    largest = highest;
    return factors;
}
__device__ inline float merged(float before, float added, float2 factors) {
    return __fmaf_rn(added, factors.y, __fmul_rn(before, factors.x));
}
__device__ inline int first_split(const Problem& problem, int position) {
    return HAS_WINDOW ? max(position - problem.window + 1, 0) / kSplit : 0;
}

// One token a sequence. A grid of (splits / kWarps, kv heads x row tiles, sequences); a warp takes a split.
extern "C" __global__ void __launch_bounds__(kWarps * 32)
attend_splits(Problem problem, int splits) {
    launch_dependents();
    wait_for_inputs();
    const int lane = threadIdx.x & 31, split = blockIdx.x * kWarps + threadIdx.x / 32, sequence = blockIdx.z;
    const int kv_head = blockIdx.y % problem.kv_heads, first_row = blockIdx.y / problem.kv_heads * kTileRows;
    const int position = (int)problem.positions[sequence];
    if (split * kSplit > position || split < first_split(problem, position)) return;
    Queries queries;
    queries.read(problem, sequence, kv_head, first_row);
    Attended attended;
    attended.attend_split(problem, queries, sequence, kv_head, split, position);
    const int group = problem.heads / problem.kv_heads;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = first_row + lane / 4 + 8 * half;
        if (row >= group) continue;
        const size_t place = ((size_t)sequence * problem.heads + kv_head * group + row) * splits + split;
        if (lane % 4 == 0) problem.partial_norm[place] = make_float2(attended.largest[half], attended.norm[half]);
#pragma unroll
        for (int block = 0; block < kValueBlocks; ++block)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float4* to = reinterpret_cast<float4*>(problem.partial + place * HEAD_DIM + 64 * block + 8 * (2 * (lane % 4) + i));
                const auto& sum = attended.sum[block];
                const int at = 2 * half + i;
                to[0] = make_float4(sum[0][at], sum[1][at], sum[2][at], sum[3][at]);
                to[1] = make_float4(sum[4][at], sum[5][at], sum[6][at], sum[7][at]);
            }
    }
}

// The splits of `attend_splits` put together. A grid of (heads, sequences), a thread for each dimension.
extern "C" __global__ void __launch_bounds__(HEAD_DIM)
merge_splits(Problem problem, int splits) {
    launch_dependents();
    wait_for_inputs();
    const size_t row = (size_t)blockIdx.y * problem.heads + blockIdx.x;
    const int position = (int)problem.positions[blockIdx.y];
    float largest = kNothing, norm = 0.f, sum = 0.f;
#pragma unroll 4
    for (int split = first_split(problem, position); split <= position / kSplit; ++split) {
        const size_t place = row * splits + split;
        const float2 part = problem.partial_norm[place];
        const float2 factors = merge_factors(largest, part.x);
        norm = merged(norm, part.y, factors);
        sum = merged(sum, problem.partial[place * HEAD_DIM + threadIdx.x], factors);
    }
    problem.out[row * HEAD_DIM + threadIdx.x] = to_value(__fdiv_rn(sum, norm));
}

// Several tokens a sequence. A grid of (row tiles / kWarps, kv heads, sequences); a warp takes 16 rows through all splits.
// Shared memory: [warps][2 * kValueBlocks][8][2][32] floats, the merged sums.
extern "C" __global__ void __launch_bounds__(kWarps * 32)
attend_rows(Problem problem) {
    launch_dependents();
    wait_for_inputs();
    extern __shared__ float shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, sequence = blockIdx.z, kv_head = blockIdx.y;
    // The last rows have most to do, so they begin first.
    const int first_row = ((gridDim.x - 1 - blockIdx.x) * kWarps + warp) * kTileRows;
    const int group = problem.heads / problem.kv_heads;
    if (first_row >= problem.tokens * group) return;
    Queries queries;
    queries.read(problem, sequence, kv_head, first_row);
    const int last_position = queries.last();
    float* sums = shared + warp * kValueBlocks * 32 * 32 + lane;
    for (int i = 0; i < kValueBlocks * 32; ++i) sums[i * 32] = 0.f;
    float largest[2] = {kNothing, kNothing}, norm[2] = {0.f, 0.f};
    for (int split = first_split(problem, queries.first()); split <= last_position / kSplit; ++split) {
        Attended attended;
        attended.attend_split(problem, queries, sequence, kv_head, split, last_position);
        float2 factors[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            factors[half] = merge_factors(largest[half], attended.largest[half]);
            norm[half] = merged(norm[half], attended.norm[half], factors[half]);
        }
#pragma unroll
        for (int block = 0; block < kValueBlocks; ++block)
#pragma unroll
            for (int j = 0; j < 8; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float& sum = sums[((block * 8 + j) * 4 + i) * 32];
                    sum = merged(sum, attended.sum[block][j][i], factors[i / 2]);
                }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = first_row + lane / 4 + 8 * half, token = row / group, head = kv_head * group + row % group;
        if (token >= problem.tokens) continue;
        Value* to = problem.out + (((size_t)sequence * problem.tokens + token) * problem.heads + head) * HEAD_DIM;
        for (int block = 0; block < kValueBlocks; ++block)
            for (int i = 0; i < 2; ++i)
                for (int j = 0; j < 8; ++j)
                    to[64 * block + 8 * (2 * (lane % 4) + i) + j] =
                        to_value(__fdiv_rn(sums[((block * 8 + j) * 4 + 2 * half + i) * 32], norm[half]));
    }
}
