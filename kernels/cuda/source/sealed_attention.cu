// Attention of new tokens over sealed pages, their sequence's first tokens and their own page; codes stay codes.
//
// The product of keys and queries has tokens as rows and columns of eight (new tokens' heads) as columns, that of values has pairs
// of dimensions as rows and two of its steps for each token (ValueSums). Norms multiply scores and weights, a page's mean is one
// more row of keys. Evenly spaced levels are multiplied as they are, by queries and weights times their steps (sealed_scales.cuh).
//
// Each page is attended to for itself. Pages are merged in their order to splits of kSealedSplit, splits in their order to the
// result, the own page last. A warp takes a page and a block a split where few sequences have one token each, a warp takes splits
// where many have, and a warp takes its columns through all pages where sequences have many tokens: the sums are the same, and
// a token's result depends on its sequence alone.
#include "sealed_merge.cuh"
#include "sealed_stream.cuh"
#include "sealed_sums.cuh"

using namespace nested;

#ifndef ROW_WARPS  // of a block that takes many tokens
#define ROW_WARPS 8
#endif

// The query heads of one KV head that are a tile's columns.
struct HeadTile {
    int kv_head, first_row;

    __device__ HeadTile(const SealedProblem& problem, int tile)
        : kv_head(tile % problem.kv_heads), first_row(tile / problem.kv_heads * TILE_HEADS) {}
    __device__ int rows(const SealedProblem& problem) const { return min(problem.group() - first_row, TILE_HEADS); }
    __device__ size_t row(const SealedProblem& problem, int sequence, int query) const {
        return (size_t)sequence * problem.heads + kv_head * problem.group() + first_row + query;
    }
    __device__ void read(const SealedProblem& problem, int sequence, int position, ColumnQueries& queries) const {
        const int query = (threadIdx.x & 31) / 4 % TILE_HEADS;
        queries.read(problem, problem.q + row(problem, sequence, query) * HEAD_DIM, query < rows(problem) ? position : -1);
    }
};

// Few sequences of one token: a warp takes a page. A grid of (splits, kv heads x tiles of their query heads, sequences).
// Shared memory: tables, of which the sums of the warps [kSealedSplit][TILE_HEADS][HEAD_DIM] take the place.
extern "C" __global__ void __launch_bounds__(kSealedSplit * 32, HEAD_DIM <= 128 ? 2 : 1)
attend_sealed_pages(SealedProblem problem, int splits) {
    extern __shared__ __align__(16) u32 tables[];
    __shared__ float2 norms[kSealedSplit][TILE_HEADS];
    launch_dependents();
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4, sequence = blockIdx.z;
    const HeadTile tile(problem, blockIdx.y);
    const TokenSplit split(problem, sequence, blockIdx.x, splits);
    if (split.is_empty()) {
        wait_for_inputs();
        return;
    }
    const int page = split.is_own ? split.begin + warp : (int)blockIdx.x * kSealedSplit + warp;
    const bool has_page = page >= split.begin && page < split.end;
    if (!split.is_own) {
        if (has_page) fetch_keys(problem, sequence, tile.kv_head, page);
        fill_tables(problem, tables);
    }
    __syncthreads();
    wait_for_inputs();
    ColumnSums<kNarrow> state;
    if (has_page) {
        ColumnQueries queries;
        tile.read(problem, sequence, split.position, queries);
        if (split.is_own) {
            attend_own_page(problem, queries, sequence, 0, tile.kv_head, split.position, state);
        } else {
            attend_sealed_page(problem, queries, tables, sequence, tile.kv_head, page, state, [] {});
        }
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

// Many sequences of one token: a warp takes splits. Blocks as many as run at once.
// Shared memory: tables, then the rings of the warps [STREAM_WARPS][kRingBytes].
extern "C" __global__ void __launch_bounds__(STREAM_WARPS * 32, 1)
attend_sealed_splits(SealedProblem problem, int sequences, int splits, int tiles) {
    extern __shared__ __align__(16) u32 tables[];
    __shared__ unsigned long long barriers[STREAM_WARPS][STREAM_SLOTS];
    launch_dependents();
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
    const RecordRing ring{reinterpret_cast<u8*>(tables) + kTableBytes + warp * kRingBytes, shared_address(barriers[warp])};
    ring.init();
    RecordStream stream(problem, ring, sequences, splits, tiles);
    fill_tables(problem, tables);
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
                attend_own_page(problem, queries, item.sequence, 0, tile.kv_head, split.position, state);
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

// A grid of (heads / kMergedHeads, sequences).
extern "C" __global__ void __launch_bounds__(kMergedColumns)
merge_sealed(SealedProblem problem, int splits, int sequences) {
    __shared__ __align__(16) float result[kMergedColumns];
    launch_dependents();
    const int sequence = blockIdx.y, first = blockIdx.x * kMergedColumns, columns = problem.heads * HEAD_DIM;
    if (sequence >= sequences || problem.positions[sequence] < 0) {
        wait_for_inputs();
        return;
    }
    merge_heads(problem, splits, sequence, blockIdx.x * kMergedHeads, result);
    if (first + (int)threadIdx.x < columns) problem.out[(size_t)sequence * columns + first + threadIdx.x] = to_value(result[threadIdx.x]);
}

// The same as inputs of a product, of sequences from `first_sequence` on; the grid covers all slots.
extern "C" __global__ void __launch_bounds__(kMergedColumns)
merge_sealed_prepare(SealedProblem problem, int splits, int first_sequence, int sequences, u32* inputs, float2* scales, int slots,
                     int pass_tiles) {
    constexpr int kTiles = kMergedColumns / kColumns;
    __shared__ __align__(16) float result[kMergedColumns];
    launch_dependents();
    const int slot = blockIdx.y, tile = threadIdx.x / 32, tiles = (problem.heads * HEAD_DIM + kColumns - 1) / kColumns;
    const bool exists = slot < sequences;
    if (exists) {
        merge_heads(problem, splits, first_sequence + slot, blockIdx.x * kMergedHeads, result);
    } else {
        wait_for_inputs();
    }
    if (tile >= kTiles) return;
    float value[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = exists ? result[4 * threadIdx.x + i] : 0.f;
    store_inputs(value, slot, blockIdx.x * kTiles + tile, tiles, slots, pass_tiles, inputs, scales);
}

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
    if (own_page > 0) fill_tables(problem, tables);
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
    attend_own_page(problem, queries, sequence, number, kv_head, min(own_page * kPage + kPage, stop) - 1, state);
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
