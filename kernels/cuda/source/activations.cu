// Activations of a linear layer, as they are or gated, in the form that it takes.
//
// A block takes one n-tile (four tokens, a warp each) by one tile of 128 columns; a lane takes four neighbours.
#include "inputs.cuh"

#ifndef GATE  // 0: x is [tokens, columns]; else x is gate and up, [tokens, 2 * columns], and 1 is SiLU, 2 is GELU with tanh
#define GATE 0
#endif

using namespace nested;

__device__ inline float activated(float x) {
    const float exponent = GATE == 1 ? -x : -2.f * 0.7978845608028654f * x * (1.f + 0.044715f * x * x);
    return x / (1.f + expf(exponent));
}

extern "C" __global__ void __launch_bounds__(128)
prepare_activations(const Value* x, u32* inputs, float2* scales, int tokens, int columns, int slots, int pass_tiles) {
    const int lane = threadIdx.x & 31, slot = blockIdx.y * kTokens + threadIdx.x / 32;
    const int tiles = gridDim.x, tile = blockIdx.x, first = tile * kColumns + 4 * lane;
    launch_dependents();
    wait_for_inputs();
    float value[4] = {};
    if (slot < tokens && first < columns) {  // columns are a multiple of 32
        load_four(x + (size_t)slot * (GATE ? 2 : 1) * columns + first, value);
        if (GATE) {
            float up[4];
            load_four(x + ((size_t)slot * 2 + 1) * columns + first, up);
#pragma unroll
            for (int i = 0; i < 4; ++i) value[i] = activated(value[i]) * up[i];
        }
    }
    store_inputs(value, slot, tile, tiles, slots, pass_tiles, inputs, scales);
}
