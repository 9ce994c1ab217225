// Products of values at one width: codes become numbers by one byte permutation a pair, then scale and zero; sums stay on the
// tensor cores from the first column to the last.
#pragma once
#include "divided.cuh"

namespace nested {

constexpr int kSumBytes = 0;  // of a stage: sums of values are not needed
constexpr int kWeights = STAGES * kInputBytes, kBarriers = kWeights + STAGES * kWarps * kTileBytes;

using Fragments = u32[2][4];  // of 32 columns, 16 at a time

// Scale and zero of a lane's two rows in one group, each number twice; above 4 bits that of the low nibble too. Codes count
// from the one nearest to zero, so that rounding the scale costs a weight no more than its own rounding does.
struct Levels {
    Pair scale[2], from[2], zero[2], low_scale[2];

    __device__ void read(const u8* tile, int group) {
        const Part* parts = reinterpret_cast<const Part*>(tile + kCodeBytes);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int place = group * kRows + half * 8 + threadIdx.x % 32 / 4;
            const float2 high = part_floats(parts[place]);
            float offset = high.y;
            if (kHasLow) {
                const float2 low = part_floats(parts[kGroups * kRows + place]);
                low_scale[half] = twice(low.x * place_scale(kLowBits, 0));
                offset = low.y;
            }
            const float nearest = fminf(fmaxf(rintf(__fdividef(-offset, high.x)), 0.f), 15.f);
            scale[half] = twice(high.x * place_scale(kHighBits, 0));
            from[half] = twice(kAbove + nearest / place_scale(kHighBits, 0));
            zero[half] = twice(__fmaf_rn(nearest, high.x, offset));
        }
    }
};

__device__ inline void unpack(const Codes& codes, const Levels& levels, int step, Fragments& fragments) {
    u32 high[4], low[4];
#pragma unroll
    for (int columns = 0; columns < 2; ++columns) {
        brought_down(high_nibbles(codes, step, columns), kHighBits, high + 2 * columns);
        if (kHasLow) brought_down(low_nibbles(codes, step, columns), kLowBits, low + 2 * columns);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            Pair value = levels.zero[j % 2];
            if (kHasLow) value = fused(counted(low[j], s, twice(kAbove)), levels.low_scale[j % 2], value);
            value = fused(counted(high[j], s, levels.from[j % 2]), levels.scale[j % 2], value);
            fragments[s][j] = as_bits(value);
            // Here and not on the way into a product, where products would wait for one another.
            asm volatile("" : "+r"(fragments[s][j]));
        }
}

// A warp's products with all tokens of a pass, tile after tile of the ring.
struct Products : RingWalk<kWeights> {
    Levels levels;
    Fragments fragments, later_fragments;
    float sums[kValueSums];

    __device__ Products(const u8* ring, const Barriers& barriers, int count, const long long*, int)
        : RingWalk(ring, barriers, count) {
        unpack_step(place, 0, fragments);
    }
    __device__ void unpack_step(Place at, int step, Fragments& to) {
        read_step(at, step);
        if (step % kStepsOfGroup == 0) levels.read(weights_at(at), step / kStepsOfGroup);
        unpack(codes, levels, step, to);
    }
    __device__ void multiply_step(unsigned long long described, int step, const Fragments& from) {
        begin_products();
#pragma unroll
        for (int s = 0; s < 2; ++s) multiply_values<false>(sums, from[s], described + described_step(2 * step + s));
        commit_products();
    }
    // The next `count` tiles, all of one block.
    __device__ void multiply_tiles(int count, int) {
#pragma unroll
        for (int i = 0; i < kValueSums; ++i) sums[i] = 0.f;
        for (int tile = 0; tile < count; ++tile) {
            const unsigned long long described = describe_values(shared_address(ring) + place.stage * kInputBytes);
            --left;
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                multiply_step(described, step, step % 2 == 0 ? fragments : later_fragments);
                wait_for_former_values();  // and so the other fragments are free
                unpack_step(after(step), (step + 1) % kSteps, step % 2 == 0 ? later_fragments : fragments);
            }
            wait_for_values(sums);
            leave_tile();
        }
    }
};

}  // namespace nested
