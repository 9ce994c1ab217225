// Attention of new tokens over paged bfloat16 keys and values.
//
// A warp takes 16 rows (a row is one head of one token; rows share a key/value head) through one page. Pages are merged in
// their order to splits of kSplitPages, splits in their order to the result: in shared memory and over blocks where a
// sequence has one token, in one warp where it has many. A row's result depends on its keys alone. Queries and weights are
// each two bfloat16 numbers, so that only keys and values are rounded.
#include "attention.cuh"

using namespace nested;

constexpr int kSumsOfWarp = kTileRows * HEAD_DIM;

// One token a sequence. A grid of (splits, kv heads x row tiles, sequences); a warp takes a page of the split.
// Shared memory: [pages] of their chunks where they are staged, then [pages][16 rows][HEAD_DIM] floats.
extern "C" __global__ void __launch_bounds__(kSplitPages * 32)
attend_splits(Problem problem, int splits) {
    extern __shared__ __align__(16) float shared[];
    __shared__ float2 page_norms[kSplitPages][kTileRows];
    launch_dependents();
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, split = blockIdx.x, sequence = blockIdx.z;
    const int kv_head = blockIdx.y % problem.kv_heads, first_row = blockIdx.y / problem.kv_heads * kTileRows;
    const int position = (int)problem.positions[sequence];
    const int begin = max(split * kSplitPages, first_page(problem, position));
    const int end = min((split + 1) * kSplitPages, position / kPage + 1);
    if (position < 0 || begin >= end) {
        wait_for_inputs();
        return;
    }
    const int page = split * kSplitPages + warp, rows = min(problem.heads / problem.kv_heads - first_row, kTileRows);
    const bool has_page = page >= begin && page < end;
    Attended attended;
    // Positions and tables were there before the step began, and so was every page but a sequence's last.
    if (!kStaged || !has_page || page == position / kPage) wait_for_inputs();
    if (has_page) {
        const PageInMemory in_memory(problem, sequence, kv_head, page);
        Queries queries;
        if constexpr (kStaged) {
            const PageInShared in_shared(in_memory, reinterpret_cast<uint4*>(shared) + warp * 2 * kPageChunks);
            wait_for_inputs();
            queries.read(problem, sequence, kv_head, first_row);
            attended.attend(problem, queries, in_shared, page * kPage, position);
        } else {
            queries.read(problem, sequence, kv_head, first_row);
            attended.attend(problem, queries, in_memory, page * kPage, position);
        }
    }
    if (kStaged) __syncthreads();  // the sums take the place of the pages
    if (has_page) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = lane / 4 + 8 * half;
            if (row >= rows) continue;
            if (lane % 4 == 0) page_norms[warp][row] = make_float2(attended.largest[half], attended.norm[half]);
#pragma unroll
            for (int block = 0; block < kValueBlocks; ++block)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float4* to = reinterpret_cast<float4*>(shared + warp * kSumsOfWarp + row * HEAD_DIM + 64 * block +
                                                           8 * (2 * (lane % 4) + i));
                    const auto& sum = attended.sum[block];
                    const int at = 2 * half + i;
                    to[0] = make_float4(sum[0][at], sum[1][at], sum[2][at], sum[3][at]);
                    to[1] = make_float4(sum[4][at], sum[5][at], sum[6][at], sum[7][at]);
                }
        }
    }
    __syncthreads();
    for (int index = threadIdx.x; index < rows * HEAD_DIM; index += kSplitPages * 32) {
        const int row = index / HEAD_DIM;
        Merged all;
        float sum = 0.f;
        for (int at = begin % kSplitPages; at <= (end - 1) % kSplitPages; ++at)
            sum = merged(sum, shared[at * kSumsOfWarp + index], all.add(page_norms[at][row].x, page_norms[at][row].y));
        const int head = kv_head * (problem.heads / problem.kv_heads) + first_row + row;
        const size_t place = ((size_t)sequence * problem.heads + head) * splits + split;
        problem.partial[place * HEAD_DIM + index % HEAD_DIM] = sum;
        if (index % HEAD_DIM == 0) problem.partial_norm[place] = make_float2(all.largest, all.norm);
    }
}

// Four neighbouring dimensions of a row of `attend_splits`, from `first` on, put together from all its splits.
__device__ inline void merge_splits(const Problem& problem, int splits, size_t sequence, int first, float (&value)[4]) {
    const int position = (int)problem.positions[sequence];
    const size_t row = sequence * problem.heads + first / HEAD_DIM;
    Merged all;
    float sum[4] = {};
#pragma unroll 4
    for (int split = first_page(problem, position) / kSplitPages; split <= position / kSplit; ++split) {
        const size_t place = row * splits + split;
        const float2 norm = problem.partial_norm[place];
        float added[4];
        load_four(problem.partial + place * HEAD_DIM + first % HEAD_DIM, added);
        const float2 factors = all.add(norm.x, norm.y);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] = merged(sum[i], added[i], factors);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = to_float(to_value(__fdiv_rn(sum[i], all.norm)));
}

// The result of `attend_splits`. A grid of (row tiles of 128 dimensions, sequences / 4); a warp takes a tile of a sequence.
extern "C" __global__ void __launch_bounds__(kTokens * 32)
merge_rows(Problem problem, int splits, int sequences) {
    launch_dependents();
    wait_for_inputs();
    const int sequence = blockIdx.y * kTokens + threadIdx.x / 32, columns = problem.heads * HEAD_DIM;
    const int first = blockIdx.x * kColumns + 4 * (threadIdx.x & 31);
    if (sequence >= sequences || first >= columns || problem.positions[sequence] < 0) return;
    float value[4];
    merge_splits(problem, splits, sequence, first, value);
#pragma unroll
    for (int i = 0; i < 4; ++i) problem.out[(size_t)sequence * columns + first + i] = to_value(value[i]);
}

// The same as inputs of a product, of sequences from `first_sequence` on; the grid covers all slots.
extern "C" __global__ void __launch_bounds__(kTokens * 32)
merge_prepare(Problem problem, int splits, int first_sequence, int sequences, u32* inputs, float2* scales, int slots,
              int pass_tiles) {
    launch_dependents();
    wait_for_inputs();
    const int slot = blockIdx.y * kTokens + threadIdx.x / 32, columns = problem.heads * HEAD_DIM;
    const int first = blockIdx.x * kColumns + 4 * (threadIdx.x & 31);
    float value[4] = {};
    if (slot < sequences && first < columns) merge_splits(problem, splits, first_sequence + slot, first, value);
    store_inputs(value, slot, blockIdx.x, gridDim.x, slots, pass_tiles, inputs, scales);
}

// Several tokens a sequence. A grid of (row tiles / kWarps, kv heads, sequences); a warp takes 16 rows through all pages.
// Shared memory: [warps][2][kValueBlocks][8][4][32 lanes] floats, the sums of a split and those of all before it.
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
    const int last_position = queries.last(), last_page = last_position / kPage;
    float* of_split = shared + 2 * warp * kSumsOfWarp + lane;
    float* of_all = of_split + kSumsOfWarp;
    for (int i = 0; i < kValueBlocks * 32; ++i) of_all[i * 32] = 0.f;
    Merged all[2];
    for (int page = first_page(problem, queries.first()); page <= last_page;) {
        for (int i = 0; i < kValueBlocks * 32; ++i) of_split[i * 32] = 0.f;
        Merged pages[2];
        for (const int end = min((page / kSplitPages + 1) * kSplitPages, last_page + 1); page < end; ++page) {
            Attended attended;
            attended.attend(problem, queries, PageInMemory(problem, sequence, kv_head, page), page * kPage, last_position);
            const float2 factors[2] = {pages[0].add(attended.largest[0], attended.norm[0]), pages[1].add(attended.largest[1], attended.norm[1])};
#pragma unroll
            for (int block = 0; block < kValueBlocks; ++block)
#pragma unroll
                for (int j = 0; j < 8; ++j)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float& sum = of_split[((block * 8 + j) * 4 + i) * 32];
                        sum = merged(sum, attended.sum[block][j][i], factors[i / 2]);
                    }
        }
        const float2 factors[2] = {all[0].add(pages[0].largest, pages[0].norm), all[1].add(pages[1].largest, pages[1].norm)};
        for (int i = 0; i < kValueBlocks * 32; ++i) of_all[i * 32] = merged(of_all[i * 32], of_split[i * 32], factors[i % 4 / 2]);
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
                        to_value(__fdiv_rn(of_all[((block * 8 + j) * 4 + 2 * half + i) * 32], all[half].norm));
    }
}
