// y = x W^T (+ bias) for many tokens on Hopper: nested codes at one width times fixed point activations.
//
// A warpgroup owns 64 rows, of which each warp unpacks its 16 into the A registers of wgmma.m64nNk32; digits are the B operand,
// in shared memory. One warpgroup more does nothing but keep a ring of tiles filled. Two phases (each a nibble of a group of
// columns) are multiplied at a time: while the second is, the sums of the first become floats and codes of the next are
// unpacked; and warpgroups take turns on the tensor cores. All of a row's arithmetic, and its order, is that of linear_decode.cu.
#include "ring.cuh"

#ifndef SEGMENTS  // of the columns, summed one by one
#define SEGMENTS 4
#endif

using namespace nested;

constexpr int kSegmentsOfBlock = SEGMENTS / CLUSTER;
constexpr int kPlaces = CLUSTER == 1 ? 1 : kSegmentsOfBlock;  // a block on its own adds its segments up as they come
constexpr int kRowStride = kBlockRows + 8;
constexpr int kNibbles = kHasLow ? 2 : 1, kPhases = kGroups * kNibbles;
constexpr int kTogether = kPhases == 1 ? 2 : 1;  // tiles of a turn, so that it has two phases
static_assert(SEGMENTS % CLUSTER == 0, "a block takes whole segments");

// A stage has the scales of its tokens too.
constexpr int kScaleBytes = kPassTokens * 8;
constexpr int kScales = STAGES * kInputBytes, kWeights = kScales + STAGES * kGroups * kScaleBytes;
constexpr int kRingBytes = kWeights + STAGES * kWarps * kTileBytes;

using Fragments = u32[kStepsOfGroup][4];

// One nibble of one group of the tile that lies at `tile`.
__device__ inline void unpack(const u8* tile, int phase, Fragments& fragments) {
    const bool is_low = phase % kNibbles == 1;
    Codes codes;
    read_codes(tile, is_low, codes);
#pragma unroll
    for (int s = 0; s < kStepsOfGroup; ++s) {
        const int step = phase / kNibbles * kStepsOfGroup + s;
        if (is_low)
            low_codes(codes, step, fragments[s]);
        else
            high_codes(codes, step, fragments[s]);
        // Unpacked here and not on the way into a product, where products would wait for one another.
#pragma unroll
        for (int j = 0; j < 4; ++j) asm volatile("" : "+r"(fragments[s][j]));
    }
}

__device__ inline void multiply_phase(int (&sums)[kSums], const Fragments& fragments, u32 digits, int phase) {
    begin_products();
#pragma unroll
    for (int s = 0; s < kStepsOfGroup; ++s) {
        const auto place = describe_digits(digits + 32 * (phase / kNibbles * kStepsOfGroup + s));
        if (s == 0)
            multiply_warpgroup<true>(sums, fragments[s], place);
        else
            multiply_warpgroup<false>(sums, fragments[s], place);
    }
    commit_products();
}

// Warpgroups use the tensor cores one after the other.
__device__ inline void wait_for_turn() {
    if (WARPGROUPS > 1) asm volatile("bar.sync %0, 256;" ::"r"(1 + (int)threadIdx.x / 128) : "memory");
}
__device__ inline void pass_turn() {
    if (WARPGROUPS > 1) asm volatile("bar.arrive %0, 256;" ::"r"(1 + ((int)threadIdx.x / 128 + 1) % WARPGROUPS) : "memory");
}

__device__ inline void add_phase(const int (&sums)[kSums], const u8* tile, int phase, const float2* scales, float (&out)[PASS_TILES][2]) {
    const int group = phase / kNibbles;
    const bool is_low = phase % kNibbles == 1, is_last = phase % kNibbles == kNibbles - 1;
    const Part* parts = reinterpret_cast<const Part*>(tile + kCodeBytes + (is_low ? kPartsBytes : 0));
    float2 part[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        part[half] = part_floats(parts[group * kRows + half * 8 + threadIdx.x % 32 / 4]);
        part[half].x *= place_scale(is_low ? kLowBits : kHighBits, half);
    }
    scales += group * kPassTokens + threadIdx.x % 4;
#pragma unroll
    for (int q = 0; q < PASS_TILES; ++q) {
        const float2 scale = scales[q * kTokens];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            // The integer is below 2^25, times a power of two, and becomes a float as 128 * d1 + d0 does in one fused operation.
            const float product = (float)(128 * sums[4 * q + 2 * half] + sums[4 * q + 2 * half + 1]);
            out[q][half] = __fmaf_rn(part[half].x, product * scale.x, out[q][half]);
            if (is_last) out[q][half] = __fmaf_rn(part[half].y, scale.y, out[q][half]);
        }
    }
}

struct ColumnTile {
    int row_tile, column_tile;

    __device__ bool advance() { return ++column_tile, true; }
};

// A grid of (blocks of a cluster, passes of PASS_TILES n-tiles, groups of rows); digits as digits.cuh says for such passes.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
nested_linear_batch(Weight weight, const u8* digits, const float2* scales, const float* bias, Value* y, int tokens, int slots,
                    int rows, int row_tiles, int tiles_k) {
    extern __shared__ __align__(1024) u8 ring[];  // then sums [places][tokens][rows] and barriers
    float* block_sums = reinterpret_cast<float*>(ring + kRingBytes);
    const u32 filled = shared_address(block_sums + kPlaces * kPassTokens * kRowStride);
    const Barriers barriers = {filled, filled + 8 * STAGES};
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, pass = blockIdx.y;
    const auto border = [&](int segment) { return tiles_k * segment / SEGMENTS; };
    const int first_segment = blockIdx.x * kSegmentsOfBlock, first = border(first_segment);
    const int count = border(first_segment + kSegmentsOfBlock) - first;  // tiles of columns

    launch_dependents();
    barriers.init();
    if (warp >= kWarps) {
        give_registers<kFewRegisters>();
        const auto request_digits = [&](const ColumnTile& tile, int stage) {
            const u32 to = shared_address(ring), barrier = barriers.filled + 8 * stage;
            const int k = tile.column_tile;
            expect_bytes(barrier, kInputBytes + kGroups * kScaleBytes);
            copy_bytes(to + stage * kInputBytes, digits + ((size_t)pass * tiles_k + k) * kInputBytes, kInputBytes, barrier);
#pragma unroll
            for (int group = 0; group < kGroups; ++group)
                copy_bytes(to + kScales + (stage * kGroups + group) * kScaleBytes,
                           scales + (size_t)(k * kGroups + group) * slots + pass * kPassTokens, kScaleBytes, barrier);
        };
        fill_ring(barriers, shared_address(ring) + kWeights, weight, row_tiles, tiles_k, count,
                  ColumnTile{(int)blockIdx.z * kWarps, first}, request_digits);
        // What follows needs more registers than this warpgroup has left.
        wait_for_all();
        if (CLUSTER > 1) wait_for_all();
        return;
    }

    take_registers<kManyRegisters>();
    wait_for_inputs();
    const u8* weights = ring + kWeights + warp * kTileBytes;
    float out[PASS_TILES][2] = {};
    Place place;
    int segment = 0, segment_end = border(first_segment + 1) - first;
    const auto unpack_at = [&](Place at, int phase, Fragments& fragments) {
        unpack(weights + at.stage * kWarps * kTileBytes, phase, fragments);
    };
    const auto multiply_at = [&](int (&sums)[kSums], const Fragments& fragments, Place at, int phase) {
        multiply_phase(sums, fragments, shared_address(ring) + at.stage * kInputBytes, phase);
    };
    const auto add = [&](const int(&sums)[kSums], int phase) {
        const u8* own_scales = ring + kScales + place.stage * kGroups * kScaleBytes;
        add_phase(sums, weights + place.stage * kWarps * kTileBytes, phase, reinterpret_cast<const float2*>(own_scales), out);
    };
    const auto end_tile = [&](int tile) {
        __syncwarp();
        if (lane == 0) arrive(barriers.emptied + 8 * place.stage);
        place.advance();
        if (tile + 1 < segment_end) return;
        float* sums = block_sums + (size_t)(CLUSTER == 1 ? 0 : segment) * kPassTokens * kRowStride + lane % 4 * kRowStride +
                      warp * kRows + lane / 4;
#pragma unroll
        for (int q = 0; q < PASS_TILES; ++q)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float& sum = sums[q * kTokens * kRowStride + half * 8];
                sum = CLUSTER > 1 ? out[q][half] : (segment == 0 ? 0.f : sum) + out[q][half];
                out[q][half] = 0.f;
            }
        ++segment;
        segment_end = border(first_segment + segment + 1) - first;
    };
    // Codes are unpacked before the digits beside them are needed; of tiles that are not there, nothing is awaited.
    const auto await = [&](int tile, Place at) {
        if (tile < count) wait(barriers.filled + 8 * at.stage, at.turn);
    };

    int sums[kSums], later_sums[kSums];
    Fragments fragments, later_fragments;
    await(0, place);
    unpack_at(place, 0, fragments);
    if (kTogether > 1) await(1, place.next());
    unpack_at(kTogether > 1 ? place.next() : place, 1 % kPhases, later_fragments);
    if (warp / 4 == WARPGROUPS - 1) pass_turn();
    for (int tile = 0; tile < count; tile += kTogether) {
#pragma unroll
        for (int phase = 0; phase < kTogether * kPhases; phase += 2) {
            // What follows the last of all phases is one that nobody asks for.
            const bool is_last = phase + 2 >= kTogether * kPhases, has_later = kTogether == 1 || tile + 1 < count;
            const int next = is_last ? 0 : phase + 2;
            wait_for_turn();
            multiply_at(sums, fragments, place, phase);
            multiply_at(later_sums, later_fragments, kTogether > 1 ? place.next() : place, (phase + 1) % kPhases);
            pass_turn();
            wait_for_products<1>(sums);
            add(sums, phase);
            if (kTogether > 1) end_tile(tile);
            if (is_last) await(tile + kTogether, place.next());
            unpack_at(is_last ? place.next() : place, next, fragments);
            wait_for_products<0>(later_sums);
            if (has_later) add(later_sums, (phase + 1) % kPhases);
            if (is_last && has_later) end_tile(tile + kTogether - 1);
            if (kTogether > 1) await(tile + 3, place.next());
            unpack_at(kTogether > 1 ? place.next() : place, (next + 1) % kPhases, later_fragments);
        }
    }
    wait_for_all();
    u32 of_block[CLUSTER];
#pragma unroll
    for (int rank = 0; rank < CLUSTER; ++rank) of_block[rank] = shared_of(block_sums, rank);
    for (int index = blockIdx.x * kBlockRows * 2 + threadIdx.x; index < kPassTokens * kBlockRows; index += CLUSTER * kBlockRows * 2) {
        const int row = index % kBlockRows, token = index / kBlockRows;
        float sum = 0.f;
#pragma unroll
        for (int at = 0; at < CLUSTER * kPlaces; ++at)
            sum += load_shared(of_block[at / kPlaces] + 4 * ((at % kPlaces * kPassTokens + token) * kRowStride + row));
        store(y, bias, pass * kPassTokens + token, (int)blockIdx.z * kBlockRows + row, tokens, rows, sum);
    }
    if (CLUSTER > 1) wait_for_all();  // nobody leaves while others read its sums
}
