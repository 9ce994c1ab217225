// y = x W^T (+ bias) for many tokens on Hopper: nested codes at one width times fixed point activations.
//
// A warpgroup owns 64 rows, of which each warp unpacks its 16 into the A registers of wgmma.m64nNk32; digits come in tiles of
// 128 columns from a ring in shared memory that copies of the memory engine fill. While the tensor cores add up one group
// of columns, the next group's codes are unpacked. All of a row's arithmetic, and its order, is that of linear_decode.cu.
#include "product.cuh"
#include "wgmma.cuh"

#ifndef WARPGROUPS
#define WARPGROUPS 2
#endif
#ifndef SEGMENTS  // of the columns, summed one by one
#define SEGMENTS 4
#endif
#ifndef DEPTH  // tiles of weights in registers
#define DEPTH 2
#endif
#ifndef STAGES  // of the ring of digits
#define STAGES 4
#endif

using namespace nested;

constexpr int kThreads = WARPGROUPS * 128, kWarps = WARPGROUPS * 4, kBlockRows = WARPGROUPS * 64;
constexpr int kPassTokens = PASS_TILES * kTokens;
constexpr int kDigitBytes = PASS_TILES * 8 * kColumns, kScaleBytes = kPassTokens * 8;  // of a tile, of a group
constexpr int kStageBytes = kDigitBytes + kGroups * kScaleBytes;
constexpr int kSegmentsOfBlock = SEGMENTS / CLUSTER;
constexpr int kPlaces = CLUSTER == 1 ? 1 : kSegmentsOfBlock;  // a block on its own adds its segments up as they come
constexpr int kRowStride = kBlockRows + 8;
constexpr int kNibbles = kHasLow ? 2 : 1, kPhases = kGroups * kNibbles;
static_assert(SEGMENTS % CLUSTER == 0, "a block takes whole segments");
static_assert(DEPTH * kPhases % 2 == 0, "registers of codes take turns");

struct Tile {
    Codes codes;
    Part high[kGroups][2], low[kGroups][2];

    __device__ void request(const Weight& weight, size_t index, int lane) {
        codes.request(weight, index * 32 + lane);
#pragma unroll
        for (int group = 0; group < kGroups; ++group)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const size_t part = (index * kGroups + group) * kRows + half * 8 + lane / 4;
                high[group][half] = load(weight.high + part);
                if (kHasLow) low[group][half] = load(weight.low + part);
            }
    }
};

using Fragments = u32[kStepsOfGroup][4];

// One nibble of one group.
__device__ inline void unpack(const Codes& codes, int phase, Fragments& fragments) {
#pragma unroll
    for (int s = 0; s < kStepsOfGroup; ++s) {
        const int step = phase / kNibbles * kStepsOfGroup + s;
        if (phase % kNibbles == 0)
            high_codes(codes, step, fragments[s]);
        else
            low_codes(codes, step, fragments[s]);
    }
}

__device__ inline void add_group(const int (&sums)[kSums], const Tile& tile, int phase, const float2* scales, float (&out)[PASS_TILES][2]) {
    const int group = phase / kNibbles;
    const bool is_low = phase % kNibbles == 1, is_last = phase % kNibbles == kNibbles - 1;
    float2 part[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) part[half] = part_floats(is_low ? tile.low[group][half] : tile.high[group][half]);
    scales += group * kPassTokens + threadIdx.x % 4;
#pragma unroll
    for (int q = 0; q < PASS_TILES; ++q) {
        const float2 scale = scales[q * kTokens];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            // The integer is below 2^25 and becomes a float as 128 * d1 + d0 does in one fused operation.
            const float product = (float)(128 * sums[4 * q + 2 * half] + sums[4 * q + 2 * half + 1]);
            out[q][half] = __fmaf_rn(part[half].x, product * scale.x, out[q][half]);
            if (is_last) out[q][half] = __fmaf_rn(part[half].y, scale.y, out[q][half]);
        }
    }
}

// A grid of (blocks of a cluster, passes of PASS_TILES n-tiles, groups of rows); digits as digits.cuh says for such passes.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
nested_linear_batch(Weight weight, const u8* digits, const float2* scales, const float* bias, Value* y, int tokens, int slots,
                    int rows, int row_tiles, int tiles_k) {
    extern __shared__ __align__(128) u8 ring[];  // [stages](digits, scales); then sums [places][tokens][rows]; then barriers
    float* block_sums = reinterpret_cast<float*>(ring + STAGES * kStageBytes);
    const u32 filled = shared_address(block_sums + kPlaces * kPassTokens * kRowStride), emptied = filled + 8 * STAGES;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const size_t row_tile = (size_t)min((int)blockIdx.z * kWarps + warp, row_tiles - 1) * tiles_k;
    const int pass = blockIdx.y;
    const auto border = [&](int segment) { return tiles_k * segment / SEGMENTS; };
    const int first_segment = blockIdx.x * kSegmentsOfBlock;
    const int first = border(first_segment), last = border(first_segment + kSegmentsOfBlock);

    launch_dependents();
    Tile tiles[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d)
        if (first + d < last) tiles[d].request(weight, row_tile + first + d, lane);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            init_barrier(filled + 8 * stage, 1);
            init_barrier(emptied + 8 * stage, kWarps);
        }
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
    }
    __syncthreads();
    wait_for_inputs();

    const auto fill = [&](int k, int stage) {
        const u32 to = shared_address(ring) + stage * kStageBytes, barrier = filled + 8 * stage;
        expect_bytes(barrier, kStageBytes);
        copy_bytes(to, digits + ((size_t)pass * tiles_k + k) * kDigitBytes, kDigitBytes, barrier);
#pragma unroll
        for (int group = 0; group < kGroups; ++group)
            copy_bytes(to + kDigitBytes + group * kScaleBytes, scales + (size_t)(k * kGroups + group) * slots + pass * kPassTokens,
                       kScaleBytes, barrier);
    };
    if (threadIdx.x == 0)
        for (int stage = 0; stage < STAGES; ++stage)
            if (first + stage < last) fill(first + stage, stage);

    float out[PASS_TILES][2] = {};
    int sums[kSums];
    Fragments fragments[2];
    unpack(tiles[0].codes, 0, fragments[0]);
    int stage = 0, turn = 0, segment = 0, segment_end = border(first_segment + 1);
    for (int k0 = first; k0 < last; k0 += DEPTH) {
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            const int k = k0 + d;
            if (k >= last) break;
            const u8* in_stage = ring + stage * kStageBytes;
            const float2* own_scales = reinterpret_cast<const float2*>(in_stage + kDigitBytes);
            wait(filled + 8 * stage, turn);
#pragma unroll
            for (int phase = 0; phase < kPhases; ++phase) {
                const int own = (d * kPhases + phase) % 2;
                begin_products();
#pragma unroll
                for (int s = 0; s < kStepsOfGroup; ++s) {
                    const auto place = describe_digits(shared_address(in_stage) + 256 * (phase / kNibbles * kStepsOfGroup + s));
                    if (s == 0)
                        multiply_warpgroup<true>(sums, fragments[own][s], place);
                    else
                        multiply_warpgroup<false>(sums, fragments[own][s], place);
                }
                commit_products();
                unpack(tiles[phase + 1 < kPhases ? d : (d + 1) % DEPTH].codes, (phase + 1) % kPhases, fragments[1 - own]);
                wait_for_products(sums);
                add_group(sums, tiles[d], phase, own_scales, out);
            }
            if (lane == 0) arrive(emptied + 8 * stage);
            if (k + DEPTH < last) tiles[d].request(weight, row_tile + k + DEPTH, lane);
            // Warpgroups take turns to fill a stage again, the one before this: by now nobody reads it, or hardly anybody.
            if (k > first && k - 1 + STAGES < last && (k - first) % WARPGROUPS == warp / 4 && threadIdx.x % 128 == 0) {
                const int former = stage == 0 ? STAGES - 1 : stage - 1;
                wait(emptied + 8 * former, stage == 0 ? turn ^ 1 : turn);
                fill(k - 1 + STAGES, former);
            }
            if (++stage == STAGES) stage = 0, turn ^= 1;
            if (k + 1 == segment_end) {
                float* place = block_sums + (size_t)(CLUSTER == 1 ? 0 : segment) * kPassTokens * kRowStride +
                               lane % 4 * kRowStride + warp * kRows + lane / 4;
#pragma unroll
                for (int q = 0; q < PASS_TILES; ++q)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        float& sum = place[q * kTokens * kRowStride + half * 8];
                        sum = CLUSTER > 1 ? out[q][half] : (segment == 0 ? 0.f : sum) + out[q][half];
                        out[q][half] = 0.f;
                    }
                ++segment;
                segment_end = border(first_segment + segment + 1);
            }
        }
    }
    wait_for_all();
    u32 of_block[CLUSTER];
#pragma unroll
    for (int rank = 0; rank < CLUSTER; ++rank) of_block[rank] = shared_of(block_sums, rank);
    for (int index = blockIdx.x * kThreads + threadIdx.x; index < kPassTokens * kBlockRows; index += CLUSTER * kThreads) {
        const int row = index % kBlockRows, token = index / kBlockRows;
        float sum = 0.f;
#pragma unroll
        for (int at = 0; at < CLUSTER * kPlaces; ++at)
            sum += load_shared(of_block[at / kPlaces] + 4 * ((at % kPlaces * kPassTokens + token) * kRowStride + row));
        store(y, bias, pass * kPassTokens + token, (int)blockIdx.z * kBlockRows + row, tokens, rows, sum);
    }
    if (CLUSTER > 1) wait_for_all();  // nobody leaves while others read its sums
}
