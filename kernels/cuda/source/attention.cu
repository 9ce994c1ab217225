// Attention of new tokens over paged bfloat16 keys and values.
//
// A warp, or several that share it, takes 16 rows (a row is one head of one token; rows share a key/value head) through one page. Pages are merged in
// their order to splits of kSplitPages, splits in their order to the result: in shared memory and over blocks where a
// sequence has one token, in one warp where it has many. A row's result depends on its keys alone. Queries and weights are
// each two bfloat16 numbers, so that only keys and values are rounded.
#include "attention.cuh"
#include "heads.cuh"

#ifndef FROM_PROJECTION  // queries, and the newest keys and values, come as the projection leaves them
#define FROM_PROJECTION 0
#endif

using namespace nested;

constexpr int kSumsOfPage = kTileRows * HEAD_DIM, kSplitWarps = kSplitPages * kPageWarps;
constexpr int kReadTogether = 8;  // splits that are merged

// One token a sequence. A grid of (splits, kv heads x row tiles, sequences); kPageWarps warps take a page of the split.
// Shared memory: [pages] of their chunks where they are staged, then [pages][16 rows][HEAD_DIM] floats.
extern "C" __global__ void __launch_bounds__(kSplitWarps * 32)
attend_splits(Problem problem, int splits
#if FROM_PROJECTION
              , Projected projected
#endif
) {
    extern __shared__ __align__(16) float shared[];
    __shared__ float2 page_norms[kSplitPages][kTileRows];
    launch_dependents();
    const int lane = threadIdx.x & 31, in_split = threadIdx.x / (32 * kPageWarps), part = threadIdx.x / 32 % kPageWarps;
    const int split = blockIdx.x, sequence = blockIdx.z;
    const int kv_head = blockIdx.y % problem.kv_heads, first_row = blockIdx.y / problem.kv_heads * kTileRows;
    const int position = (int)problem.positions[sequence];
    const int begin = max(split * kSplitPages, first_page(problem, position));
    const int end = min((split + 1) * kSplitPages, position / kPage + 1);
    if (position < 0 || begin >= end) {
        wait_for_inputs();
        return;
    }
    const int page = split * kSplitPages + in_split, rows = min(problem.heads / problem.kv_heads - first_row, kTileRows);
    const bool has_page = page >= begin && page < end, is_newest = page == position / kPage;
    // Positions and tables were there before the step began, and so was every page but a sequence's last, or but its newest row.
    if (!FROM_PROJECTION && (!kStaged || !has_page || is_newest)) wait_for_inputs();
    const PageInMemory in_memory(problem, sequence, kv_head, has_page ? page : begin);
    uint4* chunks = reinterpret_cast<uint4*>(shared) + in_split * 2 * kPageChunks;
    const PageInShared in_shared(in_memory, chunks, part, kStaged && has_page);
#if FROM_PROJECTION
    __shared__ __align__(16) Value finished[kTileRows * HEAD_DIM];
    __shared__ __align__(16) Stored newest[2 * HEAD_DIM];
    const HeadFrame frame(projected, sequence, kv_head);
    wait_for_inputs();
    Stored* const places[2] = {newest, newest + HEAD_DIM};
    const bool has_newest = end == position / kPage + 1;
    finish_heads<kSplitWarps>(projected, frame, sequence, kv_head, first_row, rows, finished, has_newest ? places : nullptr);
    __syncthreads();
#else
    wait_for_inputs();
#endif
    Attended<kPageWarps> attended;
    if (has_page) {
        Queries queries;
#if FROM_PROJECTION
        const auto place = [&](int row) { return finished + (row - first_row) * HEAD_DIM; };
        queries.read(problem, sequence, problem.heads / problem.kv_heads, first_row, place);
        if (kStaged && is_newest) in_shared.replace(position % kPage, part, newest);
#else
        queries.read(problem, sequence, kv_head, first_row);
#endif
        if constexpr (kStaged) {
            const ScoreExchange exchange{reinterpret_cast<float4*>(chunks), PageInShared::kPartChunks, 1 + in_split};
            attended.attend(problem, queries, in_shared, page * kPage, position, part, exchange);
        } else {
            const ScoreExchange exchange{reinterpret_cast<float4*>(shared + in_split * kSumsOfPage), 8 / kPageWarps * 32, 1 + in_split};
            attended.attend(problem, queries, in_memory, page * kPage, position, part, exchange);
        }
    }
    __syncthreads();  // the sums take the place of pages and scores
    if (has_page) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = lane / 4 + 8 * half;
            if (row >= rows) continue;
            if (lane % 4 == 0 && part == 0) page_norms[in_split][row] = make_float2(attended.largest[half], attended.norm[half]);
#pragma unroll
            for (int block = 0; block < kValueBlocks; ++block)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const auto& sum = attended.sum[block];
                    const int dim = 64 * block + 8 * (2 * (lane % 4) + i) + 4 * part, at = 2 * half + i;
                    *reinterpret_cast<float4*>(shared + in_split * kSumsOfPage + row * HEAD_DIM + dim) =
                        make_float4(sum[0][at], sum[1][at], sum[2][at], sum[3][at]);
                }
        }
    }
    __syncthreads();
    for (int index = 4 * threadIdx.x; index < rows * HEAD_DIM; index += 4 * kSplitWarps * 32) {
        const int row = index / HEAD_DIM, head = kv_head * (problem.heads / problem.kv_heads) + first_row + row;
        const size_t place = ((size_t)sequence * problem.heads + head) * splits + split;
        const Merged all = merge_pages(shared + index, kSumsOfPage, &page_norms[0][row], kTileRows, begin % kSplitPages,
                                       (end - 1) % kSplitPages + 1, problem.partial + place * HEAD_DIM + index % HEAD_DIM);
        if (index % HEAD_DIM == 0) problem.partial_norm[place] = make_float2(all.largest, all.norm);
    }
}

// Four neighbouring dimensions of a row of `attend_splits`, from `first` on, put together from all its splits.
__device__ inline void merge_splits(const Problem& problem, int splits, size_t sequence, int position, int first, float (&value)[4]) {
    const size_t row = sequence * problem.heads + first / HEAD_DIM;
    const int last = position / kSplit;
    Merged all;
    float sum[4] = {};
    for (int begin = first_page(problem, position) / kSplitPages; begin <= last; begin += kReadTogether) {
        float2 norms[kReadTogether];
        float added[kReadTogether][4];
#pragma unroll
        for (int i = 0; i < kReadTogether; ++i) {
            if (begin + i > last) break;
            norms[i] = problem.partial_norm[row * splits + begin + i];
            load_four(problem.partial + (row * splits + begin + i) * HEAD_DIM + first % HEAD_DIM, added[i]);
        }
#pragma unroll
        for (int i = 0; i < kReadTogether; ++i) {
            if (begin + i > last) break;
            const float2 factors = all.add(norms[i].x, norms[i].y);
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[j] = merged(sum[j], added[i][j], factors);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = to_float(to_value(__fdiv_rn(sum[i], all.norm)));
}

// The result of `attend_splits`. A grid of (row tiles of 128 dimensions, sequences / 4); a warp takes a tile of a sequence.
extern "C" __global__ void __launch_bounds__(kTokens * 32)
merge_rows(Problem problem, int splits, int sequences) {
    launch_dependents();
    const int sequence = blockIdx.y * kTokens + threadIdx.x / 32, columns = problem.heads * HEAD_DIM;
    const int first = blockIdx.x * kColumns + 4 * (threadIdx.x & 31);
    const int position = sequence < sequences ? (int)problem.positions[sequence] : -1;
    wait_for_inputs();
    if (position < 0 || first >= columns) return;
    float value[4];
    merge_splits(problem, splits, sequence, position, first, value);
#pragma unroll
    for (int i = 0; i < 4; ++i) problem.out[(size_t)sequence * columns + first + i] = to_value(value[i]);
}

// The same as inputs of a product, of sequences from `first_sequence` on; the grid covers all slots.
extern "C" __global__ void __launch_bounds__(kTokens * 32)
merge_prepare(Problem problem, int splits, int first_sequence, int sequences, u32* inputs, float2* scales, int slots,
              int pass_tiles) {
    launch_dependents();
    const int slot = blockIdx.y * kTokens + threadIdx.x / 32, columns = problem.heads * HEAD_DIM;
    const int first = blockIdx.x * kColumns + 4 * (threadIdx.x & 31), sequence = first_sequence + slot;
    const int position = slot < sequences ? (int)problem.positions[sequence] : -1;
    wait_for_inputs();
    float value[4] = {};
    if (slot < sequences && first < columns) merge_splits(problem, splits, sequence, position, first, value);
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
    float* of_split = shared + 2 * warp * kSumsOfPage + lane;
    float* of_all = of_split + kSumsOfPage;
    for (int i = 0; i < kValueBlocks * 32; ++i) of_all[i * 32] = 0.f;
    Merged all[2];
    for (int page = first_page(problem, queries.first()); page <= last_page;) {
        for (int i = 0; i < kValueBlocks * 32; ++i) of_split[i * 32] = 0.f;
        Merged pages[2];
        for (const int end = min((page / kSplitPages + 1) * kSplitPages, last_page + 1); page < end; ++page) {
            Attended<1> attended;
            attended.attend(problem, queries, PageInMemory(problem, sequence, kv_head, page), page * kPage, last_position, 0, {});
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
