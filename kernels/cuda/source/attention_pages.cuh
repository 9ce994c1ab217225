// 16 rows of queries and a page of keys and values.
//
// Operands come straight from memory, 16 bytes a load. A product's terms may take any order, so in a block of 32
// dimensions lane (g, c) of a quad supplies dimensions 8c .. 8c+7 of key g; of values it loads 8 dimensions of keys
// 2c, 2c+1, 2c+8, 2c+9 and pairs the keys: column n of product j is dimension 8n + j of a block of 64.
#pragma once
#include "attention.cuh"

#ifndef STAGED  // whether a block has room for kSplitPages pages
#define STAGED 0
#endif

namespace nested {

constexpr int kSumsOfPage = kTileRows * HEAD_DIM;

// Keys and values of a page as they lie in memory, 16 bytes (8 dimensions) a chunk.
struct PageInMemory {
    const __nv_bfloat16 *keys, *values;

    __device__ PageInMemory(const Problem& problem, int sequence, int kv_head, int page) {
        const size_t id = (size_t)problem.tables[(size_t)sequence * problem.table_pages + page];
        const size_t first = (id * problem.kv_heads + kv_head) * kPage * HEAD_DIM;
        keys = problem.keys + first;
        values = problem.values + first;
    }
    __device__ void wait_for_keys() const {}
    __device__ void wait_for_values() const {}
    __device__ uint4 keys_at(int row, int chunk) const { return load_operand(keys + row * HEAD_DIM + 8 * chunk); }
    __device__ void read_values(int row, int chunk, int, u32 (&words)[4]) const {
        const uint4 v = load_operand(values + row * HEAD_DIM + 8 * chunk);
        words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    }
    __device__ void read_values(int row, int chunk, int part, u32 (&words)[2]) const {
        const u32* from = reinterpret_cast<const u32*>(values + row * HEAD_DIM + 8 * chunk + 4 * part);
        asm volatile("ld.global.v2.u32 {%0,%1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(from));
    }
};

// A page that its warps have copied to shared memory, each its part of the rows, all of it under way at once. Chunks are swapped so
// that the eight lanes that read together meet no bank twice.
constexpr int kChunks = HEAD_DIM / 8, kPageChunks = kPage * kChunks;
constexpr bool kStaged = STAGED;

struct PageInShared {
    static constexpr int kPartRows = kPage / kPageWarps, kPartChunks = kPageChunks / kPageWarps;
    uint4* chunks;  // [2][kPageChunks]

    __device__ PageInShared(const PageInMemory& page, uint4* chunks, int part, bool exists) : chunks(chunks) {
        if (!exists) return;
        copy(page.keys, part, [](int row, int chunk) { return key_place(row, chunk); });
        copy(page.values, part, [](int row, int chunk) { return value_place(row, chunk); });
    }
    template <class Place>
    __device__ void copy(const __nv_bfloat16* from, int part, Place place) {
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int i = 0; i < kPartChunks / 32; ++i) {
            const int index = part * kPartChunks + i * 32 + lane;
            const u32 to = (u32)__cvta_generic_to_shared(chunks + place(index / kChunks, index % kChunks));
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from + 8 * index) : "memory");
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    static __device__ int key_place(int row, int chunk) { return row * kChunks + (chunk ^ (row % 2 * 4)); }
    static __device__ int value_place(int row, int chunk) { return kPageChunks + row * kChunks + (chunk ^ (row & 6)); }
    __device__ void wait_for_keys() const {
        asm volatile("cp.async.wait_group 1;" ::: "memory");
        __syncwarp();
    }
    __device__ void wait_for_values() const {
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        __syncwarp();
    }
    __device__ uint4 keys_at(int row, int chunk) const { return chunks[key_place(row, chunk)]; }
    __device__ void read_values(int row, int chunk, int part, u32 (&words)[2]) const {
        const uint2 v = reinterpret_cast<const uint2*>(chunks + value_place(row, chunk))[part];
        words[0] = v.x, words[1] = v.y;
    }
    // A row's key and value instead of what was copied, by the warp that did.
    __device__ void replace(int row, int part, const __nv_bfloat16* newest) const {
        if (row / kPartRows != part) return;
        wait_for_values();
        for (int chunk = threadIdx.x & 31; chunk < kChunks; chunk += 32) {
            chunks[key_place(row, chunk)] = reinterpret_cast<const uint4*>(newest)[chunk];
            chunks[value_place(row, chunk)] = reinterpret_cast<const uint4*>(newest + HEAD_DIM)[chunk];
        }
        __syncwarp();
    }
};

// 16 rows of queries in the order of A fragments.
struct Queries {
    u32 high[kKeyBlocks][2][4], low[kKeyBlocks][2][4];
    int position[2];  // of rows g and g + 8; -1 where there is none

    __device__ void read(const Problem& problem, int sequence, int kv_head, int first_row) {
        const int group = problem.heads / problem.kv_heads;
        read(problem, sequence, group, first_row, [&](int row) {
            const size_t token = (size_t)sequence * problem.tokens + row / group;
            return problem.q + (token * problem.heads + kv_head * group + row % group) * HEAD_DIM;
        });
    }
    template <class Place>
    __device__ void read(const Problem& problem, int sequence, int group, int first_row, Place place) {
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + lane / 4 + 8 * half, token = row / group;
            const bool exists = token < problem.tokens;
            position[half] = exists ? (int)problem.positions[(size_t)sequence * problem.tokens + token] : -1;
            const Value* from = place(row);
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

// Where warps that share a page leave scores for one another: [tiles of a part][32 lanes], the parts so far apart.
struct ScoreExchange {
    float4* scores;
    int apart, barrier;

    __device__ float4& at(int part, int tile) const { return scores[part * apart + tile * 32 + (threadIdx.x & 31)]; }
    __device__ void wait() const { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(32 * kPageWarps) : "memory"); }
};

// What 16 rows have attended to: weighted values, sums of weights, and the largest score these are relative to. Of kParts warps that
// share a page each multiplies its part of the keys, and then all weights with its part of each eight dimensions.
template <int kParts>
struct Attended {
    static constexpr int kTiles = 8 / kParts, kDims = 8 / kParts;
    float sum[kValueBlocks][kDims][4];
    float norm[2], largest[2];

    // The keys of one page, of which `first_key` is the first, as far as the queries see them.
    template <class Page>
    __device__ void attend(const Problem& problem, const Queries& queries, const Page& page, int first_key, int last_position, int part,
                           ScoreExchange exchange) {
        const int c = threadIdx.x % 4, g = threadIdx.x % 32 / 4;
        page.wait_for_keys();
        float score[8][4];
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            score[tile][0] = score[tile][1] = score[tile][2] = score[tile][3] = 0.f;
#pragma unroll
            for (int block = 0; block < kKeyBlocks; ++block) {
                const uint4 k = page.keys_at(8 * (part * kTiles + tile) + g, 4 * block + c);
                multiply(score[tile], queries.high[block][0], k.x, k.y);
                multiply(score[tile], queries.high[block][1], k.z, k.w);
                multiply(score[tile], queries.low[block][0], k.x, k.y);
                multiply(score[tile], queries.low[block][1], k.z, k.w);
            }
        }
        if (kParts > 1) {
            __syncwarp();  // scores take the place of keys
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile)
                exchange.at(part, tile) = make_float4(score[tile][0], score[tile][1], score[tile][2], score[tile][3]);
            page.wait_for_values();
            exchange.wait();
#pragma unroll
            for (int tile = 0; tile < 8; ++tile) {
                const float4 all = exchange.at(tile / kTiles, tile % kTiles);
                score[tile][0] = all.x, score[tile][1] = all.y, score[tile][2] = all.z, score[tile][3] = all.w;
            }
        }
        weigh(problem, queries, first_key, score);
        page.wait_for_values();
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
                u32 v[4][kDims / 2];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int key = 16 * step + 2 * c + i % 2 + i / 2 * 8;
                    page.read_values(key, 8 * block + g, part, v[i]);
                    // What lies beyond a sequence's end is left over from another; weighted 0, a number that is not finite would remain.
                    if (first_key + key > last_position)
#pragma unroll
                        for (int word = 0; word < kDims / 2; ++word) v[i][word] = 0;
                }
#pragma unroll
                for (int j = 0; j < kDims; ++j) {
                    const u32 choice = j % 2 ? 0x7632 : 0x5410;
                    const u32 b0 = __byte_perm(v[0][j / 2], v[1][j / 2], choice), b1 = __byte_perm(v[2][j / 2], v[3][j / 2], choice);
                    multiply(sum[block][j], high, b0, b1);
                    multiply(sum[block][j], low, b0, b1);
                }
            }
        }
        norm[0] = of_quad_sum(norm[0]);
        norm[1] = of_quad_sum(norm[1]);
    }

    // Weights of a page's keys in the place of their scores; sums begin at zero.
    __device__ void weigh(const Problem& problem, const Queries& queries, int first_key, float (&score)[8][4]) {
        largest[0] = largest[1] = kNothing;
#pragma unroll
        for (int tile = 0; tile < 8; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int key = first_key + 8 * tile + 2 * (threadIdx.x % 4) + i % 2, position = queries.position[i / 2];
                float s = score[tile][i];
                if (HAS_SOFTCAP) s = problem.softcap * tanhf(s / problem.softcap);
                const bool seen = key <= position && (!HAS_WINDOW || key > position - problem.window);
                score[tile][i] = seen ? s * kLog2e : kNothing;
                largest[i / 2] = fmaxf(largest[i / 2], score[tile][i]);
            }
        float reference[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            largest[half] = of_quad_max(largest[half]);
            reference[half] = largest[half] == kNothing ? 0.f : largest[half];
            norm[half] = 0.f;
        }
#pragma unroll
        for (int block = 0; block < kValueBlocks; ++block)
#pragma unroll
            for (int j = 0; j < kDims; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[block][j][i] = 0.f;
#pragma unroll
        for (int tile = 0; tile < 8; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                score[tile][i] = power_of_two(score[tile][i] - reference[i / 2]);
                norm[i / 2] += score[tile][i];
            }
    }
};

}  // namespace nested
