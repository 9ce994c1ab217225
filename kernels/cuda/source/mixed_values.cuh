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

// Sums of a token's values over each group, behind the ring's inputs.
constexpr int kSumBytes = kPassTokens * 4;
constexpr int kInputSums = STAGES * kInputBytes, kWeights = kInputSums + STAGES * kGroups * kSumBytes;
constexpr int kBarriers = kWeights + STAGES * kWarps * kTileBytes;

using Fragments = u32[kProducts][2][4];  // of 32 columns, 16 at a time

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

__device__ inline void unpack(const Codes& codes, int step, Fragments& fragments) {
#pragma unroll
    for (int columns = 0; columns < 2; ++columns) {
        const u32 high = high_nibbles(codes, step, columns), low = kHasLow ? low_nibbles(codes, step, columns) : 0;
#pragma unroll
        for (int at = 0; at < kPlaces; ++at) {
            if (!multiplies(at)) continue;
            u32 bytes[2];
            if (at <= kNibble)
                brought_down(high, width_at(at), bytes);
            else
                brought_down(low, width_at(at) - 4, bytes);
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int s = 0; s < 2; ++s) {
                    u32& to = fragments[products_before(at)][s][2 * columns + half];
                    to = above(bytes[half], s);
                    asm volatile("" : "+r"(to));  // here and not on the way into a product
                }
        }
    }
}

// A warp's products with all tokens of a pass, tile after tile of the ring.
struct Products {
    const u8* ring;
    Barriers barriers;
    int left;  // tiles, of all that this block multiplies
    const long long* tile_widths;
    int num_widths;
    Place place;
    Codes codes;
    Fragments fragments, later_fragments;
    float products[kProducts][kValueSums], sums[kValueSums];

    __device__ Products(const u8* ring, const Barriers& barriers, int count, const long long* tile_widths, int num_widths)
        : ring(ring), barriers(barriers), left(count), tile_widths(tile_widths), num_widths(num_widths) {
        wait(barriers.filled, 0);
        unpack_step(place, 0, fragments);
    }
    __device__ const u8* weights_at(Place at) const { return ring + kWeights + (at.stage * kWarps + threadIdx.x / 32) * kTileBytes; }
    __device__ void unpack_step(Place at, int step, Fragments& to) {
        if (step == 0) {
            read_codes(weights_at(at), false, codes);
            if (kHasLow) read_codes(weights_at(at), true, codes);
        }
        unpack(codes, step, to);
    }
    template <bool kFirst>
    __device__ void multiply_step(unsigned long long described, int step, const Fragments& from) {
        begin_products();
#pragma unroll
        for (int p = 0; p < kProducts; ++p) {
            multiply_values<kFirst>(products[p], from[p][0], described + described_step(2 * step));
            multiply_values<false>(products[p], from[p][1], described + described_step(2 * step + 1));
        }
        commit_products();
    }
    __device__ void add_group(int group, const Coefficients (&coefficients)[2], const int (&widths)[kQuads]) {
        const float2* totals =
            reinterpret_cast<const float2*>(ring + kInputSums + (place.stage * kGroups + group) * kSumBytes) + threadIdx.x % 4;
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
            const float2 total = totals[4 * q];
#pragma unroll
            for (int at = 0; at < kPlaces; ++at) {
                if (!present(width_at(at)) || widths[q] != width_at(at)) continue;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float3 own = coefficients[i / 2].of[at];
                    float& sum = sums[4 * q + i];
                    sum = __fmaf_rn(own.x, products[at <= kNibble ? products_before(at) : kOfNibble][4 * q + i], sum);
                    if (at > kNibble) sum = __fmaf_rn(own.y, products[products_before(at)][4 * q + i], sum);
                    sum = __fmaf_rn(own.z, i % 2 == 0 ? total.x : total.y, sum);
                }
            }
        }
    }
    // The next `count` tiles, all of one block and of `pass`.
    __device__ void multiply_tiles(int count, int pass) {
        int widths[kQuads];  // of a lane's two tokens of 8
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
            const int tile = pass * PASS_TILES + 2 * q + threadIdx.x % 4 / 2;
            widths[q] = tile < num_widths ? (int)tile_widths[tile] : 0;
        }
#pragma unroll
        for (int i = 0; i < kValueSums; ++i) sums[i] = 0.f;
        for (int tile = 0; tile < count; ++tile) {
            const unsigned long long described = describe_values(shared_address(ring) + place.stage * kInputBytes);
            --left;
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                Fragments& now = step % 2 == 0 ? fragments : later_fragments;
                if (step % kStepsOfGroup == 0)
                    multiply_step<true>(described, step, now);
                else
                    multiply_step<false>(described, step, now);
                wait_for_former_values();  // and so the other fragments are free
                const bool is_last = step + 1 == kSteps;
                const Place at = is_last ? place.next() : place;
                if (is_last && left > 0) wait(barriers.filled + 8 * at.stage, at.turn);  // else unpacked for nothing
                unpack_step(at, is_last ? 0 : step + 1, step % 2 == 0 ? later_fragments : fragments);
                if ((step + 1) % kStepsOfGroup) continue;
                const int group = step / kStepsOfGroup;
                const Coefficients coefficients[] = {{weights_at(place), group, 0}, {weights_at(place), group, 1}};
#pragma unroll
                for (int p = 0; p < kProducts; ++p) wait_for_values(products[p]);
                add_group(group, coefficients, widths);
            }
            __syncwarp();
            if (threadIdx.x % 32 == 0) arrive(barriers.emptied + 8 * place.stage);
            place.advance();
        }
    }
};

}  // namespace nested
