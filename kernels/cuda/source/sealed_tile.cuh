// Which query heads a warp takes together.
#pragma once
#include "sealed_pages.cuh"

namespace nested {

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
        read<false>(problem, problem.q + row(problem, sequence, 0) * HEAD_DIM, position, queries);
    }
    // From the tile's own, [rows][HEAD_DIM]. kCopied: in shared memory.
    template <bool kCopied>
    __device__ void read(const SealedProblem& problem, const Value* own, int position, ColumnQueries& queries) const {
        const int query = (threadIdx.x & 31) / 4 % TILE_HEADS;
        queries.read<kCopied>(problem, own + query * HEAD_DIM, query < rows(problem) ? position : -1);
    }
};

}  // namespace nested
