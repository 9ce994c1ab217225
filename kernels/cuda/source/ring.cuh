// A ring of tiles of columns in shared memory, which one warpgroup fills and the others multiply from.
//
// A stage holds a tile of inputs (PASS_TILES KiB), what the kernel keeps beside it, and each multiplying warp's weights.
#pragma once
#include "product.cuh"
#include "wgmma.cuh"

#ifndef WARPGROUPS  // that multiply, of 64 rows each
#define WARPGROUPS 2
#endif
#ifndef STAGES  // of the ring
#define STAGES 4
#endif

namespace nested {

constexpr int kThreads = (WARPGROUPS + 1) * 128, kWarps = WARPGROUPS * 4, kBlockRows = WARPGROUPS * 64;
constexpr int kPassTokens = PASS_TILES * kTokens;

// Registers of a thread that fills, and of one that multiplies: together no more than the block was launched with. 0: as it was.
constexpr int kFewRegisters = WARPGROUPS == 1 ? 0 : 40;
constexpr int kManyRegisters = WARPGROUPS == 1 ? 0 : WARPGROUPS == 2 ? 232 : WARPGROUPS == 3 ? 152 : 104;

constexpr int kInputBytes = PASS_TILES * 8 * kColumns;
constexpr int kPartsBytes = kGroups * kRows * sizeof(Part), kCodeBytes = kRows * kColumns * BITS / 8;
constexpr int kTileBytes = kCodeBytes + (kHasLow ? 2 : 1) * kPartsBytes;
constexpr int kFirstC3 = 512, kFirstC4 = 768, kFirstC6 = 1024, kFirstC8 = 1536;  // in a warp's weights

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

// Codes of one nibble of the tile that lies at `tile`.
__device__ inline void read_codes(const u8* tile, bool is_low, Codes& codes) {
    const int lane = threadIdx.x & 31;
    if (!is_low) {
        codes.c2 = *reinterpret_cast<const uint4*>(tile + 16 * lane);
        if (kHasC3) codes.c3 = *reinterpret_cast<const uint2*>(tile + kFirstC3 + 8 * lane);
        if (kHasC4) codes.c4 = *reinterpret_cast<const uint2*>(tile + kFirstC4 + 8 * lane);
    } else {
        if (kHasC6) codes.c6 = *reinterpret_cast<const uint4*>(tile + kFirstC6 + 16 * lane);
        if (kHasC8) codes.c8 = *reinterpret_cast<const uint4*>(tile + kFirstC8 + 16 * lane);
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

// Barriers of a ring: a stage is filled when its inputs and all threads' weights have come, emptied when all warps are done.
struct Barriers {
    u32 filled, emptied;

    __device__ void init() const {
        if (threadIdx.x == 0) {
            for (int stage = 0; stage < STAGES; ++stage) {
                init_barrier(filled + 8 * stage, 1 + 128);
                init_barrier(emptied + 8 * stage, kWarps);
            }
            asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
        }
        __syncthreads();
    }
};

// What the filling warpgroup does for `count` tiles; `request_inputs(tile, stage)` asks for what is not weights.
template <class RequestInputs>
__device__ inline void fill_ring(const Barriers& barriers, u32 weights, const Weight& weight, int row_tile, int row_tiles,
                                 int tiles_k, int first, int count, const RequestInputs& request_inputs) {
    const auto request_weights = [&](int tile, int stage) {
#pragma unroll 1  // few registers are left
        for (int w = threadIdx.x / 32 - kWarps; w < kWarps; w += 4) {
            const size_t row = min(row_tile + w, row_tiles - 1);
            request(weights + (stage * kWarps + w) * kTileBytes, weight, row * tiles_k + first + tile);
        }
        arrive_after_copies(barriers.filled + 8 * stage);
    };
    const bool is_first = threadIdx.x == kWarps * 32;
    // Weights do not depend on what came before in the stream.
    for (int tile = 0; tile < min(STAGES, count); ++tile) request_weights(tile, tile);
    wait_for_inputs();
    if (is_first)
        for (int tile = 0; tile < min(STAGES, count); ++tile) request_inputs(tile, tile);
    Place place;
    for (int tile = STAGES; tile < count; ++tile) {
        wait(barriers.emptied + 8 * place.stage, place.turn);
        if (is_first) request_inputs(tile, place.stage);
        __syncwarp();
        request_weights(tile, place.stage);
        place.advance();
    }
}

}  // namespace nested
