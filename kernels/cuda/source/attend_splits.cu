// Attention of one new token a sequence over paged bfloat16 keys and values, up to the merge of splits.
#include "attention_pages.cuh"
#include "heads.cuh"

using namespace nested;

constexpr int kSplitWarps = kSplitPages * kPageWarps;

// A grid of (splits, kv heads x row tiles, sequences); kPageWarps warps take a page of the split.
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
