// Activations as fixed point numbers in the order of B fragments: x = step * (128 * d1 + d0), one step per (token, group).
//
// A block takes one n-tile (four tokens, a warp each) by one tile of 128 columns; a lane takes four neighbours.
#include "nested.cuh"

using namespace nested;

constexpr float kLargest = 127 * 128 + 63;
constexpr float kSmallestStep = 1.17549435e-38f;

// digits: [n-tiles][column tiles][2][32 lanes] uint4, of which a lane's first half is one step, its second half the next.
// scales: [groups][slots] (step, step * sum of q), slots being tokens padded to whole n-tiles.
extern "C" __global__ void __launch_bounds__(128)
quantize_activations(const Value* x, u32* digits, float2* scales, int tokens, int columns, int slots) {
    const int lane = threadIdx.x & 31, in_tile = threadIdx.x >> 5, slot = blockIdx.y * kTokens + in_tile;
    const int tiles = gridDim.x, tile = blockIdx.x, first = tile * kColumns + 4 * lane;
    launch_dependents();
    wait_for_inputs();
    float value[4] = {};
    if (slot < tokens && first < columns)  // columns are a multiple of 32
        for (int i = 0; i < 4; ++i) value[i] = to_float(x[(size_t)slot * columns + first + i]);

    float largest = 0.f;
    bool finite = true;
    for (int i = 0; i < 4; ++i) {
        largest = fmaxf(largest, fabsf(value[i]));
        finite = finite && isfinite(value[i]);
    }
    for (int distance = GROUP / 8; distance > 0; distance /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
        finite = __shfl_xor_sync(~0u, (int)finite, distance) && finite;
    }
    const float step = finite ? fmaxf(largest / kLargest, kSmallestStep) : __int_as_float(0x7fffffff);

    u32 high = 0, low = 0;
    int sum = 0;
    for (int i = 0; i < 4; ++i) {
        const int q = finite ? __float2int_rn(__fdiv_rn(value[i], step)) : 0;
        const int d1 = (q + 64) >> 7, d0 = q - 128 * d1;
        high |= (u32)(u8)d1 << (8 * i);
        low |= (u32)(u8)d0 << (8 * i);
        sum += q;
    }
    for (int distance = GROUP / 8; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);

    const int in_step = lane / 8, half = lane % 8 / 4, quad = lane % 4;
    u32* out = digits + ((((size_t)blockIdx.y * tiles + tile) * 2 + in_step / 2) * 32) * 4 + in_step % 2 * 2 + half;
    out[((in_tile * 2 + 0) * 4 + quad) * 4] = high;
    out[((in_tile * 2 + 1) * 4 + quad) * 4] = low;
    if (lane % (GROUP / 4) == 0)
        scales[(size_t)(tile * kGroups + lane / (GROUP / 4)) * slots + slot] = make_float2(step, step * sum);
}
