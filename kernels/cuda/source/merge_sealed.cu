// Splits of sequences of one token each put together: to a tensor, or to the inputs of a product.
#include "sealed_merge.cuh"

using namespace nested;

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
