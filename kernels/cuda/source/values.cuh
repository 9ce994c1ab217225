// Products of values of a half-precision type: their order in shared memory, codes as numbers, and the instruction.
//
// values: [passes][column tiles][halves of 64 columns][tokens of a pass][64 columns], of which a token's 128 bytes have their
// chunks of 16 in the order 0 ^ token, 1 ^ token, ... Within 32 columns, column 16 h + 4 t + 2 s + e is kept at
// 16 s + 8 h + 2 t + e: a lane's four neighbouring codes then are two pairs of the A operands of two steps of 16.
#pragma once
#include "product.cuh"
#include "wgmma.cuh"

#if VALUE == 1
#define VALUE_NAME "f16"
#else
#define VALUE_NAME "bf16"
#endif

namespace nested {

constexpr int kValueSums = PASS_TILES * 2;  // of a lane: 64 rows of a warpgroup, four tokens an n-tile

#if VALUE == 1
using Pair = __half2;
constexpr u32 kExponents = 0x64646464;  // 1024 + code
constexpr float kAbove = 1024.f;
__device__ inline Pair twice(float value) { return __float2half2_rn(value); }
__device__ inline Pair rounded(float first, float second) { return __floats2half2_rn(first, second); }
#else
using Pair = __nv_bfloat162;
constexpr u32 kExponents = 0x43434343;  // 128 + code
constexpr float kAbove = 128.f;
__device__ inline Pair twice(float value) { return __float2bfloat162_rn(value); }
__device__ inline Pair rounded(float first, float second) { return __floats2bfloat162_rn(first, second); }
#endif
__device__ inline u32 as_bits(Pair value) { return *reinterpret_cast<u32*>(&value); }
__device__ inline Pair fused(Pair a, Pair b, Pair c) { return __hfma2(a, b, c); }

// As `in_place`, but all of them in the lower nibble, for `above`.
__device__ inline void brought_down(u32 nibbles, int bits, u32* registers) {
    registers[0] = nibbles & prefix_mask(bits);
    registers[1] = nibbles >> 4 & prefix_mask(bits);
}
// The first or second two of four codes, each below 128, as numbers: kAbove + code, or counted from `from` - kAbove.
__device__ inline u32 above(u32 codes, int half) { return __byte_perm(codes, kExponents, half == 0 ? 0x4140 : 0x4342); }
__device__ inline Pair counted(u32 codes, int half, Pair from) {
    u32 bits = above(codes, half);
    return __hsub2(*reinterpret_cast<Pair*>(&bits), from);
}

// Where a tile's values of all tokens of a pass lie, and how much later those of 16 columns do, `step` of the tile's eight.
__device__ inline unsigned long long describe_values(u32 tile) {
    constexpr unsigned long long kNextTokens = 8 * 128 / 16, kSwizzled128 = 1;
    return ((tile & 0x3FFFF) >> 4) | 1ull << 16 | kNextTokens << 32 | kSwizzled128 << 62;
}
__device__ constexpr int described_step(int step) { return (step / 4 * (PASS_TILES * kTokens * 128) + step % 4 * 32) / 16; }

// Until no more than the latest commit is under way.
__device__ inline void wait_for_former_values() { asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory"); }
// Until none is; while one is, nothing else may touch its sums.
template <int kTiles = PASS_TILES>
__device__ inline void wait_for_values(float* sums) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

#define VALUES4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define VALUES16(i) VALUES4(i), VALUES4(i + 4), VALUES4(i + 8), VALUES4(i + 12)

// One block each, for the operands of inline assembly are numbered one by one.
// sums [+]= 64 rows of weights (a warp's 16 as an A fragment) times the values that a descriptor tells of, over 16 columns; of so
// many n-tiles, 2 kTiles sums.
template <bool kFirst, int kTiles = PASS_TILES>
__device__ inline void multiply_values(float* sums, const u32 (&weights)[4], unsigned long long values) {
    if constexpr (kTiles == 2)
        asm volatile(
            "{\n.reg .pred adds;\nsetp.ne.b32 adds, %9, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n8k16.f32." VALUE_NAME "." VALUE_NAME " "
            "{%0,%1,%2,%3},"
            "{%4,%5,%6,%7},%8,adds,1,1,0;\n}"
            : VALUES4(0)
            : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(values), "n"(kFirst ? 0 : 1));
    else if constexpr (kTiles == 4)
        asm volatile(
            "{\n.reg .pred adds;\nsetp.ne.b32 adds, %13, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n16k16.f32." VALUE_NAME "." VALUE_NAME " "
            "{%0,%1,%2,%3,%4,%5,%6,%7},"
            "{%8,%9,%10,%11},%12,adds,1,1,0;\n}"
            : VALUES4(0), VALUES4(4)
            : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(values), "n"(kFirst ? 0 : 1));
    else if constexpr (kTiles == 6)
        asm volatile(
            "{\n.reg .pred adds;\nsetp.ne.b32 adds, %17, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n24k16.f32." VALUE_NAME "." VALUE_NAME " "
            "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11},"
            "{%12,%13,%14,%15},%16,adds,1,1,0;\n}"
            : VALUES4(0), VALUES4(4), VALUES4(8)
            : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(values), "n"(kFirst ? 0 : 1));
    else if constexpr (kTiles == 8)
        asm volatile(
            "{\n.reg .pred adds;\nsetp.ne.b32 adds, %21, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n32k16.f32." VALUE_NAME "." VALUE_NAME " "
            "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15},"
            "{%16,%17,%18,%19},%20,adds,1,1,0;\n}"
            : VALUES16(0)
            : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(values), "n"(kFirst ? 0 : 1));
    else if constexpr (kTiles == 12)
        asm volatile(
            "{\n.reg .pred adds;\nsetp.ne.b32 adds, %29, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n48k16.f32." VALUE_NAME "." VALUE_NAME " "
            "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23},"
            "{%24,%25,%26,%27},%28,adds,1,1,0;\n}"
            : VALUES16(0), VALUES4(16), VALUES4(20)
            : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(values), "n"(kFirst ? 0 : 1));
    else if constexpr (kTiles == 16)
        asm volatile(
            "{\n.reg .pred adds;\nsetp.ne.b32 adds, %37, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n64k16.f32." VALUE_NAME "." VALUE_NAME " "
            "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
            "%24,%25,%26,%27,%28,%29,%30,%31},"
            "{%32,%33,%34,%35},%36,adds,1,1,0;\n}"
            : VALUES16(0), VALUES16(16)
            : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(values), "n"(kFirst ? 0 : 1));
    else if constexpr (kTiles == 32)
        asm volatile(
            "{\n.reg .pred adds;\nsetp.ne.b32 adds, %69, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n128k16.f32." VALUE_NAME "." VALUE_NAME " "
            "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
            "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
            "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63},"
            "{%64,%65,%66,%67},%68,adds,1,1,0;\n}"
            : VALUES16(0), VALUES16(16), VALUES16(32), VALUES16(48)
            : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(values), "n"(kFirst ? 0 : 1));
    else
        static_assert(kTiles == 2, "so many tokens are not multiplied at once");
}

}  // namespace nested
