// Attention over sealed pages of few sequences of one token each.
#include "sealed_tile.cuh"

using namespace nested;

// Few sequences of one token: a warp takes a page. A grid of (splits, kv heads x tiles of their query heads, sequences).
// Shared memory: tables, of which the sums of the warps [kSealedSplit][TILE_HEADS][HEAD_DIM] take the place.
extern "C" __global__ void __launch_bounds__(kSealedSplit * 32, HEAD_DIM <= 128 ? 2 : 1)
attend_sealed_pages(SealedProblem problem, int splits) {
    extern __shared__ __align__(16) u32 tables[];
    __shared__ float2 norms[kSealedSplit][TILE_HEADS];
    launch_dependents();
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane / 4, sequence = blockIdx.z;
    const HeadTile tile(problem, blockIdx.y);
    const TokenSplit split(problem, sequence, blockIdx.x, splits);
    if (split.is_empty()) {
        wait_for_inputs();
        return;
    }
    const int page = split.is_own ? split.begin + warp : (int)blockIdx.x * kSealedSplit + warp;
    const bool has_page = page >= split.begin && page < split.end;
    if (!split.is_own) {
        if (has_page) fetch_page(problem, sequence, tile.kv_head, page, true);
        fill_tables<kSealedSplit * 32>(problem, tables);
    }
    __syncthreads();
    ColumnQueries queries;
    const auto read_queries = [&]() -> const ColumnQueries& {
        wait_for_inputs();
        tile.read(problem, sequence, split.position, queries);
        return queries;
    };
    ColumnSums<kNarrow> state;
    if (!has_page) {
        wait_for_inputs();
    } else if (split.is_own) {
        read_queries();
        attend_own_page(problem, queries, sequence, 0, tile.kv_head, split.position, state);
    } else {
        attend_sealed_page(problem, tables, sequence, tile.kv_head, page, state, read_queries, [] {});
    }
    __syncthreads();  // the sums take the place of the tables
    float* sums = reinterpret_cast<float*>(tables);
    if (has_page) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int query = state.query_of(i);
            const float norm = of_eight_sum(state.norm[i]);
            if (g == 0) norms[warp][query] = make_float2(state.largest[i], norm);
            state.store(i, sums + (warp * TILE_HEADS + query) * HEAD_DIM);
        }
    }
    __syncthreads();
    const int first = split.is_own ? 0 : split.begin % kSealedSplit, count = split.end - split.begin;
    for (int index = threadIdx.x; index < tile.rows(problem) * HEAD_DIM; index += kSealedSplit * 32) {
        const int row = index / HEAD_DIM;
        Merged all;
        float sum = 0.f;
        for (int at = first; at < first + count; ++at)
            sum = merged(sum, sums[at * TILE_HEADS * HEAD_DIM + index], all.add(norms[at][row].x, norms[at][row].y));
        const size_t place = tile.row(problem, sequence, row) * splits + blockIdx.x;
        problem.partial[place * HEAD_DIM + index % HEAD_DIM] = sum;
        if (index % HEAD_DIM == 0) problem.partial_norm[place] = make_float2(all.largest, all.norm);
    }
}
