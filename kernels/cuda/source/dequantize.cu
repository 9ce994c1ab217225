// A nested weight as bfloat16, for products that a library computes. A grid of (column tiles, row tiles / kWarps); a warp
// takes a tile, a lane writes four neighbouring columns at a time.
#include "uniform.cuh"

using namespace nested;

constexpr int kWarps = 4;

__device__ inline float level(u32 code, u32 residual, float2 high, float2 low, int half) {
    const float value = high.x * place_scale(kHighBits, half) * (float)code;
    return kHasLow ? value + low.x * place_scale(kLowBits, half) * (float)residual + low.y : value + high.y;
}

extern "C" __global__ void __launch_bounds__(kWarps * 32)
nested_dequantize(Weight weight, __nv_bfloat16* out, int rows, int columns, int row_tiles, int tiles_k) {
    launch_dependents();
    const int lane = threadIdx.x & 31, row_tile = blockIdx.y * kWarps + threadIdx.x / 32, column_tile = blockIdx.x;
    if (row_tile < row_tiles) {
        Tile tile;
        tile.request(weight, (size_t)row_tile * tiles_k + column_tile, lane);
        wait_for_inputs();  // of a former weight in the same place
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            u32 codes[4], residual[4] = {};
            high_codes(tile.codes, step, codes);
            if (kHasLow) low_codes(tile.codes, step, residual);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int half = j % 2, row = row_tile * kRows + half * 8 + lane / 4;
                const int column = column_tile * kColumns + 32 * step + 16 * (j / 2) + 4 * (lane % 4);
                if (row >= rows || column >= columns) continue;
                const int group = step / kStepsOfGroup;
                const float2 high = part_floats(tile.high[group][half]);
                const float2 low = kHasLow ? part_floats(tile.low[group][half]) : high;
                float value[4];
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    value[i] = level(codes[j] >> (8 * i) & 255u, residual[j] >> (8 * i) & 255u, high, low, half);
                __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(value[0], value[1]), __floats2bfloat162_rn(value[2], value[3])};
                *reinterpret_cast<uint2*>(out + (size_t)row * columns + column) = *reinterpret_cast<uint2*>(pairs);
            }
        }
    } else {
        wait_for_inputs();
    }
}
