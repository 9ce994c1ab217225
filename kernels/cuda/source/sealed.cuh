// Sealed pages as `kernels/page_layout.py` lays them out: records of codes of ordered pairs, and the tables that codes point to; or
// of evenly spaced levels, whose codes are numbers.
#pragma once
#include "attention.cuh"
#include "butterfly.cuh"

#ifndef KEY_BITS  // of the code of an ordered pair of neighbours: 4, 6 or 8; or of two with evenly spaced levels: 16
#define KEY_BITS 8
#endif
#ifndef VALUE_BITS
#define VALUE_BITS 8
#endif
#ifndef FIRST_EXACT  // tokens of a sequence that are kept as they are, at most 16
#define FIRST_EXACT 16
#endif
#ifndef SAME_TABLE  // of keys and values
#define SAME_TABLE (KEY_BITS == VALUE_BITS)
#endif

namespace nested {

constexpr int kPairs = HEAD_DIM / 2;

// Places in a record, in bytes.
template <int kBits, bool kHasMean>
struct Record {
    static constexpr bool kIsUniform = false;
    static constexpr int kTokenBytes = kPairs * kBits / 8;
    static constexpr int kNorms = kPage * kTokenBytes, kMean = kNorms + kPage, kNormRange = kMean + (kHasMean ? HEAD_DIM : 0);
    static constexpr int kMeanRange = kNormRange + 4, kBytes = (kNormRange + (kHasMean ? 8 : 4) + 15) / 16 * 16;
};
// Of evenly spaced levels: keys have a minimum and a step for each channel, values for each token.
template <bool kIsKeys>
struct Record<16, kIsKeys> {
    static constexpr bool kIsUniform = true;
    static constexpr int kTokenBytes = HEAD_DIM, kRanges = kIsKeys ? HEAD_DIM : kPage;
    static constexpr int kMinima = kPage * kTokenBytes, kSteps = kMinima + kRanges, kMinimumRange = kSteps + kRanges;
    static constexpr int kStepRange = kMinimumRange + 4, kBytes = (kStepRange + 4 + 15) / 16 * 16;
};
using KeyRecord = Record<KEY_BITS, true>;
using ValueRecord = Record<VALUE_BITS, false>;

// Tables lie side by side in shared memory, in rows of 256 bytes: a code is the upper byte of its entry's address, and the
// lower one belongs to the lane, which has a copy of its own (or one with another lane, where an entry is eight bytes), so that
// no two lanes of a load meet in a bank. Rows of 4-bit codes are found by the byte: of two codes, the first lies in the lower half.
__device__ constexpr int table_rows(int bits) { return bits == 16 ? 0 : bits == 6 ? 64 : 256; }
constexpr int kTableRows = table_rows(KEY_BITS) > table_rows(VALUE_BITS) ? table_rows(KEY_BITS) : table_rows(VALUE_BITS);
constexpr int kTableBytes = kTableRows * 256;

template <int kBits, bool kIsSecond>
struct Table {
    u32 base, place;

    __device__ explicit Table(const u32* tables) {
        const u32 lane = threadIdx.x & 31;
        base = (u32)__cvta_generic_to_shared(tables);
        place = (kBits == 4 ? lane % 16 * 8 : lane * 4) + (kIsSecond ? 128 : 0);
    }
    // By all threads of a block, several of `entries`, [2^kBits] pairs of half-precision numbers, at a time.
    template <int kThreads>
    static __device__ void fill(u32* tables, const u32* entries) {
        constexpr int kChunks = table_rows(kBits) * 8, kTogether = 8;
        for (int first = threadIdx.x; first < kChunks; first += kTogether * kThreads) {
            u32 even[kTogether], odd[kTogether];
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
                const int row = (first + i * kThreads) / 8;
                if (first + i * kThreads >= kChunks) continue;
                even[i] = entries[kBits == 4 ? row & 15 : row];
                odd[i] = kBits == 4 ? entries[row >> 4] : even[i];
            }
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
                const int chunk = first + i * kThreads;
                if (chunk >= kChunks) continue;
                reinterpret_cast<uint4*>(tables)[chunk / 8 * 16 + (kIsSecond ? 8 : 0) + chunk % 8] = make_uint4(even[i], odd[i], even[i], odd[i]);
            }
        }
    }
    // Of the code, or the two, in byte `index` of a word.
    __device__ u32 one(u32 word, int index) const {
        u32 pair;
        asm("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(base + __byte_perm(word, place, 0x5504 | index << 4)));
        return pair;
    }
    __device__ uint2 two(u32 word, int index) const {
        uint2 pairs;
        asm("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(pairs.x), "=r"(pairs.y) : "r"(base + __byte_perm(word, place, 0x5504 | index << 4)));
        return pairs;
    }
};
template <bool kIsSecond>
struct Table<16, kIsSecond> {  // evenly spaced levels need none
    __device__ explicit Table(const u32*) {}
    template <int kThreads>
    static __device__ void fill(u32*, const u32*) {}
};
using KeyTable = Table<KEY_BITS, false>;
using ValueTable = Table<VALUE_BITS, !SAME_TABLE>;

// kBytes bytes at a multiple of as many, up to 16, as words. kCopied: to shared memory.
template <int kBytes, bool kCopied = false>
__device__ inline void read_bytes(const u8* from, u32 (&words)[(kBytes + 3) / 4]) {
    if constexpr (kCopied && kBytes % 16 == 0) {
#pragma unroll
        for (int i = 0; i < kBytes / 16; ++i) {
            const uint4 v = reinterpret_cast<const uint4*>(from)[i];
            words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
        }
    } else if constexpr (kCopied && kBytes == 8) {
        const uint2 v = *reinterpret_cast<const uint2*>(from);
        words[0] = v.x, words[1] = v.y;
    } else if constexpr (kCopied && kBytes == 4) {
        words[0] = *reinterpret_cast<const u32*>(from);
    } else if constexpr (kBytes % 16 == 0) {
#pragma unroll
        for (int i = 0; i < kBytes / 16; ++i) {
            const uint4 v = load_operand(from + 16 * i);
            words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
        }
    } else if constexpr (kBytes == 8) {
        asm volatile("ld.global.v2.u32 {%0,%1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(from));
    } else if constexpr (kBytes == 4) {
        asm volatile("ld.global.u32 %0, [%1];" : "=r"(words[0]) : "l"(from));
    } else if constexpr (kBytes == 2) {
        words[0] = *reinterpret_cast<const unsigned short*>(from);
    } else {
        static_assert(kBytes == 1, "a power of two");
        words[0] = *from;
    }
}

// The first or second two of four bytes as half-precision numbers, 1024 more each.
__device__ inline u32 above_1024(u32 bytes, int half) { return __byte_perm(bytes, 0x64646464, half == 0 ? 0x4140 : 0x4342); }

// Codes of kCount neighbouring pairs of a token, read and then looked up; evenly spaced levels as numbers above 1024.
template <int kBits, int kCount>
struct Codes {
    static constexpr int kHighBits = kBits == 6 ? 4 : kBits;
    static constexpr int kHighBytes = kCount * kHighBits / 8, kLowBytes = kBits == 6 ? kCount / 4 : 1;
    u32 high[(kHighBytes + 3) / 4], low[(kLowBytes + 3) / 4];

    // `token` is where the token's codes lie, `first` the first pair, a multiple of kCount.
    template <bool kCopied>
    __device__ void read(const u8* token, int first) {
        read_bytes<kHighBytes, kCopied>(token + first * kHighBits / 8, high);
        if constexpr (kBits == 6) read_bytes<kLowBytes, kCopied>(token + kPairs / 2 + first / 4, low);  // a plane of the low two bits
    }
    template <bool kIsSecond>
    __device__ void look_up(const Table<kBits, kIsSecond>& table, u32 (&pairs)[kCount]) const {
        if constexpr (kBits == 16) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) pairs[i] = above_1024(high[i / 2], i % 2);
        } else if constexpr (kBits == 8) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) pairs[i] = table.one(high[i / 4], i % 4);
        } else if constexpr (kBits == 4) {
#pragma unroll
            for (int i = 0; i < kCount / 2; ++i) {
                const uint2 both = table.two(high[i / 4], i % 4);
                pairs[2 * i] = both.x, pairs[2 * i + 1] = both.y;
            }
        } else {
            constexpr int kGroup = kCount < 8 ? kCount : 8;  // codes whose high bits are in one word
            u32 crumbs[4];                                   // of every fourth code of sixteen, a byte each
#pragma unroll
            for (int first = 0; first < kCount; first += kGroup) {
                if (first % 16 == 0)
#pragma unroll
                    for (int k = 0; k < 4; ++k) crumbs[k] = low[first / 16] >> (2 * k) & 0x03030303;
                const u32 choice = first % 16 ? 0x7362 : 0x5140, word = high[first / 8];
                const u32 even = (word & 0x0F0F0F0F) << 2 | __byte_perm(crumbs[0], crumbs[2], choice);
                const u32 odd = (word >> 4 & 0x0F0F0F0F) << 2 | __byte_perm(crumbs[1], crumbs[3], choice);
#pragma unroll
                for (int i = 0; i < kGroup; ++i) pairs[first + i] = table.one(i % 2 ? odd : even, i / 2);
            }
        }
    }
};

// A norm of a page, from its code: log2 of the least but zero, and the step.
__device__ inline float norm_of(u32 code, float2 range) {
    return code == 0 ? 0.f : power_of_two(__fmaf_rn(range.y, (float)((int)code - 1), range.x));
}
__device__ inline float2 range_at(const u8* place) { return __half22float2(*reinterpret_cast<const __half2*>(place)); }

// The inverse of the pages' rotation but for its signs: lanes whose numbers differ in bits from kFirst on have neighbouring
// numbers of one vector, kLocal each.
template <int kLocal, int kFirst>
__device__ inline void unrotate(float (&x)[kLocal]) {
    butterfly_of_numbers(x);
    butterfly_of_lanes<kFirst>(x);
}

}  // namespace nested
