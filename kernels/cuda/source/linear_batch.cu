// y = x W^T (+ bias) for many tokens on Hopper: nested codes at one width times fixed point activations.
//
// A warpgroup owns 64 rows, of which each warp unpacks its 16 into the A registers of wgmma.m64nNk32. Digits come in tiles of
// 128 columns from a ring in shared memory that all warps read and the memory engine fills, weights from one that each warp
// fills for itself. Warpgroups take turns on the tensor cores: while one multiplies a phase (a nibble of a group of columns) and
// unpacks the codes of its next, the sums of the others become floats. All of a row's arithmetic, and its order, is that of
// linear_decode.cu.
#include "product.cuh"
#include "wgmma.cuh"

#ifndef WARPGROUPS
#define WARPGROUPS 2
#endif
#ifndef SEGMENTS  // of the columns, summed one by one
#define SEGMENTS 4
#endif
#ifndef DEPTH  // tiles of weights in a warp's ring
#define DEPTH 4
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
constexpr int kUnroll = kPhases % 2 ? 2 : 1;  // tiles, so that registers can take turns
// Of a tile of weights: code streams in the order of their width, then parts.
constexpr int kPartsBytes = kGroups * kRows * sizeof(Part), kCodeBytes = kRows * kColumns * BITS / 8;
constexpr int kTileBytes = kCodeBytes + (kHasLow ? 2 : 1) * kPartsBytes;
constexpr int kFirstC3 = 512, kFirstC4 = 768, kFirstC6 = 1024, kFirstC8 = 1536;
static_assert(SEGMENTS % CLUSTER == 0, "a block takes whole segments");
static_assert(DEPTH >= 2, "the tiles of two phases are in use at once");

__device__ inline void copy_16(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// A warp copies a tile of its weights, `index` of the streams.
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
template <int kPending>
__device__ inline void wait_for_weights() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
    __syncwarp();
}
__device__ inline void commit_weights() { asm volatile("cp.async.commit_group;" ::: "memory"); }

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
        const auto place = describe_digits(digits + 256 * (phase / kNibbles * kStepsOfGroup + s));
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

// A grid of (blocks of a cluster, passes of PASS_TILES n-tiles, groups of rows); digits as digits.cuh says for such passes.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
nested_linear_batch(Weight weight, const u8* digits, const float2* scales, const float* bias, Value* y, int tokens, int slots,
                    int rows, int row_tiles, int tiles_k) {
    // [stages](digits, scales); [warps][depth] tiles; sums [places][tokens][rows]; barriers
    extern __shared__ __align__(128) u8 ring[];
    float* block_sums = reinterpret_cast<float*>(ring + STAGES * kStageBytes + kWarps * DEPTH * kTileBytes);
    const u32 filled = shared_address(block_sums + kPlaces * kPassTokens * kRowStride), emptied = filled + 8 * STAGES;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, pass = blockIdx.y;
    const u8* tiles = ring + STAGES * kStageBytes + warp * DEPTH * kTileBytes;
    const auto border = [&](int segment) { return tiles_k * segment / SEGMENTS; };
    const int first_segment = blockIdx.x * kSegmentsOfBlock, first = border(first_segment);
    const int count = border(first_segment + kSegmentsOfBlock) - first;  // tiles of columns
    const size_t first_tile = (size_t)min((int)blockIdx.z * kWarps + warp, row_tiles - 1) * tiles_k + first;

    launch_dependents();
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
        if (d < count) request(shared_address(tiles) + d * kTileBytes, weight, first_tile + d);
        commit_weights();
    }
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            init_barrier(filled + 8 * stage, 1);
            init_barrier(emptied + 8 * stage, kWarps);
        }
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
    }
    __syncthreads();
    wait_for_inputs();

    const auto fill = [&](int tile, int stage) {
        const u32 to = shared_address(ring) + stage * kStageBytes, barrier = filled + 8 * stage;
        const int k = first + tile;
        expect_bytes(barrier, kStageBytes);
        copy_bytes(to, digits + ((size_t)pass * tiles_k + k) * kDigitBytes, kDigitBytes, barrier);
#pragma unroll
        for (int group = 0; group < kGroups; ++group)
            copy_bytes(to + kDigitBytes + group * kScaleBytes, scales + (size_t)(k * kGroups + group) * slots + pass * kPassTokens,
                       kScaleBytes, barrier);
    };
    if (threadIdx.x == 0)
        for (int stage = 0; stage < STAGES; ++stage)
            if (stage < count) fill(stage, stage);

    float out[PASS_TILES][2] = {};
    int sums[kSums];
    Fragments fragments[2];
    wait_for_weights<DEPTH - 1>();
    unpack(tiles, 0, fragments[0]);
    if (warp / 4 == WARPGROUPS - 1) pass_turn();
    int stage = 0, turn = 0, slot = 0, segment = 0, segment_end = border(first_segment + 1) - first;
    for (int tile0 = 0; tile0 < count; tile0 += kUnroll) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int tile = tile0 + u;
            if (tile >= count) break;
            const int next_slot = slot + 1 == DEPTH ? 0 : slot + 1;
            const float2* own_scales = reinterpret_cast<const float2*>(ring + stage * kStageBytes + kDigitBytes);
#pragma unroll
            for (int phase = 0; phase < kPhases; ++phase) {
                const int own = (u * kPhases + phase) % 2;
                const bool is_last = phase == kPhases - 1;
                if (phase == 0) wait(filled + 8 * stage, turn);
                wait_for_turn();
                multiply_phase(sums, fragments[own], shared_address(ring) + stage * kStageBytes, phase);
                pass_turn();
                // After the last phase of all, the next is one that nobody asks for.
                if (is_last) wait_for_weights<DEPTH - 2>();
                unpack(tiles + (is_last ? next_slot : slot) * kTileBytes, (phase + 1) % kPhases, fragments[1 - own]);
                wait_for_products(sums);
                add_phase(sums, tiles + slot * kTileBytes, phase, own_scales, out);
            }
            __syncwarp();
            if (lane == 0) arrive(emptied + 8 * stage);
            if (tile + DEPTH < count) request(shared_address(tiles) + slot * kTileBytes, weight, first_tile + tile + DEPTH);
            commit_weights();
            // Warpgroups take turns to fill a stage again, the one before this: by now nobody reads it, or hardly anybody.
            if (tile > 0 && tile - 1 + STAGES < count && tile % WARPGROUPS == warp / 4 && threadIdx.x % 128 == 0) {
                const int former = stage == 0 ? STAGES - 1 : stage - 1;
                wait(emptied + 8 * former, stage == 0 ? turn ^ 1 : turn);
                fill(tile - 1 + STAGES, former);
            }
            slot = next_slot;
            if (++stage == STAGES) stage = 0, turn ^= 1;
            if (tile + 1 == segment_end) {
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
                segment_end = border(first_segment + segment + 1) - first;
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
