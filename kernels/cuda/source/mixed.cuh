// Products of rows of several widths in one launch: a weight is read once, at the widest of them, and each n-tile takes the
// bits of its own width. All of a row's arithmetic is that of `uniform.cuh` at its width.
#pragma once
#include "widths.cuh"

namespace nested {

constexpr bool kHasSixOfEight = BITS == 8 && present(6);

using ServedWeight = MixedWeight;

struct Tile {
    Codes codes;
    Part parts[kPlaces][kGroups][2];

    __device__ void request(const MixedWeight& weight, size_t index, int lane) {
        codes.request(weight, index * 32 + lane);
#pragma unroll
        for (int at = 0; at < kPlaces; ++at)
#pragma unroll
            for (int group = 0; group < kGroups; ++group)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    if (reads_part(at))
                        parts[at][group][half] = load(weight.parts[at] + (index * kGroups + group) * kRows + half * 8 + lane / 4);
    }
};

struct Widths {
    int of[TOKEN_TILES];  // 0: nobody wants this n-tile, whose sums stay 0
};

// A step's codes as A operands, for every width that may be there.
struct StepCodes {
    u32 two[4], three[4], nibble[4], six[4], low[4];

    __device__ StepCodes(const Codes& tile, int step) {
        high_codes(tile, step, nibble);
        if (kHasLow) low_codes(tile, step, low);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int row = 4 * (j % 2);  // its nibble
            if (present(2)) two[j] = nibble[j] & prefix_mask(2) << row;
            if (present(3)) three[j] = nibble[j] & prefix_mask(3) << row;
            if (kHasSixOfEight) six[j] = low[j] & prefix_mask(2) << row;
        }
    }
};

// As `multiply<false>` where `condition`, which all lanes share, holds.
__device__ inline void multiply_if(bool condition, int* sum, const u32* codes, uint2 x) {
    asm volatile(
        "{ .reg .pred wanted; setp.ne.u32 wanted, %10, 0;\n"
        "@wanted mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3}; }"
        : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
        : "r"(codes[0]), "r"(codes[1]), "r"(codes[2]), "r"(codes[3]), "r"(x.x), "r"(x.y), "r"((u32)condition));
}

// All groups of one tile of columns, added to out.
__device__ inline void add_tile(const Tile (&tiles)[ROW_TILES], int k, int tiles_k, const uint4* digits, const float2* scales,
                                int slots, bool has_token, Widths widths, float (&out)[ROW_TILES][TOKEN_TILES][2]) {
    const int lane = threadIdx.x & 31;
    uint4 x[TOKEN_TILES];  // of two steps
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
        int high[ROW_TILES][TOKEN_TILES][4], low[kHasLow ? ROW_TILES : 1][TOKEN_TILES][4];
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
            for (int q = 0; q < TOKEN_TILES; ++q)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    high[r][q][i] = 0;
                    if (kHasLow) low[r][q][i] = 0;
                }
#pragma unroll
        for (int s = 0; s < kStepsOfGroup; ++s) {
            const int step = group * kStepsOfGroup + s;
#pragma unroll
            for (int q = 0; q < TOKEN_TILES; ++q)
                if (step % 2 == 0)
                    x[q] = has_token ? digits[(((size_t)q * tiles_k + k) * 2 + step / 2) * 32 + lane] : make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int r = 0; r < ROW_TILES; ++r) {
                const StepCodes codes(tiles[r].codes, step);
#pragma unroll
                for (int q = 0; q < TOKEN_TILES; ++q) {
                    const int width = widths.of[q];
                    if (present(2)) multiply_if(width == 2, high[r][q], codes.two, of_step(x[q], step));
                    if (present(3)) multiply_if(width == 3, high[r][q], codes.three, of_step(x[q], step));
                    if (kReadsNibble) multiply_if(width >= 4, high[r][q], codes.nibble, of_step(x[q], step));
                    if (kHasLow) multiply_if(width == BITS, low[r][q], codes.low, of_step(x[q], step));
                    if (kHasSixOfEight) multiply_if(width == 6, low[r][q], codes.six, of_step(x[q], step));
                }
            }
        }
        float2 x_scale[TOKEN_TILES];
#pragma unroll
        for (int q = 0; q < TOKEN_TILES; ++q)
            x_scale[q] = scales[(size_t)(k * kGroups + group) * slots + q * kTokens + lane % 4];
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const Floats floats([&](int at) { return tiles[r].parts[at][group][half]; }, half);
#pragma unroll
                for (int q = 0; q < TOKEN_TILES; ++q) {
                    const int width = widths.of[q];
                    const float3 part = floats.at(width);
                    float& sum = out[r][q][half];
                    sum = __fmaf_rn(part.x, joined(high[r][q][2 * half], high[r][q][2 * half + 1]) * x_scale[q].x, sum);
                    if (kHasLow && width > 4)
                        sum = __fmaf_rn(part.y, joined(low[r][q][2 * half], low[r][q][2 * half + 1]) * x_scale[q].x, sum);
                    sum = __fmaf_rn(part.z, x_scale[q].y, sum);
                }
            }
    }
}

}  // namespace nested
