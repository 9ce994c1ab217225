// Products of rows of several widths in one launch: a weight is read once, at the widest of them, and each n-tile takes the
// bits of its own width. All of a row's arithmetic is that of `uniform.cuh` at its width.
#pragma once
#include "product.cuh"

namespace nested {

// WIDTHS has bit r set if rows of width r may be there; BITS is the widest of them.
__device__ constexpr bool present(int width) { return WIDTHS >> width & 1; }
__device__ constexpr int width_at(int place) { return place < 3 ? 2 + place : 2 * place; }  // 2, 3, 4, 6, 8
constexpr int kPlaces = 5, kNibble = 2;
constexpr bool kReadsNibble = present(4) || kHasLow;  // the 4-bit part, as itself or for its scale

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
                    if (at == kNibble ? kReadsNibble : present(width_at(at)))
                        parts[at][group][half] = load(weight.parts[at] + (index * kGroups + group) * kRows + half * 8 + lane / 4);
    }

    // Scale of the high nibble; scale of the low one; zero.
    __device__ float3 floats(int width, int group, int half) const {
        float3 result = {};
        if (kReadsNibble) {
            const float2 nibble = part_floats(parts[kNibble][group][half]);
            result = make_float3(nibble.x, 0.f, nibble.y);
        }
#pragma unroll
        for (int at = 0; at < kPlaces; ++at) {
            if (at == kNibble || !present(width_at(at))) continue;
            const float2 own = part_floats(parts[at][group][half]);
            if (width != width_at(at)) continue;
            if (width_at(at) < 4) result.x = own.x;
            if (width_at(at) > 4) result.y = own.x;
            result.z = own.y;
        }
        return result;
    }
};

struct Widths {
    int of[TOKEN_TILES];
};

// All groups of one tile of columns, added to out.
__device__ inline void add_tile(const Tile (&tiles)[ROW_TILES], int k, int tiles_k, const uint2* digits, const float2* scales,
                                int slots, bool has_token, Widths widths, float (&out)[ROW_TILES][TOKEN_TILES][2]) {
    const int lane = threadIdx.x & 31;
    constexpr int kHighBits = BITS < 4 ? BITS : 4;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
        int high[ROW_TILES][TOKEN_TILES][4], low[kHasLow ? ROW_TILES : 1][TOKEN_TILES][4];
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
            for (int q = 0; q < TOKEN_TILES; ++q)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    high[r][q][i] = kMagic;
                    if (kHasLow) low[r][q][i] = kMagic;
                }
#pragma unroll
        for (int s = 0; s < kStepsOfGroup; ++s) {
            const int step = group * kStepsOfGroup + s;
#pragma unroll
            for (int r = 0; r < ROW_TILES; ++r) {
                u32 codes[4], residual[4];
                high_codes(tiles[r].codes, step, codes);
                if (kHasLow) low_codes(tiles[r].codes, step, residual);
#pragma unroll
                for (int q = 0; q < TOKEN_TILES; ++q) {
                    const int width = widths.of[q];
                    const uint2 x = has_token ? digits[((((size_t)q * tiles_k + k) * 2 + step / 2) * 32 + lane) * 2 + step % 2]
                                              : make_uint2(0, 0);
                    u32 own[4];
                    const int dropped = kHighBits - min(width, kHighBits);
                    const u32 mask = 0x01010101u * ((1u << min(width, kHighBits)) - 1);
#pragma unroll
                    for (int j = 0; j < 4; ++j) own[j] = codes[j] >> dropped & mask;
                    multiply<false>(high[r][q], own, x);
                    if (kHasLow && width > 4) {
                        if (BITS == 8 && present(6) && width == 6) {
#pragma unroll
                            for (int j = 0; j < 4; ++j) own[j] = residual[j] >> 2 & 0x03030303u;
                            multiply<false>(low[r][q], own, x);
                        } else {
                            multiply<false>(low[r][q], residual, x);
                        }
                    }
                }
            }
        }
#pragma unroll
        for (int q = 0; q < TOKEN_TILES; ++q) {
            const float2 x_scale = scales[(size_t)(k * kGroups + group) * slots + q * kTokens + lane % 4];
            const int width = widths.of[q];
#pragma unroll
            for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float3 part = tiles[r].floats(width, group, half);
                    float& sum = out[r][q][half];
                    sum = __fmaf_rn(part.x, joined(high[r][q][2 * half], high[r][q][2 * half + 1]) * x_scale.x, sum);
                    if (kHasLow && width > 4)
                        sum = __fmaf_rn(part.y, joined(low[r][q][2 * half], low[r][q][2 * half + 1]) * x_scale.x, sum);
                    sum = __fmaf_rn(part.z, x_scale.y, sum);
                }
        }
    }
}

}  // namespace nested
