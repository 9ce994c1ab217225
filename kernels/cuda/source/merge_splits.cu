// Splits of sequences of one token each put together: to a tensor, or to the inputs of a product.
#include "attention.cuh"

using namespace nested;

constexpr int kReadTogether = 8;  // splits that are merged

// Four neighbouring dimensions of a row of `attend_splits`, from `first` on, put together from all its splits.
__device__ inline void merge_row(const Problem& problem, int splits, size_t sequence, int position, int first, float (&value)[4]) {
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
merge_splits(Problem problem, int splits, int sequences) {
    launch_dependents();
    const int sequence = blockIdx.y * kTokens + threadIdx.x / 32, columns = problem.heads * HEAD_DIM;
    const int first = blockIdx.x * kColumns + 4 * (threadIdx.x & 31);
    const int position = sequence < sequences ? (int)problem.positions[sequence] : -1;
    wait_for_inputs();
    if (position < 0 || first >= columns) return;
    float value[4];
    merge_row(problem, splits, sequence, position, first, value);
#pragma unroll
    for (int i = 0; i < 4; ++i) problem.out[(size_t)sequence * columns + first + i] = to_value(value[i]);
}

// The same as inputs of a product, of sequences from `first_sequence` on; the grid covers all slots.
extern "C" __global__ void __launch_bounds__(kTokens * 32)
merge_splits_prepare(Problem problem, int splits, int first_sequence, int sequences, u32* inputs, float2* scales, int slots,
                     int pass_tiles) {
    launch_dependents();
    const int slot = blockIdx.y * kTokens + threadIdx.x / 32, columns = problem.heads * HEAD_DIM;
    const int first = blockIdx.x * kColumns + 4 * (threadIdx.x & 31), sequence = first_sequence + slot;
    const int position = slot < sequences ? (int)problem.positions[sequence] : -1;
    wait_for_inputs();
    float value[4] = {};
    if (slot < sequences && first < columns) merge_row(problem, splits, sequence, position, first, value);
    store_inputs(value, slot, blockIdx.x, gridDim.x, slots, pass_tiles, inputs, scales);
}
