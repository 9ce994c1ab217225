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

static_assert(GROUP * 240LL * 127 * 129 < 1LL << 31, "sums of a group, of the largest bytes and both digits, are integers");

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

// As a float, rounded once.
__device__ inline float joined(int d1, int d0) { return __int2float_rn(128 * d1 + d0); }

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
__device__ inline u32 selected(u32 a, u32 b, u32 mask) {  // (a & mask) | (b & ~mask)
    u32 result;
    asm("lop3.b32 %0,%1,%2,%3,0xE4;" : "=r"(result) : "r"(a), "r"(b), "r"(mask));
    return result;
}

// Nibbles of the codes of a step's first or second 16 columns: in each byte the lower one of row g, the upper one of row g + 8. What
// a width of fewer than 4 bits has of them are their upper bits; `prefix_mask` leaves those alone. `kernels/cuda/fragments.py` says
// where streams have their bits.
__device__ constexpr u32 prefix_mask(int bits) { return 0x0F0F0F0Fu & 0x01010101u * (0xFu << (4 - bits)); }
__device__ inline u32 high_nibbles(const Codes& tile, int step, int columns) {
    const u32 two = moved(word(tile.c2, step), -2 * columns);
    if (!kHasC3) return two;
    const u32 third = moved(word(tile.c3, step / 2), -columns);
    const u32 both = kHasC4 ? selected(third, moved(word(tile.c4, step / 2), columns), 0xAAAAAAAAu) : third;  // of two steps
    return selected(two, moved(both, 2 * (step % 2)), 0xCCCCCCCCu);
}
__device__ inline u32 low_nibbles(const Codes& tile, int step, int columns) {
    const u32 two = moved(word(tile.c6, step), -2 * columns);
    return kHasC8 ? selected(two, moved(word(tile.c8, step), 2 * columns), 0xCCCCCCCCu) : two;
}

constexpr int kHighBits = kHasC4 ? 4 : BITS, kLowBits = kHasLow ? BITS - 4 : 0;

// As the bytes of an A operand, register after register: codes of so many bits times 2^(4 - bits), those of row g + 8 by 16 as well.
__device__ inline void in_place(u32 nibbles, int bits, u32* registers) {
    registers[0] = nibbles & prefix_mask(bits);
    registers[1] = nibbles & prefix_mask(bits) << 4;
}
__device__ inline void high_codes(const Codes& tile, int step, u32* codes) {
#pragma unroll
    for (int columns = 0; columns < 2; ++columns) in_place(high_nibbles(tile, step, columns), kHighBits, codes + 2 * columns);
}
__device__ inline void low_codes(const Codes& tile, int step, u32* codes) {
#pragma unroll
    for (int columns = 0; columns < 2; ++columns) in_place(low_nibbles(tile, step, columns), kLowBits, codes + 2 * columns);
}
// What makes up for that, of row g or g + 8.
__device__ constexpr float place_scale(int bits, int half) { return (half == 0 ? 1.f : 0.0625f) / (1 << (4 - bits)); }

// A step's half of what a lane holds of two steps' digits.
__device__ inline uint2 of_step(const uint4& digits, int step) {
    return step % 2 == 0 ? make_uint2(digits.x, digits.y) : make_uint2(digits.z, digits.w);
}

template <bool kFirst>
__device__ inline void multiply(int* sum, const u32* codes, uint2 x) {
    if (kFirst) {
        asm volatile(
            "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%10,%10,%10};"
            : "=r"(sum[0]), "=r"(sum[1]), "=r"(sum[2]), "=r"(sum[3])
            : "r"(codes[0]), "r"(codes[1]), "r"(codes[2]), "r"(codes[3]), "r"(x.x), "r"(x.y), "r"(0));
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
