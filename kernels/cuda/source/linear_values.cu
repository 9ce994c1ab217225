// y = x W^T (+ bias) for many tokens on Hopper: the weight at one width as numbers of the activations' type.
//
// A warpgroup owns 64 rows, of which each warp turns its 16 into the A registers of wgmma.m64nNk16: codes become numbers by
// one byte permutation a pair, then scale and zero. Values of the tokens are the B operand, in shared memory in the order of
// `values.cuh`; one warpgroup more keeps the ring filled. While a step of 32 columns is multiplied, the next is unpacked.
// Sums stay on the tensor cores from the first column to the last, so their order is not that of linear_decode.cu.
#include "ring.cuh"
#include "values.cuh"

using namespace nested;

constexpr int kRowStride = kBlockRows + 4;  // so that a warp's sums lie in different banks
constexpr int kWeights = STAGES * kInputBytes, kRingBytes = kWeights + STAGES * kWarps * kTileBytes;
constexpr int kSumsBytes = kPassTokens * kRowStride * 4;  // take the ring's place in the end
constexpr int kBarriers = kRingBytes > kSumsBytes ? kRingBytes : kSumsBytes;

using Fragments = u32[2][4];  // of 32 columns, 16 at a time

// Scale and zero of a lane's two rows in one group, each number twice; above 4 bits that of the low nibble too.
struct Levels {
    Pair scale[2], zero[2], low_scale[2];

    __device__ void read(const u8* tile, int group) {
        const Part* parts = reinterpret_cast<const Part*>(tile + kCodeBytes);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int place = group * kRows + half * 8 + threadIdx.x % 32 / 4;
            const float2 high = part_floats(parts[place]);
            scale[half] = twice(high.x);
            zero[half] = twice(high.y);
            if (kHasLow) {
                const float2 low = part_floats(parts[kGroups * kRows + place]);
                low_scale[half] = twice(low.x);
                zero[half] = twice(low.y);
            }
        }
    }
};

__device__ inline void unpack(const Codes& codes, const Levels& levels, int step, Fragments& fragments) {
    u32 high[4], low[4];
    high_codes(codes, step, high);
    if (kHasLow) low_codes(codes, step, low);
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            Pair value = levels.zero[j % 2];
            if (kHasLow) value = fused(integers(low[j], s), levels.low_scale[j % 2], value);
            value = fused(integers(high[j], s), levels.scale[j % 2], value);
            fragments[s][j] = *reinterpret_cast<u32*>(&value);
            // Here and not on the way into a product, where products would wait for one another.
            asm volatile("" : "+r"(fragments[s][j]));
        }
}

// A grid of (blocks of a cluster, passes of PASS_TILES n-tiles, groups of rows).
extern "C" __global__ void __launch_bounds__(kThreads, 1)
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
nested_linear_values(Weight weight, const u8* values, const float* bias, Value* y, int tokens, int rows, int row_tiles, int tiles_k) {
    extern __shared__ __align__(1024) u8 ring[];  // then barriers
    float* block_sums = reinterpret_cast<float*>(ring);  // [tokens][rows]
    const u32 start = shared_address(ring);
    const Barriers barriers = {start + kBarriers, start + kBarriers + 8 * STAGES};
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, pass = blockIdx.y;
    const int first = tiles_k * (int)blockIdx.x / CLUSTER, count = tiles_k * ((int)blockIdx.x + 1) / CLUSTER - first;

    launch_dependents();
    barriers.init();
    if (warp >= kWarps) {
        give_registers<kFewRegisters>();
        fill_ring(barriers, start + kWeights, weight, blockIdx.z * kWarps, row_tiles, tiles_k, first, count, [&](int tile, int stage) {
            const u32 barrier = barriers.filled + 8 * stage;
            expect_bytes(barrier, kInputBytes);
            copy_bytes(start + stage * kInputBytes, values + ((size_t)pass * tiles_k + first + tile) * kInputBytes, kInputBytes,
                       barrier);
        });
        wait_for_all();
        wait_for_all();
        if (CLUSTER > 1) wait_for_all();
        return;
    }

    take_registers<kManyRegisters>();
    float sums[kValueSums] = {};
    Fragments fragments, later_fragments;
    Codes codes;
    Levels levels;
    Place place;
    const auto unpack_step = [&](Place at, int step, Fragments& to) {
        const u8* tile = ring + kWeights + (at.stage * kWarps + warp) * kTileBytes;
        if (step == 0) {
            read_codes(tile, false, codes);
            if (kHasLow) read_codes(tile, true, codes);
        }
        if (step % kStepsOfGroup == 0) levels.read(tile, step / kStepsOfGroup);
        unpack(codes, levels, step, to);
    };
    const auto multiply_step = [&](int step, const Fragments& from) {
        begin_products();
#pragma unroll
        for (int s = 0; s < 2; ++s) multiply_values(sums, from[s], describe_values(start + place.stage * kInputBytes, 2 * step + s));
        commit_products();
    };
    wait(barriers.filled, 0);
    unpack_step(place, 0, fragments);
    for (int tile = 0; tile < count; ++tile) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            multiply_step(step, step % 2 == 0 ? fragments : later_fragments);
            wait_for_former_values();  // and so the other fragments are free
            const bool is_last = step + 1 == kSteps;
            const Place at = is_last ? place.next() : place;
            if (is_last && tile + 1 < count) wait(barriers.filled + 8 * at.stage, at.turn);  // else unpacked for nothing
            unpack_step(at, is_last ? 0 : step + 1, step % 2 == 0 ? later_fragments : fragments);
        }
        wait_for_values(sums);
        __syncwarp();
        if (lane == 0) arrive(barriers.emptied + 8 * place.stage);
        place.advance();
    }
    wait_for_all();  // nobody needs the ring any more
#pragma unroll
    for (int q = 0; q < kPassTokens / 8; ++q)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            block_sums[(q * 8 + lane % 4 * 2 + i % 2) * kRowStride + warp * kRows + i / 2 * 8 + lane / 4] = sums[4 * q + i];
    wait_for_all();
    u32 of_block[CLUSTER];
#pragma unroll
    for (int rank = 0; rank < CLUSTER; ++rank) of_block[rank] = shared_of(block_sums, rank);
    constexpr int kStorers = kWarps * 32;
    for (int index = blockIdx.x * kStorers + threadIdx.x; index < kPassTokens * kBlockRows; index += CLUSTER * kStorers) {
        const int row = index % kBlockRows, token = index / kBlockRows;
        float sum = 0.f;
#pragma unroll
        for (int rank = 0; rank < CLUSTER; ++rank) sum += load_shared(of_block[rank] + 4 * (token * kRowStride + row));
        store(y, bias, pass * kPassTokens + token, (int)blockIdx.z * kBlockRows + row, tokens, rows, sum);
    }
    if (CLUSTER > 1) wait_for_all();  // nobody leaves while others read its sums
}
