// Products of one width: what a warp holds of a weight, and a tile of columns added to its sums.
#pragma once
#include "product.cuh"

namespace nested {

using ServedWeight = Weight;

struct Tile {
    Codes codes;
    Part high[kGroups][2], low[kGroups][2];

    __device__ void request(const Weight& weight, size_t index, int lane) {
        codes.request(weight, index * 32 + lane);
#pragma unroll
        for (int group = 0; group < kGroups; ++group)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const size_t part = (index * kGroups + group) * kRows + half * 8 + lane / 4;
                high[group][half] = load(weight.high + part);
                if (kHasLow) low[group][half] = load(weight.low + part);
            }
    }
};

struct Widths {};  // of the n-tiles: all the same

// All groups of one tile of columns, added to out.
__device__ inline void add_tile(const Tile (&tiles)[ROW_TILES], int k, int tiles_k, const uint4* digits, const float2* scales,
                                int slots, bool has_token, Widths, float (&out)[ROW_TILES][TOKEN_TILES][2]) {
    const int lane = threadIdx.x & 31;
    uint4 x[TOKEN_TILES];  // of two steps
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
        int high[ROW_TILES][TOKEN_TILES][4], low[kHasLow ? ROW_TILES : 1][TOKEN_TILES][4];
#pragma unroll
        for (int s = 0; s < kStepsOfGroup; ++s) {
            const int step = group * kStepsOfGroup + s;
#pragma unroll
            for (int q = 0; q < TOKEN_TILES; ++q)
                if (step % 2 == 0)
                    x[q] = has_token ? digits[(((size_t)q * tiles_k + k) * 2 + step / 2) * 32 + lane] : make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int r = 0; r < ROW_TILES; ++r) {
                u32 codes[4], residual[4];
                high_codes(tiles[r].codes, step, codes);
                if (kHasLow) low_codes(tiles[r].codes, step, residual);
#pragma unroll
                for (int q = 0; q < TOKEN_TILES; ++q) {
                    if (s == 0) {
                        multiply<true>(high[r][q], codes, of_step(x[q], step));
                        if (kHasLow) multiply<true>(low[r][q], residual, of_step(x[q], step));
                    } else {
                        multiply<false>(high[r][q], codes, of_step(x[q], step));
                        if (kHasLow) multiply<false>(low[r][q], residual, of_step(x[q], step));
                    }
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
                const float2 part = part_floats(tiles[r].high[group][half]);
                const float2 own = kHasLow ? part_floats(tiles[r].low[group][half]) : part;
                const float high_scale = part.x * place_scale(kHighBits, half), low_scale = own.x * place_scale(kLowBits, half);
#pragma unroll
                for (int q = 0; q < TOKEN_TILES; ++q) {
                    const float step = x_scale[q].x, total = x_scale[q].y;
                    float& sum = out[r][q][half];
                    sum = __fmaf_rn(high_scale, joined(high[r][q][2 * half], high[r][q][2 * half + 1]) * step, sum);
                    if (kHasLow) sum = __fmaf_rn(low_scale, joined(low[r][q][2 * half], low[r][q][2 * half + 1]) * step, sum);
                    sum = __fmaf_rn(own.y, total, sum);
                }
            }
    }
}

}  // namespace nested
