// The likeliest token of each row, in two launches: of pieces of a row, then of the row.
#include "nested.cuh"

using namespace nested;

constexpr int kThreads = 256;

// The larger logit, of equals the earlier one; once a logit was not finite, nothing is larger.
struct Best {
    float logit;
    int token;

    __device__ void take(Best other) {
        if (other.logit > logit || (other.logit == logit && other.token < token)) *this = other;
    }
};
constexpr float kNothing = -3.4e38f;
constexpr int kNotFinite = -1;

__device__ inline Best of_block(Best best) {
    __shared__ Best of_warps[kThreads / 32];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        best.take({__shfl_xor_sync(~0u, best.logit, distance), __shfl_xor_sync(~0u, best.token, distance)});
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = best;
    __syncthreads();
    for (int warp = 0; warp < kThreads / 32; ++warp) best.take(of_warps[warp]);
    return best;
}

// A grid of (pieces, rows).
extern "C" __global__ void __launch_bounds__(kThreads)
greedy_pieces(const float* logits, Best* of_pieces, int columns) {
    launch_dependents();
    wait_for_inputs();
    const float* row = logits + (size_t)blockIdx.y * columns;
    Best best = {kNothing, columns};
    for (int column = blockIdx.x * kThreads + threadIdx.x; column < columns; column += gridDim.x * kThreads) {
        const float logit = row[column];
        best.take(isfinite(logit) ? Best{logit, column} : Best{__int_as_float(0x7f800000), kNotFinite});
    }
    best = of_block(best);
    if (threadIdx.x == 0) of_pieces[blockIdx.y * gridDim.x + blockIdx.x] = best;
}

// A block for each row.
extern "C" __global__ void __launch_bounds__(kThreads)
greedy_rows(const Best* of_pieces, long long* tokens, int pieces) {
    launch_dependents();
    wait_for_inputs();
    Best best = {kNothing, 0x7fffffff};
    for (int piece = threadIdx.x; piece < pieces; piece += kThreads) best.take(of_pieces[blockIdx.x * pieces + piece]);
    best = of_block(best);
    if (threadIdx.x == 0) tokens[blockIdx.x] = best.token;
}
