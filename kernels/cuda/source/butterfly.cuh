// Steps of a Hadamard transform over a vector that lanes of a warp share.
#pragma once

namespace nested {

// Between a lane's own numbers, as many as a power of two.
template <int kCount>
__device__ inline void butterfly_of_numbers(float (&x)[kCount]) {
#pragma unroll
    for (int span = 1; span < kCount; span *= 2)
#pragma unroll
        for (int i = 0; i < kCount; ++i)
            if ((i & span) == 0) {
                const float a = x[i], b = x[i + span];
                x[i] = a + b, x[i + span] = a - b;
            }
}
// Between lanes that differ in a bit from kFirst on.
template <int kFirst, int kCount>
__device__ inline void butterfly_of_lanes(float (&x)[kCount]) {
#pragma unroll
    for (int distance = kFirst; distance < 32; distance *= 2)
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const float other = __shfl_xor_sync(~0u, x[i], distance);
            x[i] = threadIdx.x & distance ? other - x[i] : x[i] + other;
        }
}

}  // namespace nested
