// What Hopper's warpgroup products need: the instruction, registers that change hands, and descriptors of shared memory.
#pragma once
#include "copies.cuh"

#ifndef PASS_TILES  // n-tiles of a pass
#define PASS_TILES 16
#endif

namespace nested {

constexpr int kSums = PASS_TILES * 4;  // of a lane: 64 rows of a warpgroup, two digits of each token

// All warps of a warpgroup, to give registers away or to take them.
template <int kRegisters>
__device__ inline void give_registers() {
    if (kRegisters > 0) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters > 0 ? kRegisters : 24));
}
template <int kRegisters>
__device__ inline void take_registers() {
    if (kRegisters > 0) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters > 0 ? kRegisters : 24));
}

// Of a tile of digits, at 32 of its columns: an n-tile's 8 digits of 128 columns lie in the order that 128 bytes are swizzled in.
__device__ inline unsigned long long describe_digits(u32 address) {
    constexpr unsigned long long kNextDigits = 8 * kColumns / 16, kSwizzled128 = 1;
    return ((address & 0x3FFFF) >> 4) | 1ull << 16 | kNextDigits << 32 | kSwizzled128 << 62;
}

__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until no more than kPending commits are under way; `sums` are those of the latest that has ended.
template <int kPending>
__device__ inline void wait_for_products(int (&sums)[kSums]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#pragma unroll
    for (int i = 0; i < kSums; ++i) asm volatile("" : "+r"(sums[i])::"memory");
}

#define SUMS4(i) "+r"(sums[i]), "+r"(sums[i + 1]), "+r"(sums[i + 2]), "+r"(sums[i + 3])
#define SUMS16(i) SUMS4(i), SUMS4(i + 4), SUMS4(i + 8), SUMS4(i + 12)

// sums [+]= 64 rows of codes (a warp's 16 as an A fragment) times the digits that a descriptor tells of, over 32 columns.
template <bool kFirst>
__device__ inline void multiply_warpgroup(int (&sums)[kSums], const u32 (&codes)[4], unsigned long long digits) {
#if PASS_TILES == 16
    asm volatile(
        "{\n.reg .pred adds;\nsetp.ne.b32 adds, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.u8.s8 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"
        "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,"
        "%58,%59,%60,%61,%62,%63},{%64,%65,%66,%67},%68,adds;\n}"
        : SUMS16(0), SUMS16(16), SUMS16(32), SUMS16(48)
        : "r"(codes[0]), "r"(codes[1]), "r"(codes[2]), "r"(codes[3]), "l"(digits), "n"(kFirst ? 0 : 1));
#else
    static_assert(PASS_TILES == 8, "passes have 32 or 64 tokens");
    asm volatile(
        "{\n.reg .pred adds;\nsetp.ne.b32 adds, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.s8 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"
        "%30,%31},{%32,%33,%34,%35},%36,adds;\n}"
        : SUMS16(0), SUMS16(16)
        : "r"(codes[0]), "r"(codes[1]), "r"(codes[2]), "r"(codes[3]), "l"(digits), "n"(kFirst ? 0 : 1));
#endif
}

}  // namespace nested
