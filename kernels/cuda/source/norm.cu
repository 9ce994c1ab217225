// Additions to the residual stream and the norms around them; one block per token, which it holds in registers.
#include "inputs.cuh"

#ifndef HIDDEN
#define HIDDEN 576
#endif
#ifndef HAS_DELTA  // something is added first
#define HAS_DELTA 1
#endif
#ifndef HAS_OUTPUT_NORM  // after a norm of its own
#define HAS_OUTPUT_NORM 0
#endif

using namespace nested;

constexpr int kTiles = (HIDDEN + kColumns - 1) / kColumns, kMaxWarps = 16;
constexpr int kTilesOfWarp = (kTiles + kMaxWarps - 1) / kMaxWarps, kWarps = (kTiles + kTilesOfWarp - 1) / kTilesOfWarp;
constexpr int kThreads = 32 * kWarps;

using Row = float[kTilesOfWarp][4];

__device__ inline int column_of(int i) { return ((int)(threadIdx.x / 32) + i * kWarps) * kColumns + 4 * (threadIdx.x & 31); }

template <class T>
__device__ inline void read_row(const T* from, Row& row) {
#pragma unroll
    for (int i = 0; i < kTilesOfWarp; ++i) {
        row[i][0] = row[i][1] = row[i][2] = row[i][3] = 0.f;
        if (column_of(i) < HIDDEN) load_four(from + column_of(i), row[i]);
    }
}

// 1 / sqrt(mean of squares + eps), the same in all threads.
__device__ inline float norm_factor(const Row& row, float eps) {
    __shared__ float sums[kWarps];
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kTilesOfWarp; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum = __fmaf_rn(row[i][j], row[i][j], sum);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    __syncthreads();  // of an earlier call
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp];
    return __frsqrt_rn(sum / HIDDEN + eps);
}

// row = hidden + delta, written back to hidden.
__device__ inline void add(float* hidden, const Value* delta, const float* output_gain, float eps, Row& row) {
    read_row(hidden, row);
    if (!HAS_DELTA) return;
    Row change;
    read_row(delta, change);
    const float factor = HAS_OUTPUT_NORM ? norm_factor(change, eps) : 1.f;
#pragma unroll
    for (int i = 0; i < kTilesOfWarp; ++i) {
        if (column_of(i) >= HIDDEN) continue;
        float gain[4];
        if (HAS_OUTPUT_NORM) load_four(output_gain + column_of(i), gain);
#pragma unroll
        for (int j = 0; j < 4; ++j) row[i][j] += HAS_OUTPUT_NORM ? change[i][j] * factor * gain[j] : change[i][j];
        *reinterpret_cast<float4*>(hidden + column_of(i)) = make_float4(row[i][0], row[i][1], row[i][2], row[i][3]);
    }
}

// hidden += (norm of) delta; norm(hidden) as inputs of the linear that follows. Slots without a token get zeros.
extern "C" __global__ void __launch_bounds__(kThreads)
add_norm_prepare(float* hidden, const Value* delta, const float* output_gain, const float* gain, u32* inputs,
                 float2* scales, int tokens, int slots, int pass_tiles, float eps) {
    const int slot = blockIdx.x;
    launch_dependents();
    Row gains;
    read_row(gain, gains);  // does not depend on what came before
    wait_for_inputs();
    Row row = {};
    float factor = 0.f;
    if (slot < tokens) {
        add(hidden + (size_t)slot * HIDDEN, delta + (size_t)slot * HIDDEN, output_gain, eps, row);
        factor = norm_factor(row, eps);
    }
#pragma unroll
    for (int i = 0; i < kTilesOfWarp; ++i) {
        const int tile = threadIdx.x / 32 + i * kWarps;
        if (tile >= kTiles) break;
        float value[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) value[j] = row[i][j] * factor * gains[i][j];
        store_inputs(value, slot, tile, kTiles, slots, pass_tiles, inputs, scales);
    }
}

// hidden += (norm of) delta.
extern "C" __global__ void __launch_bounds__(kThreads)
add_residual(float* hidden, const Value* delta, const float* output_gain, float eps) {
    launch_dependents();
    wait_for_inputs();
    Row row;
    add(hidden + (size_t)blockIdx.x * HIDDEN, delta + (size_t)blockIdx.x * HIDDEN, output_gain, eps, row);
}

// out = norm(x), row by row.
extern "C" __global__ void __launch_bounds__(kThreads)
norm_rows(const Value* x, const float* gain, Value* out, float eps) {
    launch_dependents();
    Row gains, row;
    read_row(gain, gains);
    wait_for_inputs();
    read_row(x + (size_t)blockIdx.x * HIDDEN, row);
    const float factor = norm_factor(row, eps);
#pragma unroll
    for (int i = 0; i < kTilesOfWarp; ++i) {
        if (column_of(i) >= HIDDEN) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j)
            out[(size_t)blockIdx.x * HIDDEN + column_of(i) + j] = to_value(row[i][j] * factor * gains[i][j]);
    }
}
