// Products of values with rows of several widths: every bit of a weight is read once, for all of them.
//
// The codes that widths take of a weight's nibbles, as numbers that count from kAbove, are multiplied with all tokens into sums of
// their own; at the end of a group a token adds up those of its width, each times its scale. What kAbove adds goes with the zero,
// by the sum of the token's values. So a width's arithmetic is the same whatever other widths there are.
#pragma once
#include "divided.cuh"

namespace nested {

// Codes that are multiplied: by the place of their width, those above 4 bits being its bits of the low nibble.
__device__ constexpr bool multiplies(int place) { return reads_part(place); }
__device__ constexpr int products_before(int place) { return count_before(place, multiplies); }
constexpr int kProducts = products_before(kPlaces), kOfNibble = products_before(kNibble);

// Rows come in the order of their widths, so that mostly half of a pass is all that a product is needed for, other than that of the
// most upper bits: which half.
constexpr int kMostUpper = kReadsNibble ? kNibble : BITS - 2;
constexpr bool kHasFew = present(2) || present(3) || present(4);
__device__ constexpr bool in_first_half(int place) { return place < kNibble || (width_at(place) == 6 && !kHasFew); }
__device__ constexpr bool covers_quad(int place, int quad) {
    return place == kMostUpper || in_first_half(place) == (quad < kQuads / 2);
}

// Whether a half is all that is needed, in every pass. All lanes.
__device__ inline bool half_is_enough(const long long* row_widths, int tokens) {
    bool enough = true;
    for (int token = threadIdx.x % 32; token < tokens; token += 32)
#pragma unroll
        for (int at = 0; at < kPlaces; ++at)
            if (present(width_at(at)) && row_widths[token] == width_at(at)) enough = enough && covers_quad(at, token % kPassTokens / 8);
    return __all_sync(~0u, enough);
}

// Sums of a token's values over each group, behind the ring's inputs.
constexpr int kSumBytes = kPassTokens * 4;
constexpr int kInputSums = STAGES * kInputBytes, kWeights = kInputSums + STAGES * kGroups * kSumBytes;
constexpr int kBarriers = kWeights + STAGES * kWarps * kTileBytes;

using Fragments = u32[kProducts][2][4];  // of 32 columns, 16 at a time
using ProductSums = float[kProducts][kValueSums];

// What a row in one group multiplies with, at each width: sums of the high nibble, of the low one, and of a token's values.
struct Coefficients {
    float3 of[kPlaces];

    __device__ Coefficients(const u8* tile, int group, int half) {
        const Part* parts = reinterpret_cast<const Part*>(tile + kCodeBytes) + group * kRows + half * 8 + threadIdx.x % 32 / 4;
        const Floats floats([&](int place) { return parts[parts_before(place) * kGroups * kRows]; }, 0);
#pragma unroll
        for (int at = 0; at < kPlaces; ++at) {
            if (!present(width_at(at))) continue;
            of[at] = floats.of[at];
            of[at].z = __fmaf_rn(-kAbove, of[at].x + of[at].y, of[at].z);
        }
    }
};

// Of a number kAbove + code, what a narrower width has of it.
__device__ constexpr u32 number_mask(int bits) { return 0xFFF0FFF0u | (prefix_mask(bits) & 0x000F000Fu); }

__device__ inline void unpack(const Codes& codes, int step, Fragments& fragments) {
#pragma unroll
    for (int columns = 0; columns < 2; ++columns)
#pragma unroll
        for (int is_low = 0; is_low < (kHasLow ? 2 : 1); ++is_low) {
            u32 bytes[2];
            brought_down(is_low ? low_nibbles(codes, step, columns) : high_nibbles(codes, step, columns), is_low ? kLowBits : kHighBits, bytes);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int half = i / 2, s = i % 2;
                const u32 widest = above(bytes[half], s);
#pragma unroll
                for (int at = is_low ? kNibble + 1 : 0; at < (is_low ? kPlaces : kNibble + 1); ++at) {
                    if (!multiplies(at)) continue;
                    const int bits = width_at(at) - (is_low ? 4 : 0);
                    u32& to = fragments[products_before(at)][s][2 * columns + half];
                    to = bits == (is_low ? kLowBits : kHighBits) ? widest : widest & number_mask(bits);
                    asm volatile("" : "+r"(to));  // here and not on the way into a product
                }
            }
        }
}

// A warp's products with all tokens of a pass, tile after tile of the ring; or with the halves that they are needed for.
template <bool kInHalves>
struct Products : RingWalk<kWeights> {
    const long long* row_widths;
    int tokens;
    Fragments fragments, later_fragments;
    float sums[kValueSums];

    __device__ Products(const u8* ring, const Barriers& barriers, int count, const long long* row_widths, int tokens)
        : RingWalk(ring, barriers, count), row_widths(row_widths), tokens(tokens) {
        unpack_step(place, 0, fragments);
    }
    __device__ void unpack_step(Place at, int step, Fragments& to) {
        read_step(at, step);
        unpack(codes, step, to);
    }
    template <bool kFirst>
    __device__ void multiply_step(unsigned long long described, int step, const Fragments& from, ProductSums& products) {
        begin_products();
        multiply_each<kFirst>(described + described_step(2 * step), described + described_step(2 * step + 1), from, products);
        commit_products();
    }
    template <bool kFirst, int kPlace = 0>
    __device__ void multiply_each(unsigned long long first, unsigned long long second, const Fragments& from, ProductSums& products) {
        if constexpr (kPlace < kPlaces) {
            if constexpr (multiplies(kPlace)) {
                constexpr bool kHalf = kInHalves && kPlace != kMostUpper;
                constexpr int kTiles = kHalf ? PASS_TILES / 2 : PASS_TILES, kSkipped = kHalf && !in_first_half(kPlace) ? PASS_TILES / 2 : 0;
                constexpr int kProduct = products_before(kPlace), kLater = kSkipped * kTokens * 128 / 16;
                multiply_values<kFirst, kTiles>(products[kProduct] + 2 * kSkipped, from[kProduct][0], first + kLater);
                multiply_values<false, kTiles>(products[kProduct] + 2 * kSkipped, from[kProduct][1], second + kLater);
            }
            multiply_each<kFirst, kPlace + 1>(first, second, from, products);
        }
    }
    template <int kPlace = 0>
    __device__ void wait_for_each(ProductSums& products) {
        if constexpr (kPlace < kPlaces) {
            if constexpr (multiplies(kPlace)) {
                constexpr bool kHalf = kInHalves && kPlace != kMostUpper;
                wait_for_values<kHalf ? PASS_TILES / 2 : PASS_TILES>(products[products_before(kPlace)] +
                                                                     (kHalf && !in_first_half(kPlace) ? PASS_TILES : 0));
            }
            wait_for_each<kPlace + 1>(products);
        }
    }
    __device__ void add_group(int group, const Coefficients (&coefficients)[2], const int (&widths)[kQuads][2], const ProductSums& products) {
        const float2* totals =
            reinterpret_cast<const float2*>(ring + kInputSums + (place.stage * kGroups + group) * kSumBytes) + threadIdx.x % 4;
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
            const float2 total = totals[4 * q];
#pragma unroll
            for (int token = 0; token < 2; ++token)
#pragma unroll
                for (int at = 0; at < kPlaces; ++at) {
                    if (!present(width_at(at)) || (kInHalves && !covers_quad(at, q)) || widths[q][token] != width_at(at)) continue;
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int i = 4 * q + 2 * half + token;
                        const float3 own = coefficients[half].of[at];
                        sums[i] = __fmaf_rn(own.x, products[at <= kNibble ? products_before(at) : kOfNibble][i], sums[i]);
                        if (at > kNibble) sums[i] = __fmaf_rn(own.y, products[products_before(at)][i], sums[i]);
                        sums[i] = __fmaf_rn(own.z, token == 0 ? total.x : total.y, sums[i]);
                    }
                }
        }
    }
    // The next `count` tiles, all of one block and of `pass`.
    __device__ void multiply_tiles(int count, int pass) {
        int widths[kQuads][2];  // of a lane's tokens
#pragma unroll
        for (int i = 0; i < 2 * kQuads; ++i) {
            const int token = pass * kPassTokens + i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2;
            int& width = widths[i / 2][i % 2];
            width = token < tokens ? (int)row_widths[token] : 0;
        }
#pragma unroll
        for (int i = 0; i < kValueSums; ++i) sums[i] = 0.f;
        ProductSums products;
        for (int tile = 0; tile < count; ++tile) {
            const unsigned long long described = describe_values(shared_address(ring) + place.stage * kInputBytes);
            --left;
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                Fragments& now = step % 2 == 0 ? fragments : later_fragments;
                if (step % kStepsOfGroup == 0)
                    multiply_step<true>(described, step, now, products);
                else
                    multiply_step<false>(described, step, now, products);
                wait_for_former_values();  // and so the other fragments are free
                unpack_step(after(step), (step + 1) % kSteps, step % 2 == 0 ? later_fragments : fragments);
                if ((step + 1) % kStepsOfGroup) continue;
                const int group = step / kStepsOfGroup;
                const Coefficients coefficients[] = {{weights_at(place), group, 0}, {weights_at(place), group, 1}};
                wait_for_each(products);
                add_group(group, coefficients, widths, products);
            }
            leave_tile();
        }
    }
};

}  // namespace nested
