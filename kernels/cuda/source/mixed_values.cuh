// Products of values with rows of several widths: every bit of a weight is read, unpacked and multiplied once, for all of them.
//
// The widths that may be there cut a code into fields. Each field's bits, as numbers that count from kAbove, are multiplied with
// all tokens into sums of its own; at the end of a group a token adds up the fields of its width, each times its scale:
// w = sum of scale * 2^(bits that follow) * field + zero. What kAbove adds goes with the zero, by the sum of the token's values.
#pragma once
#include "divided.cuh"

namespace nested {

__device__ constexpr bool ends_field(int place) { return present(width_at(place)) || (place == kNibble && kHasLow); }
__device__ constexpr int fields_before(int place) { return count_before(place, ends_field); }
__device__ constexpr int field_start(int place) {  // where the field begins that ends at a place
    return place == 0 ? 0 : ends_field(place - 1) ? width_at(place - 1) : field_start(place - 1);
}
constexpr int kFields = fields_before(kPlaces);

// Sums of a token's values over each group, behind the ring's inputs.
constexpr int kSumBytes = kPassTokens * 4;
constexpr int kInputSums = STAGES * kInputBytes, kWeights = kInputSums + STAGES * kGroups * kSumBytes;
constexpr int kBarriers = kWeights + STAGES * kWarps * kTileBytes;

using Fragments = u32[kFields][2][4];  // of 32 columns, 16 at a time

// What a row in one group multiplies each field with, at each width, and the sum of a token's values.
struct Coefficients {
    float field[kPlaces][kFields], constant[kPlaces];

    __device__ Coefficients(const u8* tile, int group, int half) {
        const Part* parts = reinterpret_cast<const Part*>(tile + kCodeBytes) + group * kRows + half * 8 + threadIdx.x % 32 / 4;
        const Floats floats([&](int place) { return parts[parts_before(place) * kGroups * kRows]; });
#pragma unroll
        for (int at = 0; at < kPlaces; ++at) {
            if (!present(width_at(at))) continue;
            constant[at] = floats.of[at].z;
#pragma unroll
            for (int end = 0; end <= at; ++end) {
                if (!ends_field(end)) continue;
                const int followed = (end <= kNibble && at > kNibble ? 4 : width_at(at)) - width_at(end);
                float& own = field[at][fields_before(end)];
                own = (end <= kNibble ? floats.of[at].x : floats.of[at].y) * (1 << followed);
                constant[at] = __fmaf_rn(-kAbove, own, constant[at]);
            }
        }
    }
};

template <int kPlace = 0>
__device__ inline void unpack(const Codes& codes, int step, Fragments& fragments) {
    if constexpr (kPlace < kPlaces) {
        if constexpr (ends_field(kPlace)) {
            u32 field[4];
            field_codes<field_start(kPlace), width_at(kPlace)>(codes, step, field);
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int s = 0; s < 2; ++s) {
                    u32& to = fragments[fields_before(kPlace)][s][j];
                    to = above(field[j], s);
                    asm volatile("" : "+r"(to));  // here and not on the way into a product
                }
        }
        unpack<kPlace + 1>(codes, step, fragments);
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
    float of_field[kFields][kValueSums], sums[kValueSums];

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
        for (int f = 0; f < kFields; ++f) {
            multiply_values<kFirst>(of_field[f], from[f][0], described + described_step(2 * step));
            multiply_values<false>(of_field[f], from[f][1], described + described_step(2 * step + 1));
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
                    const Coefficients& own = coefficients[i / 2];
                    float& sum = sums[4 * q + i];
#pragma unroll
                    for (int f = 0; f < fields_before(at + 1); ++f) sum = __fmaf_rn(own.field[at][f], of_field[f][4 * q + i], sum);
                    sum = __fmaf_rn(own.constant[at], i % 2 == 0 ? total.x : total.y, sum);
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
                for (int f = 0; f < kFields; ++f) wait_for_values(of_field[f]);
                add_group(group, coefficients, widths);
            }
            __syncwarp();
            if (threadIdx.x % 32 == 0) arrive(barriers.emptied + 8 * place.stage);
            place.advance();
        }
    }
};

}  // namespace nested
