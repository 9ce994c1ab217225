// Numbers that describe a page, a byte each, as kvcache/codec/metadata.py encodes them.
#pragma once
#include "sealed.cuh"

namespace nested {

constexpr int kSealWarps = 8, kSealThreads = 32 * kSealWarps;
constexpr float kHuge = 3.402823466e38f;
static_assert(kSealWarps * 8 == kPage, "eight tokens a warp");

// Evenly spaced levels from the least of some numbers on, as half precision keeps them.
struct Levels {
    __half2 range;
    float low, step;

    __device__ Levels(float least, float most, float last) {
        range.x = __float2half_rn(least);
        low = __half2float(range.x);
        range.y = __float2half_rn(__fdiv_rn(most - low, last));
        step = __half2float(range.y);
    }
    __device__ float code_of(float value, float last) const {
        return fminf(fmaxf(rintf(__fdiv_rn(value - low, step > 0.f ? step : 1.f)), 0.f), last);
    }
    // A page with numbers that are not finite is read back as not-a-number.
    __device__ void store(u8* place, bool is_finite) const {
        const u32 bits = *reinterpret_cast<const u32*>(&range);
        *reinterpret_cast<u32*>(place) = is_finite ? bits : 0x7E007E00;
    }
};
__device__ inline float of_warp_min(float x) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) x = fminf(x, __shfl_xor_sync(~0u, x, distance));
    return x;
}
__device__ inline float of_warp_max(float x) { return -of_warp_min(-x); }

// A warp's part: numbers lane + 32 i of a page, in evenly spaced levels; they become what is read back.
template <int kCount>
__device__ inline void store_linear(float (&number)[kCount], bool is_finite, u8* codes, u8* range) {
    const int lane = threadIdx.x & 31;
    float least = kHuge, most = -kHuge;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        least = fminf(least, number[i]);
        most = fmaxf(most, number[i]);
    }
    const Levels levels(of_warp_min(least), of_warp_max(most), 255.f);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        const float code = levels.code_of(number[i], 255.f);
        number[i] = __fadd_rn(levels.low, __fmul_rn(levels.step, code));
        codes[lane + 32 * i] = (u8)code;
    }
    if (lane == 0) levels.store(range, is_finite);
}

// The same of numbers none of which is negative, in levels whose logarithms are evenly spaced, code 0 for zero.
template <int kCount>
__device__ inline void store_log(float (&number)[kCount], bool is_finite, u8* codes, u8* range) {
    const int lane = threadIdx.x & 31;
    float logs[kCount], least = kHuge, most = -kHuge;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        logs[i] = number[i] > 0.f ? log2f(number[i]) : 0.f;
        if (number[i] > 0.f) {
            least = fminf(least, logs[i]);
            most = fmaxf(most, logs[i]);
        }
    }
    least = of_warp_min(least);
    most = of_warp_max(most);
    const bool all_zero = least > most;
    const Levels levels(all_zero ? 0.f : least, all_zero ? 0.f : most, 253.f);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        const float code = levels.code_of(logs[i], 253.f);
        codes[lane + 32 * i] = number[i] > 0.f ? (u8)(code + 1.f) : 0;
        number[i] = number[i] > 0.f ? exp2f(__fadd_rn(levels.low, __fmul_rn(levels.step, code))) : 0.f;
    }
    if (lane == 0) levels.store(range, is_finite);
}

// A warp's part: zeros from byte kEnd to a record's end.
template <int kEnd, int kBytes>
__device__ inline void store_padding(u8* record) {
    if ((threadIdx.x & 31) < (kBytes - kEnd) / 4) reinterpret_cast<u32*>(record + kEnd)[threadIdx.x & 31] = 0;
}

}  // namespace nested
