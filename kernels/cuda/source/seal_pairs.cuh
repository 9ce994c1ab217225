// A page encoded as ordered pairs.
//
// A quad of lanes has a token, each lane neighbouring pairs of it, so that a lane's codes are whole words of the record. For each
// pair all entries of the table are compared by their products: |v - e| is least where v.e - |e|^2/2 is largest. Of a group of
// entries only the largest product is kept, and which group has the largest of all; the entry is found among those of that group
// afterwards.
#pragma once
#include "seal_levels.cuh"

namespace nested {

constexpr int kCopies = 8;                                          // of a point: eight lanes load 16 bytes each at a time
constexpr int kQuadPairs = kPairs / 4;                              // of a token, for each lane of a quad
constexpr int kTogether = kQuadPairs < 16 ? kQuadPairs : 16;        // pairs of a lane that are compared at a time
constexpr int kRounds = kQuadPairs / kTogether;
constexpr int kParts = kSealThreads / kPairs, kPartTokens = kPage / kParts;  // of a page, whose sums are added up

// Points of the plane, and -|e|^2/2 of each, kCopies times: no two of the lanes that load together meet in a bank.
template <int kBits, int kClusters>
struct Codebook {
    static constexpr bool kIsTree = kClusters > 1;
    static constexpr int kEntries = 1 << (kBits - 1), kPoints = kEntries + (kIsTree ? kClusters : 0);
    static constexpr int kMembers = kIsTree ? kEntries / kClusters : 8, kGroups = kEntries / kMembers;
    static constexpr int kCompared = kIsTree ? 1 : kMembers;  // points of a group: its cluster alone, or all entries
    float4* points;                                           // entries, then clusters

    __device__ void fill(const float2* entries, const float2* clusters) const {
        for (int index = threadIdx.x; index < kPoints * kCopies; index += kSealThreads) {
            const int point = index / kCopies;
            const float2 e = point < kEntries ? entries[point] : clusters[point - kEntries];
            points[index] = make_float4(e.x, e.y, -0.5f * __fmaf_rn(e.x, e.x, __fmul_rn(e.y, e.y)), 0.f);
        }
    }
    __device__ float4 at(int point) const { return points[point * kCopies + threadIdx.x % kCopies]; }
    __device__ static float product(const float4& point, const float2& pair) {
        return __fmaf_rn(point.x, pair.x, __fmaf_rn(point.y, pair.y, point.z));
    }
    // The nearest entry of each ordered pair, the first of equals.
    __device__ void find(const float2 (&pairs)[kTogether], int (&found)[kTogether]) const {
        float largest[kTogether];
#pragma unroll
        for (int p = 0; p < kTogether; ++p) {
            largest[p] = -kHuge;
            found[p] = 0;
        }
#pragma unroll 1
        for (int group = 0; kGroups > 1 && group < kGroups; ++group) {
            float4 compared[kCompared];
#pragma unroll
            for (int i = 0; i < kCompared; ++i) compared[i] = at(kIsTree ? kEntries + group : group * kMembers + i);
#pragma unroll
            for (int p = 0; p < kTogether; ++p) {
                float most = product(compared[0], pairs[p]);
#pragma unroll
                for (int i = 1; i < kCompared; ++i) most = fmaxf(most, product(compared[i], pairs[p]));
                if (most > largest[p]) {
                    largest[p] = most;
                    found[p] = group;
                }
            }
        }
#pragma unroll
        for (int p = 0; p < kTogether; ++p) {
            const int first = found[p] * kMembers;
            float most = -kHuge;
            found[p] = first;
#pragma unroll
            for (int i = 0; i < kMembers; ++i) {
                const float of_entry = product(at(first + i), pairs[p]);
                if (of_entry > most) {
                    most = of_entry;
                    found[p] = first + i;
                }
            }
        }
    }
};
// Neighbouring pairs, less the mean.
template <bool kHasMean>
__device__ inline void read_pairs(const __nv_bfloat16* from, const float* mean, bool is_finite, float2 (&pairs)[kTogether]) {
#pragma unroll
    for (int i = 0; i < kTogether / 4; ++i) {
        const uint4 loaded = load_operand(from + 8 * i);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const u32 both = word(loaded, j);
            float2& pair = pairs[4 * i + j];
            pair = is_finite ? __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&both)) : make_float2(1.f, 1.f);
            if (kHasMean) {
                pair.x -= mean[2 * (4 * i + j)];
                pair.y -= mean[2 * (4 * i + j) + 1];
            }
        }
    }
}

// A plane of kWidth bits of each code, which has kBelow bits below them.
template <int kWidth, int kBelow>
__device__ inline void store_plane(const int (&codes)[kTogether], u8* to) {
    constexpr int kBytes = kTogether * kWidth / 8, kWords = (kBytes + 3) / 4;
    u32 words[kWords] = {};
#pragma unroll
    for (int p = 0; p < kTogether; ++p)
        words[p * kWidth / 32] |= ((u32)codes[p] >> kBelow & ((1u << kWidth) - 1)) << (p * kWidth % 32);
    if constexpr (kBytes == 16) {
        *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    } else if constexpr (kBytes == 8) {
        *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    } else if constexpr (kBytes == 4) {
        *reinterpret_cast<u32*>(to) = words[0];
    } else {
        static_assert(kBytes == 2, "eight codes of two bits are the fewest");
        *reinterpret_cast<unsigned short*>(to) = (unsigned short)words[0];
    }
}
// Neighbouring codes of a token, from pair `first` on.
template <int kBits>
__device__ inline void store_codes(const int (&codes)[kTogether], int first, u8* token) {
    if constexpr (kBits == 8) {
        store_plane<8, 0>(codes, token + first);
    } else {
        store_plane<4, kBits - 4>(codes, token + first / 2);
        if constexpr (kBits == 6) store_plane<2, 0>(codes, token + kPairs / 2 + first / 4);
    }
}

// A block's part, of keys (kHasMean) or values.
template <int kBits, int kClusters, bool kHasMean>
struct PageSealer {
    using Place = Record<kBits, kHasMean>;
    using Points = Codebook<kBits, kClusters>;
    struct Workspace {
        float4 points[Points::kPoints * kCopies];
        float sums[kParts][HEAD_DIM];
        float mean[HEAD_DIM];  // as it is read back
        float norms[kPage];
    };

    // Before anything is waited for.
    static __device__ void prepare(Workspace& workspace, const float2* entries, const float2* clusters) {
        Points{workspace.points}.fill(entries, clusters);
    }

    // A warp's part: the page's mean, from the sums of its parts.
    static __device__ void store_mean(Workspace& workspace, bool is_finite, u8* record) {
        constexpr int kChannels = HEAD_DIM / 32;
        const int lane = threadIdx.x & 31;
        float mean[kChannels];
#pragma unroll
        for (int i = 0; i < kChannels; ++i) {
            float sum = 0.f;
#pragma unroll
            for (int part = 0; part < kParts; ++part) sum += workspace.sums[part][lane + 32 * i];
            mean[i] = sum / kPage;
        }
        store_linear(mean, is_finite, record + Place::kMean, record + Place::kMeanRange);
#pragma unroll
        for (int i = 0; i < kChannels; ++i) workspace.mean[lane + 32 * i] = mean[i];
    }

    // The page `rows` [kPage, HEAD_DIM] to its record.
    static __device__ void seal(const __nv_bfloat16* rows, Workspace& workspace, u8* record) {
        const Points codebook{workspace.points};
        const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;

        const int column = threadIdx.x % kPairs, part = threadIdx.x / kPairs;
        float2 sum = make_float2(0.f, 0.f);
        float zeros = 0.f;
#pragma unroll 8
        for (int token = part * kPartTokens; token < (part + 1) * kPartTokens; ++token) {
            const float2 both = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162*>(rows)[token * kPairs + column]);
            sum.x += both.x;
            sum.y += both.y;
            zeros = __fmaf_rn(both.x, 0.f, __fmaf_rn(both.y, 0.f, zeros));
        }
        // If a number is not finite, all are taken to be 1, whose codes make not-a-number of ranges that are none. From this
        // barrier on the codebook is complete.
        const bool is_finite = __syncthreads_or(!(zeros == 0.f)) == 0;
        if constexpr (kHasMean) {
            workspace.sums[part][2 * column] = is_finite ? sum.x : kPartTokens;
            workspace.sums[part][2 * column + 1] = is_finite ? sum.y : kPartTokens;
            __syncthreads();
            if (warp == 0) store_mean(workspace, is_finite, record);
            __syncthreads();
        }

        const int token = warp * 8 + lane / 4, first = lane % 4 * kQuadPairs;
        const auto read = [&](int round, float2(&pairs)[kTogether]) {
            const int at = 2 * (first + round * kTogether);
            read_pairs<kHasMean>(rows + token * HEAD_DIM + at, workspace.mean + at, is_finite, pairs);
        };
        float2 pairs[kTogether];
        float squares = 0.f;
#pragma unroll
        for (int round = 0; round < kRounds; ++round) {
            read(round, pairs);
#pragma unroll
            for (int p = 0; p < kTogether; ++p) squares = __fmaf_rn(pairs[p].x, pairs[p].x, __fmaf_rn(pairs[p].y, pairs[p].y, squares));
        }
        const float size = sqrtf(of_quad_sum(squares) / HEAD_DIM), divisor = size > 0.f ? size : 1.f, inverse = 1.f / divisor;
        float products = 0.f, levels = 0.f;
#pragma unroll 1
        for (int round = 0; round < kRounds; ++round) {
            if (kRounds > 1) read(round, pairs);
            u32 exchanged = 0;  // a bit a pair
#pragma unroll
            for (int p = 0; p < kTogether; ++p) {
                const float a = pairs[p].x * inverse, b = pairs[p].y * inverse;
                exchanged |= (a < b ? 1u : 0u) << p;
                pairs[p] = make_float2(fmaxf(a, b), fminf(a, b));
            }
            int codes[kTogether];
            codebook.find(pairs, codes);
#pragma unroll
            for (int p = 0; p < kTogether; ++p) {
                const float4 entry = codebook.at(codes[p]);
                products = __fmaf_rn(entry.x, pairs[p].x, __fmaf_rn(entry.y, pairs[p].y, products));
                levels = __fmaf_rn(entry.x, entry.x, __fmaf_rn(entry.y, entry.y, levels));
                codes[p] |= (exchanged >> p & 1u) << (kBits - 1);
            }
            store_codes<kBits>(codes, first + round * kTogether, record + token * Place::kTokenBytes);
        }
        const float norm = divisor * __fdiv_rn(of_quad_sum(products), of_quad_sum(levels));
        if (lane % 4 == 0) workspace.norms[token] = norm > 0.f ? norm : 0.f;
        __syncthreads();
        if (warp == 0) {
            float norms[2] = {workspace.norms[lane], workspace.norms[lane + 32]};
            store_log(norms, is_finite, record + Place::kNorms, record + Place::kNormRange);
            store_padding<Place::kNormRange + (kHasMean ? 8 : 4), Place::kBytes>(record);
        }
    }
};

}  // namespace nested
