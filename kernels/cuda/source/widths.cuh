// Rows of several widths in one launch: which there may be. WIDTHS has bit r set if rows of width r may be there; BITS is the
// widest of them.
#pragma once
#include "product.cuh"

namespace nested {

constexpr int kPlaces = 5, kNibble = 2;  // of the widths 2, 3, 4, 6, 8
__device__ constexpr int width_at(int place) { return place < 3 ? 2 + place : 2 * place; }
__device__ constexpr bool present(int width) { return WIDTHS >> width & 1; }

// How many places before one something holds for.
template <class Predicate>
__device__ constexpr int count_before(int place, Predicate holds) {
    return (place > 0 && holds(0)) + (place > 1 && holds(1)) + (place > 2 && holds(2)) + (place > 3 && holds(3)) + (place > 4 && holds(4));
}

// Scales and zeros are read at the widths that may be there, and at 4 bits for those above.
constexpr bool kReadsNibble = present(4) || kHasLow;
__device__ constexpr bool reads_part(int place) { return place == kNibble ? kReadsNibble : present(width_at(place)); }

// Scale of the high nibble; scale of the low one; zero: of a row in one group, at every width that may be there. Scales are for
// codes that lie in place, in the lower nibble or (half 1) the upper one.
struct Floats {
    float3 of[kPlaces];

    // part_at(place) gives what is read there.
    template <class PartAt>
    __device__ Floats(const PartAt& part_at, int half) {
        const float2 nibble = kReadsNibble ? part_floats(part_at(kNibble)) : make_float2(0.f, 0.f);
#pragma unroll
        for (int at = 0; at < kPlaces; ++at) {
            if (!present(width_at(at))) continue;
            const float2 own = part_floats(part_at(at));
            const int bits = width_at(at);
            of[at] = bits > 4 ? make_float3(nibble.x * place_scale(4, half), own.x * place_scale(bits - 4, half), own.y)
                              : make_float3(own.x * place_scale(bits, half), 0.f, own.y);
        }
    }
    __device__ float3 at(int width) const {
        float3 result = {};
#pragma unroll
        for (int place = 0; place < kPlaces; ++place)
            if (present(width_at(place)) && width == width_at(place)) result = of[place];
        return result;
    }
};

}  // namespace nested
