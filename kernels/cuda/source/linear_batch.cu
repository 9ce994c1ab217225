// y = x W^T (+ bias) for many tokens on Hopper: nested codes at one width times fixed point activations.
//
// A warpgroup owns 64 rows, of which each warp unpacks its 16 into the A registers of wgmma.m64nNk32; digits are the B operand,
// in shared memory. One warpgroup more does nothing but keep a ring of tiles filled. Two phases (each a nibble of a group of
// columns) are multiplied at a time: while the second is, the sums of the first become floats and codes of the next are
// unpacked; and warpgroups take turns on the tensor cores. All of a row's arithmetic, and its order, is that of linear_decode.cu.
#include "product.cuh"
#include "wgmma.cuh"

#ifndef WARPGROUPS
#define WARPGROUPS 2
#endif
#ifndef SEGMENTS  // of the columns, summed one by one
#define SEGMENTS 4
#endif
#ifndef STAGES  // of the ring
#define STAGES 4
#endif

using namespace nested;

constexpr int kThreads = (WARPGROUPS + 1) * 128, kWarps = WARPGROUPS * 4, kBlockRows = WARPGROUPS * 64;
constexpr int kPassTokens = PASS_TILES * kTokens;
constexpr int kSegmentsOfBlock = SEGMENTS / CLUSTER;
constexpr int kPlaces = CLUSTER == 1 ? 1 : kSegmentsOfBlock;  // a block on its own adds its segments up as they come
constexpr int kRowStride = kBlockRows + 8;
constexpr int kNibbles = kHasLow ? 2 : 1, kPhases = kGroups * kNibbles;
constexpr int kTogether = kPhases == 1 ? 2 : 1;  // tiles of a turn, so that it has two phases
static_assert(SEGMENTS % CLUSTER == 0, "a block takes whole segments");

// What a stage of the ring holds of a tile of columns: digits, scales of the tokens, and each warp's weights.
constexpr int kDigitBytes = PASS_TILES * 8 * kColumns, kScaleBytes = kPassTokens * 8;
constexpr int kPartsBytes = kGroups * kRows * sizeof(Part), kCodeBytes = kRows * kColumns * BITS / 8;
constexpr int kTileBytes = kCodeBytes + (kHasLow ? 2 : 1) * kPartsBytes;
constexpr int kFirstC3 = 512, kFirstC4 = 768, kFirstC6 = 1024, kFirstC8 = 1536;  // in a warp's weights
constexpr int kScales = STAGES * kDigitBytes, kWeights = kScales + STAGES * kGroups * kScaleBytes;
constexpr int kRingBytes = kWeights + STAGES * kWarps * kTileBytes;

// A warp copies a tile of weights, `index` of the streams.
__device__ inline void request(u32 to, const Weight& weight, size_t index) {
    const int lane = threadIdx.x & 31;
    copy_16(to + 16 * lane, weight.c2 + index * 32 + lane);
    if (kHasC3 && (kHasC4 || lane < 16)) {
        const uint2* stream = kHasC4 && lane >= 16 ? weight.c4 : weight.c3;
        copy_16(to + kFirstC3 + 16 * lane, stream + index * 32 + lane % 16 * 2);
    }
    if (kHasC6) copy_16(to + kFirstC6 + 16 * lane, weight.c6 + index * 32 + lane);
    if (kHasC8) copy_16(to + kFirstC8 + 16 * lane, weight.c8 + index * 32 + lane);
    constexpr int kLanes = kPartsBytes / 16;
#pragma unroll
    for (int first = 0; first < (kHasLow ? 2 : 1) * kLanes; first += 32) {
        const int at = first + lane;
        const Part* parts = at < kLanes ? weight.high : weight.low;
        if (at < (kHasLow ? 2 : 1) * kLanes)
            copy_16(to + kCodeBytes + 16 * at, reinterpret_cast<const u8*>(parts) + index * kPartsBytes + at % kLanes * 16);
    }
}

using Fragments = u32[kStepsOfGroup][4];

// One nibble of one group of the tile that lies at `tile`.
__device__ inline void unpack(const u8* tile, int phase, Fragments& fragments) {
    const int lane = threadIdx.x & 31;
    const bool is_low = phase % kNibbles == 1;
    Codes codes;
    if (!is_low) {
        codes.c2 = *reinterpret_cast<const uint4*>(tile + 16 * lane);
        if (kHasC3) codes.c3 = *reinterpret_cast<const uint2*>(tile + kFirstC3 + 8 * lane);
        if (kHasC4) codes.c4 = *reinterpret_cast<const uint2*>(tile + kFirstC4 + 8 * lane);
    } else {
        if (kHasC6) codes.c6 = *reinterpret_cast<const uint4*>(tile + kFirstC6 + 16 * lane);
        if (kHasC8) codes.c8 = *reinterpret_cast<const uint4*>(tile + kFirstC8 + 16 * lane);
    }
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
    for (int half = 0; half < 2; ++half) part[half] = part_floats(parts[group * kRows + half * 8 + threadIdx.x % 32 / 4]);
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

// Stages of the ring in turn, and how often they have been through.
struct Place {
    int stage = 0, turn = 0;

    __device__ void advance() {
        if (++stage == STAGES) stage = 0, turn ^= 1;
    }
    __device__ Place next() const {
        Place later = *this;
        later.advance();
        return later;
    }
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
    const u32 filled = shared_address(block_sums + kPlaces * kPassTokens * kRowStride), emptied = filled + 8 * STAGES;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, pass = blockIdx.y;
    const auto border = [&](int segment) { return tiles_k * segment / SEGMENTS; };
    const int first_segment = blockIdx.x * kSegmentsOfBlock, first = border(first_segment);
    const int count = border(first_segment + kSegmentsOfBlock) - first;  // tiles of columns

    launch_dependents();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            init_barrier(filled + 8 * stage, 1 + 128);
            init_barrier(emptied + 8 * stage, kWarps);
        }
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
    }
    __syncthreads();
    if (warp >= kWarps) {
        set_registers<WARPGROUPS == 2, 40>();
        const auto request_weights = [&](int tile, int stage) {
#pragma unroll
            for (int w = warp - kWarps; w < kWarps; w += 4) {
                const size_t row_tile = min((int)blockIdx.z * kWarps + w, row_tiles - 1);
                request(shared_address(ring) + kWeights + (stage * kWarps + w) * kTileBytes, weight, row_tile * tiles_k + first + tile);
            }
            arrive_after_copies(filled + 8 * stage);
        };
        const auto request_digits = [&](int tile, int stage) {
            const u32 to = shared_address(ring), barrier = filled + 8 * stage;
            const int k = first + tile;
            expect_bytes(barrier, kDigitBytes + kGroups * kScaleBytes);
            copy_bytes(to + stage * kDigitBytes, digits + ((size_t)pass * tiles_k + k) * kDigitBytes, kDigitBytes, barrier);
#pragma unroll
            for (int group = 0; group < kGroups; ++group)
                copy_bytes(to + kScales + (stage * kGroups + group) * kScaleBytes,
                           scales + (size_t)(k * kGroups + group) * slots + pass * kPassTokens, kScaleBytes, barrier);
        };
        const bool is_first = threadIdx.x == kWarps * 32;
        // Weights do not depend on what came before in the stream.
        for (int tile = 0; tile < min(STAGES, count); ++tile) request_weights(tile, tile);
        wait_for_inputs();
        if (is_first)
            for (int tile = 0; tile < min(STAGES, count); ++tile) request_digits(tile, tile);
        Place place;
        for (int tile = STAGES; tile < count; ++tile) {
            wait(emptied + 8 * place.stage, place.turn);
            if (is_first) request_digits(tile, place.stage);
            __syncwarp();
            request_weights(tile, place.stage);
            place.advance();
        }
        // What follows needs more registers than this warpgroup has left.
        wait_for_all();
        if (CLUSTER > 1) wait_for_all();
        return;
    }

    set_registers<WARPGROUPS == 2, 232>();
    wait_for_inputs();
    const u8* weights = ring + kWeights + warp * kTileBytes;
    float out[PASS_TILES][2] = {};
    Place place;
    int segment = 0, segment_end = border(first_segment + 1) - first;
    const auto unpack_at = [&](Place at, int phase, Fragments& fragments) {
        unpack(weights + at.stage * kWarps * kTileBytes, phase, fragments);
    };
    const auto multiply_at = [&](int (&sums)[kSums], const Fragments& fragments, Place at, int phase) {
        multiply_phase(sums, fragments, shared_address(ring) + at.stage * kDigitBytes, phase);
    };
    const auto add = [&](const int(&sums)[kSums], int phase) {
        const u8* own_scales = ring + kScales + place.stage * kGroups * kScaleBytes;
        add_phase(sums, weights + place.stage * kWarps * kTileBytes, phase, reinterpret_cast<const float2*>(own_scales), out);
    };
    const auto end_tile = [&](int tile) {
        __syncwarp();
        if (lane == 0) arrive(emptied + 8 * place.stage);
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
        if (tile < count) wait(filled + 8 * at.stage, at.turn);
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
