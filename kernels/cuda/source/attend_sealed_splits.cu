// Attention over sealed pages of many sequences of one token each.
#include "sealed_stream.cuh"
#include "sealed_sums.cuh"
#include "sealed_tile.cuh"

using namespace nested;

// Many sequences of one token: a warp takes splits. Blocks as many as run at once.
// Shared memory: tables, then the rings of the warps [STREAM_WARPS][kRingBytes].
extern "C" __global__ void __launch_bounds__(STREAM_WARPS * 32, 1)
attend_sealed_splits(SealedProblem problem, int sequences, int splits, int tiles) {
    extern __shared__ __align__(16) u32 tables[];
    __shared__ unsigned long long barriers[STREAM_WARPS][STREAM_SLOTS];
    launch_dependents();
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane / 4;
    const RecordRing ring{reinterpret_cast<u8*>(tables) + kTableBytes + warp * kRingBytes, shared_address(barriers[warp])};
    ring.init();
    RecordStream stream(problem, ring, sequences, splits, tiles);
    fill_tables<STREAM_WARPS * 32>(problem, tables);
    __syncthreads();
    wait_for_inputs();
    for (int index = stream.first_item(); index < stream.num_items(); index += stream.num_warps()) {
        const StreamItem item = stream.item(index);
        const TokenSplit& split = item.split;
        if (split.is_empty()) continue;
        const HeadTile tile(problem, item.tile);
        ColumnQueries queries;
        tile.read(problem, item.sequence, split.position, queries);
        RunningSums sums;
        for (int page = split.begin; page < split.end; ++page) {
            ColumnSums<kNarrow> state;
            if (split.is_own) {
                attend_own_page(problem, queries, OwnPage<false>(problem, item.sequence, 0, tile.kv_head, split.position), state);
            } else {
                attend_streamed_page(stream, problem, queries, tables, item.sequence, tile.kv_head, page, state);
            }
            sums.add(state);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int query = sums.query_of(i);
            if (query >= tile.rows(problem)) continue;
            const size_t place = tile.row(problem, item.sequence, query) * splits + item.number;
            if (g == 0) problem.partial_norm[place] = make_float2(sums.norms[i].largest, sums.norms[i].norm);
            sums.store(i, problem.partial + place * HEAD_DIM);
        }
    }
}
