// Attention over sealed pages of sequences of several tokens each.
#include "sealed_merge.cuh"
#include "sealed_sums.cuh"

using namespace nested;

#ifndef ROW_WARPS  // of a block that takes many tokens
#define ROW_WARPS 8
#endif

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
    if (own_page > 0) fill_tables<ROW_WARPS * 32>(problem, tables);
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
    ColumnSums<false> state;
    attend_own_page(problem, queries, OwnPage<false>(problem, sequence, number, kv_head, min(own_page * kPage + kPage, stop) - 1), state);
    of_all.add(state);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float sum[2 * kValuePairs];
#pragma unroll
        for (int pair = 0; pair < kValuePairs; ++pair) {
            const float2 both = of_all.of(pair, i);
            sum[2 * pair] = __fdiv_rn(both.x, of_all.norms[i].norm);
            sum[2 * pair + 1] = __fdiv_rn(both.y, of_all.norms[i].norm);
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
