// What the products of nested weights share: weights in registers, sums that become floats, blocks of a cluster.
#pragma once
#include "nested.cuh"

#ifndef TOKEN_TILES  // n-tiles of a pass
#define TOKEN_TILES 1
#endif
#ifndef ROW_TILES  // of a warp
#define ROW_TILES 1
#endif
#ifndef CLUSTER  // blocks that share row tiles, and read each other's sums
#define CLUSTER 1
#endif

namespace nested {

// A sum below 2^22 added to this integer is the mantissa of a float that is that much above 12582912.
constexpr int kMagic = 0x4B400000;
constexpr float kMagicFloat = 12582912.f;

__device__ inline u32 load(const u32* from) {
    u32 v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(from));
    return v;
}
__device__ inline uint2 load(const uint2* from) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
    return v;
}
__device__ inline uint4 load(const uint4* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

// 128 * d1 + d0 as a float, rounded once.
__device__ inline float joined(int d1, int d0) {
    return __fmaf_rn(128.f, __int_as_float(d1) - kMagicFloat, __int_as_float(d0) - kMagicFloat);
}

// Codes of a tile, as far as BITS needs them.
struct Codes {
    uint4 c2, c6, c8;
    uint2 c3, c4;

    __device__ void request(const Streams& streams, size_t place) {
        c2 = load(streams.c2 + place);
        if (kHasC3) c3 = load(streams.c3 + place);
        if (kHasC4) c4 = load(streams.c4 + place);
        if (kHasC6) c6 = load(streams.c6 + place);
        if (kHasC8) c8 = load(streams.c8 + place);
    }
};

__device__ inline u32 moved(u32 v, int right) { return right >= 0 ? v >> right : v << -right; }
__device__ inline u32 with_bits(u32 v, u32 mask, u32 others) {  // (v & mask) | others
    u32 result;
    asm("lop3.b32 %0,%1,%2,%3,0xEA;" : "=r"(result) : "r"(v), "r"(mask), "r"(others));
    return result;
}

// Bits kFrom up to kTo of the codes, counted from their top, as integers; both are widths, or 0, on one side of the nibbles' border.
template <int kFrom, int kTo>
__device__ inline void field_codes(const Codes& tile, int step, u32* codes) {
    constexpr bool kHas[] = {kFrom < 2, kFrom < 3 && kTo > 2, kFrom < 4 && kTo > 3, kFrom == 4 && kTo > 4, kTo > 6};  // streams
    static_assert(kTo <= 4 || kFrom >= 4, "a field has one scale");
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int bit = 4 * (step % 2) + j;
        const auto add = [&](bool is_first, u32 stream, int at, int below, u32 mask) {  // `below`: bits that follow the stream's
            const u32 bits = moved(stream, at - below);
            codes[j] = is_first ? bits & (mask << below) : with_bits(bits, mask << below, codes[j]);
        };
        if (kHas[0]) add(true, word(tile.c2, step), 2 * j, kTo - 2, 0x03030303u);
        if (kHas[1]) add(kFrom == 2, word(tile.c3, step / 2), bit, kTo - 3, 0x01010101u);
        if (kHas[2]) add(kFrom == 3, word(tile.c4, step / 2), bit, kTo - 4, 0x01010101u);
        if (kHas[3]) add(true, word(tile.c6, step), 2 * j, kTo - 6, 0x03030303u);
        if (kHas[4]) add(kFrom == 6, word(tile.c8, step), 2 * j, kTo - 8, 0x03030303u);
    }
}
// The bits of either nibble that BITS has.
__device__ inline void high_codes(const Codes& tile, int step, u32* codes) { field_codes<0, kHasC4 ? 4 : BITS>(tile, step, codes); }
__device__ inline void low_codes(const Codes& tile, int step, u32* codes) {
    if constexpr (kHasLow) field_codes<4, BITS>(tile, step, codes);
}

template <bool kFirst>
__device__ inline void multiply(int* sum, const u32* codes, uint2 x) {
    if (kFirst) {
        asm volatile(
            "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%10,%10,%10};"
            : "=r"(sum[0]), "=r"(sum[1]), "=r"(sum[2]), "=r"(sum[3])
            : "r"(codes[0]), "r"(codes[1]), "r"(codes[2]), "r"(codes[3]), "r"(x.x), "r"(x.y), "r"(kMagic));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
            : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
            : "r"(codes[0]), "r"(codes[1]), "r"(codes[2]), "r"(codes[3]), "r"(x.x), "r"(x.y));
    }
}

__device__ inline void store(Value* y, const float* bias, int token, int row, int tokens, int rows, float value) {
    if (token < tokens && row < rows)
        y[(size_t)token * rows + row] = to_value(bias == nullptr ? value : value + bias[row]);
}

// Shared memory of a block of the cluster, by its rank.
__device__ inline u32 shared_of(const float* own, int rank) {
    u32 address = (u32)__cvta_generic_to_shared(own);
#if CLUSTER > 1
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
#endif
    return address;
}
__device__ inline float load_shared(u32 address) {
    float value;
#if CLUSTER > 1
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
#else
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
#endif
    return value;
}
__device__ inline void wait_for_all() {
#if CLUSTER > 1
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

}  // namespace nested
