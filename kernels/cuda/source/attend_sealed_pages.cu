// Attention over sealed pages of few sequences of one token each.
#include "heads.cuh"
#include "sealed_tile.cuh"

using namespace nested;

// Few sequences of one token: a warp takes a page. A grid of (splits, kv heads x tiles of their query heads, sequences).
// Shared memory: tables or the own page, of which the sums of the warps [kSealedSplit][TILE_HEADS][HEAD_DIM] take the place.
extern "C" __global__ void __launch_bounds__(kSealedSplit * 32, HEAD_DIM <= 128 ? 2 : 1)
attend_sealed_pages(SealedProblem problem, int splits
#if FROM_PROJECTION
                    , Projected projected
#endif
) {
    extern __shared__ __align__(16) u32 shared[];
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
    OwnPage<true> own(nullptr, nullptr, split.position);
    if (split.is_own) {
        if (!FROM_PROJECTION) wait_for_inputs();  // else its newest token comes later
        const int count = split.position % kPage + (FROM_PROJECTION ? 0 : 1);
        own = OwnPage<false>(problem, sequence, 0, tile.kv_head, split.position).copy(reinterpret_cast<__nv_bfloat16*>(shared), count);
    } else {
        if (has_page) fetch_page(problem, sequence, tile.kv_head, page, true);
        if (page == 0) fetch_first(problem, sequence, tile.kv_head);
        fill_tables<kSealedSplit * 32>(problem, shared);
    }
#if FROM_PROJECTION
    __shared__ __align__(16) Value finished[TILE_HEADS * HEAD_DIM];
    const HeadFrame frame(projected, sequence, tile.kv_head);
#endif
    // By each warp once, also for what the block has copied.
    const auto wait_for_queries = [&] {
        wait_for_inputs();
#if FROM_PROJECTION
        const int newest = split.position % kPage * OwnPage<true>::kStride;
        __nv_bfloat16* const places[2] = {const_cast<__nv_bfloat16*>(own.keys) + newest, const_cast<__nv_bfloat16*>(own.values) + newest};
        finish_heads<kSealedSplit>(projected, frame, sequence, tile.kv_head, tile.first_row, tile.rows(problem), finished,
                                   split.is_own ? places : nullptr);
#endif
        asm volatile("cp.async.wait_all;" ::: "memory");
        __syncthreads();
    };
    ColumnQueries queries;
    const auto read_queries = [&]() -> const ColumnQueries& {
        wait_for_queries();
#if FROM_PROJECTION
        tile.read<true>(problem, finished, split.position, queries);
#else
        tile.read(problem, sequence, split.position, queries);
#endif
        return queries;
    };
    ColumnSums<kNarrow> state;
    if (!has_page) {
        wait_for_queries();
    } else if (split.is_own) {
        read_queries();
        attend_own_page(problem, queries, own, state);
    } else {
        attend_sealed_page(problem, shared, sequence, tile.kv_head, page, state, read_queries, [] {});
    }
    __syncthreads();  // the sums take the place of the tables
    float* sums = reinterpret_cast<float*>(shared);
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
    for (int index = 4 * threadIdx.x; index < tile.rows(problem) * HEAD_DIM; index += 4 * kSealedSplit * 32) {
        const int row = index / HEAD_DIM;
        const size_t place = tile.row(problem, sequence, row) * splits + blockIdx.x;
        const Merged all = merge_pages(sums + index, TILE_HEADS * HEAD_DIM, &norms[0][row], TILE_HEADS, first, first + count,
                                       problem.partial + place * HEAD_DIM + index % HEAD_DIM);
        if (index % HEAD_DIM == 0) problem.partial_norm[place] = make_float2(all.largest, all.norm);
    }
}
