// Activations as fixed point numbers: x = step * (128 * d1 + d0), one step per (token, group).
//
// digits: [passes][column tiles][n-tiles of a pass] of 1 KiB. Of passes of one n-tile, it is in the order of B fragments:
// [2][32 lanes] uint4, of which a lane's first half is one step, its second half the next. Of longer passes, it has a
// row of 128 columns for each of 8 digits, of which row r has its chunks of 16 in the order 0 ^ r, 1 ^ r, ...
// scales: [groups][slots] (step, step * sum of q), slots being tokens padded to whole passes.
#pragma once
#include "nested.cuh"

namespace nested {

constexpr float kLargest = 127 * 128 + 63;
constexpr float kSmallestStep = 1.17549435e-38f;

// Of the lanes of a group, which are neighbours.
__device__ inline u32 of_group_max(u32 x) {
    if (GROUP == 128) return __reduce_max_sync(~0u, x);
#pragma unroll
    for (int distance = GROUP / 8; distance > 0; distance /= 2) x = max(x, __shfl_xor_sync(~0u, x, distance));
    return x;
}
__device__ inline int of_group_sum(int x) {
    if (GROUP == 128) return __reduce_add_sync(~0u, x);
#pragma unroll
    for (int distance = GROUP / 8; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

// A warp's 128 columns of one slot, a lane's four neighbours in `value`; not-a-number for a group that is not finite.
__device__ inline void store_digits(const float (&value)[4], int slot, int tile, int tiles, int slots, int pass_tiles, u32* digits,
                                    float2* scales) {
    const int lane = threadIdx.x & 31;
    // Of numbers without a sign, bits are in the order of what they mean; infinity and not-a-number come last.
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = max(largest, __float_as_uint(fabsf(value[i])));
    largest = of_group_max(largest);
    const bool finite = largest < 0x7f800000;
    const float step = finite ? fmaxf(__uint_as_float(largest) / kLargest, kSmallestStep) : __int_as_float(0x7fffffff);

    u32 high = 0, low = 0;
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int q = finite ? __float2int_rn(__fdiv_rn(value[i], step)) : 0;
        const int d1 = (q + 64) >> 7, d0 = q - 128 * d1;
        high |= (u32)(u8)d1 << (8 * i);
        low |= (u32)(u8)d0 << (8 * i);
        sum += q;
    }
    sum = of_group_sum(sum);

    const int in_tile = slot % kTokens, in_step = lane / 8, half = lane % 8 / 4, quad = lane % 4;
    const int token_tile = slot / kTokens, pass = token_tile / pass_tiles;
    u32* out = digits + (((size_t)pass * tiles + tile) * pass_tiles + token_tile % pass_tiles) * 256;
    if (pass_tiles == 1) {
        out += in_step / 2 * 128 + in_step % 2 * 2 + half + quad * 4;
        out[(in_tile * 2 + 0) * 16] = high;
        out[(in_tile * 2 + 1) * 16] = low;
    } else {
        const int row = in_tile * 2, chunk = in_step * 2 + half;
        out[(row * 8 + (chunk ^ row)) * 4 + quad] = high;
        out[((row + 1) * 8 + (chunk ^ (row + 1))) * 4 + quad] = low;
    }
    if (lane % (GROUP / 4) == 0)
        scales[(size_t)(tile * kGroups + lane / (GROUP / 4)) * slots + slot] = make_float2(step, step * sum);
}

// Four neighbours at a multiple of four, as floats.
__device__ inline void load_four(const float* from, float (&value)[4]) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    value[0] = four.x, value[1] = four.y, value[2] = four.z, value[3] = four.w;
}
template <class Half>
__device__ inline void load_four(const Half* from, float (&value)[4]) {
    const uint2 four = *reinterpret_cast<const uint2*>(from);
    const Half* halves = reinterpret_cast<const Half*>(&four);
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = (float)halves[i];
}

}  // namespace nested
