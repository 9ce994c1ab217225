// A ring of tiles of columns in shared memory, which one warpgroup fills and the others multiply from.
//
// A stage holds a tile of inputs (PASS_TILES KiB), what the kernel keeps beside it, and each multiplying warp's weights.
#pragma once
#include "product.cuh"
#include "wgmma.cuh"
#ifdef WIDTHS
#include "widths.cuh"
#endif

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
#ifdef WIDTHS  // parts of a tile, in the order of the widths
using RingWeight = MixedWeight;
__device__ constexpr int parts_before(int place) { return count_before(place, reads_part); }
constexpr int kParts = parts_before(kPlaces);
#else
using RingWeight = Weight;
constexpr int kParts = kHasLow ? 2 : 1;
#endif
constexpr int kTileBytes = kCodeBytes + kParts * kPartsBytes;
constexpr int kFirstC3 = 512, kFirstC4 = 768, kFirstC6 = 1024, kFirstC8 = 1536;  // in a warp's weights

// Where a lane copies a tile's codes and parts from, and from the tiles of columns that follow.
struct WeightSource {
    static constexpr int kPartLanes = kPartsBytes / 16, kLanes = kParts * kPartLanes, kPartCopies = (kLanes + 31) / 32;
    const u8 *c2, *c34, *c6, *c8, *parts[kPartCopies];

    __device__ static const Part* part_of(const RingWeight& weight, int number) {
#ifdef WIDTHS
        const Part* part = nullptr;
#pragma unroll
        for (int place = 0; place < kPlaces; ++place)
            if (reads_part(place) && parts_before(place) == number) part = weight.parts[place];
        return part;
#else
        return number == 0 ? weight.high : weight.low;
#endif
    }
    __device__ void begin(const RingWeight& weight, size_t index) {
        const int lane = threadIdx.x & 31;
        const auto at = [&](const void* stream, int bytes, int chunk) {
            return reinterpret_cast<const u8*>(stream) + index * bytes + chunk * 16;
        };
        c2 = at(weight.c2, 512, lane);
        if (kHasC3) c34 = at(kHasC4 && lane >= 16 ? weight.c4 : weight.c3, 256, lane % 16);
        if (kHasC6) c6 = at(weight.c6, 512, lane);
        if (kHasC8) c8 = at(weight.c8, 512, lane);
#pragma unroll
        for (int i = 0; i < kPartCopies; ++i) {
            const int chunk = 32 * i + lane;
            parts[i] = at(part_of(weight, chunk / kPartLanes), kPartsBytes, chunk % kPartLanes);
        }
    }
    __device__ void advance() {
        c2 += 512, c34 += 256, c6 += 512, c8 += 512;
#pragma unroll
        for (int i = 0; i < kPartCopies; ++i) parts[i] += kPartsBytes;
    }
    // Of the tile of rows that is `tiles` tiles further on.
    __device__ void request(u32 to, u32 tiles) const {
        const int lane = threadIdx.x & 31;
        to += 16 * lane;
        copy_16(to, c2 + (size_t)(tiles * 512));
        if (kHasC3 && (kHasC4 || lane < 16)) copy_16(to + kFirstC3, c34 + (size_t)(tiles * 256));
        if (kHasC6) copy_16(to + kFirstC6, c6 + (size_t)(tiles * 512));
        if (kHasC8) copy_16(to + kFirstC8, c8 + (size_t)(tiles * 512));
#pragma unroll
        for (int i = 0; i < kPartCopies; ++i)
            if (32 * i + lane < kLanes) copy_16(to + kCodeBytes + 512 * i, parts[i] + (size_t)(tiles * kPartsBytes));
    }
};

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

// What the filling warpgroup does for `count` tiles. `tile` is the first: row_tile of its first warp's weights and column_tile;
// advance() makes it the next and says whether that one only lies in other columns. request_inputs(tile, stage), by one thread,
// expects and copies what is not weights.
template <class Tile, class RequestInputs>
__device__ inline void fill_ring(const Barriers& barriers, u32 weights, const RingWeight& weight, int row_tiles, int tiles_k, int count,
                                 Tile tile, const RequestInputs& request_inputs) {
    const int warp = threadIdx.x / 32 - kWarps;
    WeightSource source;
    const auto begin = [&] { source.begin(weight, (size_t)(tile.row_tile + warp) * tiles_k + tile.column_tile); };
    const auto advance = [&] {
        if (tile.advance())
            source.advance();
        else
            begin();
    };
    const auto request_weights = [&](int stage) {
        const u32 to = weights + (stage * kWarps + warp) * kTileBytes;
#pragma unroll
        for (int w = 0; w < kWarps; w += 4)
            if (tile.row_tile + warp + w < row_tiles) source.request(to + w * kTileBytes, w * tiles_k);
        arrive_after_copies(barriers.filled + 8 * stage);
    };
    const bool is_first = threadIdx.x == kWarps * 32;
    // Weights do not depend on what came before in the stream.
    Tile inputs = tile;
    begin();
    for (int n = 0; n < min(STAGES, count); ++n, advance()) request_weights(n);
    wait_for_inputs();
    if (is_first)
        for (int n = 0; n < min(STAGES, count); ++n, inputs.advance()) request_inputs(inputs, n);
    Place place;
    for (int n = STAGES; n < count; ++n, advance(), place.advance()) {
        wait(barriers.emptied + 8 * place.stage, place.turn);
        if (is_first) request_inputs(tile, place.stage);
        __syncwarp();
        request_weights(place.stage);
    }
}

}  // namespace nested
