// Inputs of a product, in the form that it takes: fixed point numbers (digits.cuh) or values as they are (values.cuh).
#pragma once
#include "digits.cuh"

#ifndef AS_VALUES  // 1: as values, 2: and their sums over each group
#define AS_VALUES 0
#endif

namespace nested {

#if AS_VALUES
static_assert(VALUE != 0, "values are of a half-precision type");

// A warp's 128 columns of one slot, a lane's four neighbours in `value`, in the order of values.cuh.
__device__ inline void store_inputs(const float (&value)[4], int slot, int tile, int tiles, int slots, int pass_tiles, u32* inputs,
                                    float2* scales) {
    const int lane = threadIdx.x & 31, pass_tokens = pass_tiles * kTokens, token = slot % pass_tokens;
    const int half = lane / 16, chunk = lane % 16 / 8 * 4 + lane % 8 / 4, quad = lane % 4;
    u32* row = inputs + (((size_t)(slot / pass_tokens) * tiles + tile) * 2 + half) * pass_tokens * 32 + token * 32;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
        Value pair[2] = {to_value(value[2 * s]), to_value(value[2 * s + 1])};
        row[((chunk + 2 * s) ^ (token & 7)) * 4 + quad] = *reinterpret_cast<u32*>(pair);
    }
#if AS_VALUES == 2
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += to_float(to_value(value[i]));
#pragma unroll
    for (int distance = GROUP / 8; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (lane % (GROUP / 4) == 0)
        reinterpret_cast<float*>(scales)[(size_t)(tile * kGroups + lane / (GROUP / 4)) * slots + slot] = sum;  // [groups][slots]
#endif
}
#else
__device__ inline void store_inputs(const float (&value)[4], int slot, int tile, int tiles, int slots, int pass_tiles, u32* inputs,
                                    float2* scales) {
    store_digits(value, slot, tile, tiles, slots, pass_tiles, inputs, scales);
}
#endif

}  // namespace nested
