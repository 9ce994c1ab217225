// Sealed pages as `kernels/page_layout.py` lays them out: records of codes of ordered pairs, and the tables that codes point to.
//
// A table has a copy for each lane (or for two lanes, where an entry is eight bytes), so that no two lanes of a load that look
// up different codes meet in a bank.
#pragma once
#include "attention.cuh"

#ifndef KEY_BITS  // of the code of a pair of neighbours: 4, 6 or 8
#define KEY_BITS 8
#endif
#ifndef VALUE_BITS
#define VALUE_BITS 8
#endif
#ifndef FIRST_EXACT  // tokens of a sequence that are kept as they are, at most 16
#define FIRST_EXACT 16
#endif

namespace nested {

constexpr int kPairs = HEAD_DIM / 2;

// Places in a record, in bytes.
template <int kBits, bool kHasMean>
struct Record {
    static constexpr int kTokenBytes = kPairs * kBits / 8;
    static constexpr int kNorms = kPage * kTokenBytes, kMean = kNorms + kPage, kNormRange = kMean + (kHasMean ? HEAD_DIM : 0);
    static constexpr int kMeanRange = kNormRange + 4, kBytes = (kNormRange + (kHasMean ? 8 : 4) + 15) / 16 * 16;
};
using KeyRecord = Record<KEY_BITS, true>;
using ValueRecord = Record<VALUE_BITS, false>;

// Lookups of kBits-bit codes; `entries` [2^kBits] pairs of half-precision numbers.
template <int kBits>
struct Table {
    static constexpr int kEntries = 1 << kBits, kWords = kBits == 4 ? 256 * 2 * 16 : kEntries * 32;
    const u32* words;

    __device__ static void fill(u32* words, const u32* entries) {
        for (int index = threadIdx.x; index < kWords; index += blockDim.x) {
            if (kBits == 4) {  // by the byte: of two codes, the first lies in the lower half
                const int byte = index / 32;
                words[index] = entries[index % 2 ? byte >> 4 : byte & 15];
            } else {
                words[index] = entries[index / 32];
            }
        }
    }
    __device__ u32 one(u32 code) const { return words[code * 32 + (threadIdx.x & 31)]; }
    __device__ uint2 two(u32 byte) const { return reinterpret_cast<const uint2*>(words)[byte * 16 + (threadIdx.x & 15)]; }
};

// kBytes bytes at a multiple of as many, up to 16, as words.
template <int kBytes>
__device__ inline void read_bytes(const u8* from, u32 (&words)[(kBytes + 3) / 4]) {
    if constexpr (kBytes % 16 == 0) {
#pragma unroll
        for (int i = 0; i < kBytes / 16; ++i) {
            const uint4 v = load_operand(from + 16 * i);
            words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
        }
    } else if constexpr (kBytes == 8) {
        const uint2 v = *reinterpret_cast<const uint2*>(from);
        words[0] = v.x, words[1] = v.y;
    } else if constexpr (kBytes == 4) {
        words[0] = *reinterpret_cast<const u32*>(from);
    } else if constexpr (kBytes == 2) {
        words[0] = *reinterpret_cast<const unsigned short*>(from);
    } else {
        static_assert(kBytes == 1, "a power of two");
        words[0] = *from;
    }
}
template <int kCount>
__device__ inline u32 byte_of(const u32 (&words)[kCount], int index) { return words[index / 4] >> (8 * (index % 4)) & 255u; }

// kCount neighbouring pairs of the token whose codes lie at `token`, from pair `first` on, a multiple of kCount.
template <int kBits, int kCount>
__device__ inline void look_up(const Table<kBits>& table, const u8* token, int first, u32 (&pairs)[kCount]) {
    if constexpr (kBits == 8) {
        u32 words[kCount / 4];
        read_bytes<kCount>(token + first, words);
#pragma unroll
        for (int i = 0; i < kCount; ++i) pairs[i] = table.one(byte_of(words, i));
    } else {
        u32 words[(kCount / 2 + 3) / 4];
        read_bytes<kCount / 2>(token + first / 2, words);
        if constexpr (kBits == 4) {
#pragma unroll
            for (int i = 0; i < kCount / 2; ++i) {
                const uint2 both = table.two(byte_of(words, i));
                pairs[2 * i] = both.x;
                pairs[2 * i + 1] = both.y;
            }
        } else {  // a plane of the high four bits, then one of the low two
            u32 below[(kCount / 4 + 3) / 4];
            read_bytes<kCount / 4>(token + kPairs / 2 + first / 4, below);
#pragma unroll
            for (int i = 0; i < kCount; ++i)
                pairs[i] = table.one((words[i / 8] >> (4 * (i % 8)) & 15u) << 2 | (below[i / 16] >> (2 * (i % 16)) & 3u));
        }
    }
}

// A norm of a page, from its code: log2 of the least but zero, and the step.
__device__ inline float norm_of(u32 code, float2 range) {
    return code == 0 ? 0.f : power_of_two(__fmaf_rn(range.y, (float)((int)code - 1), range.x));
}
__device__ inline float2 range_at(const u8* place) { return __half22float2(*reinterpret_cast<const __half2*>(place)); }

}  // namespace nested
