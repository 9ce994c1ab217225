// y = x W^T (+ bias) for many tokens on Hopper: values times a weight at one width, or at one for each row.
//
// A warpgroup owns 64 rows, of which each warp turns its 16 into the A registers of wgmma.m64nNk16. Values of the tokens are the
// B operand, in shared memory in the order of `values.cuh`; one warpgroup more keeps the ring filled. While a step of 32 columns is
// multiplied, the next is unpacked. The order of sums is not that of linear_decode.cu.
#ifdef WIDTHS
#include "mixed_values.cuh"
#else
#include "uniform_values.cuh"
#endif

using namespace nested;

// What a block of threads does, but for filling the ring.
struct Block {
    const u8* ring;
    Barriers barriers;
    const Division& division;
    int tiles_k, piece_tiles, all_tiles;
    const long long* row_widths;
    Output output;
    float4* partial;
    u32* counters;

    template <class Products>
    __device__ __forceinline__ void multiply() const {
        const int warp = threadIdx.x >> 5;
        Products products(ring, barriers, all_tiles, row_widths, output.tokens);
        const auto quad_of_sums = [&](int q) {
            const float* own = products.sums + 4 * q;
            return make_float4(own[0], own[1], own[2], own[3]);
        };
        const auto store_sums = [&](int block) {
#pragma unroll
            for (int q = 0; q < kQuads; ++q) output.store(block, warp, q, quad_of_sums(q));
        };
        const bool is_shared = division.has_piece() && division.splits > 1;
        if (division.has_piece()) products.multiply_tiles(piece_tiles, division.piece() % division.passes);
        if (division.has_piece() && !is_shared) store_sums(division.piece());
        if (is_shared)
#pragma unroll
            for (int q = 0; q < kQuads; ++q) partial[((size_t)blockIdx.x * kQuads + q) * kStorers + threadIdx.x] = quad_of_sums(q);
        for (int round = 0; round < division.rounds; ++round) {
            products.multiply_tiles(tiles_k, division.whole(round) % division.passes);
            store_sums(division.whole(round));
        }
        if (is_shared) add_pieces(division, partial, counters, output);
    }
};

// `value_sums` [groups][slots] and `row_widths` are read where WIDTHS is defined.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
nested_linear_values(RingWeight weight, const long long* row_widths, const u8* values, const float* value_sums, const float* bias,
                     Value* y, float4* partial, u32* counters, int tokens, int slots, int rows, int row_tiles, int tiles_k,
                     Division division) {
    extern __shared__ __align__(1024) u8 ring[];  // then barriers
    const u32 start = shared_address(ring);
    const Barriers barriers = {start + kBarriers, start + kBarriers + 8 * STAGES};
    const DividedTile first_tile(division, tiles_k);
    const int piece_tiles = division.has_piece() ? first_tile.end - first_tile.column_tile : 0;
    const int all_tiles = piece_tiles + division.rounds * tiles_k;

    launch_dependents();
    barriers.init();
    if (threadIdx.x >= kStorers) {
        give_registers<kFewRegisters>();
        fill_ring(barriers, start + kWeights, weight, row_tiles, tiles_k, all_tiles, first_tile, [&](const DividedTile& tile, int stage) {
            const u32 barrier = barriers.filled + 8 * stage;
            expect_bytes(barrier, kInputBytes + kGroups * kSumBytes);
            const size_t place = (size_t)tile.pass * tiles_k + tile.column_tile;
            copy_bytes(start + stage * kInputBytes, values + place * kInputBytes, kInputBytes, barrier);
#ifdef WIDTHS
#pragma unroll
            for (int group = 0; group < kGroups; ++group)
                copy_bytes(start + kInputSums + (stage * kGroups + group) * kSumBytes,
                           value_sums + (size_t)(tile.column_tile * kGroups + group) * slots + tile.pass * kPassTokens, kSumBytes, barrier);
#endif
        });
        return;
    }

    take_registers<kManyRegisters>();
    const Block block = {ring, barriers, division, tiles_k, piece_tiles, all_tiles, row_widths, {bias, y, tokens, rows, division.passes},
                         partial, counters};
#ifdef WIDTHS
    if (kQuads > 1 && half_is_enough(row_widths, tokens))
        block.multiply<Products<(kQuads > 1)>>();
    else
        block.multiply<Products<false>>();
#else
    block.multiply<Products>();
#endif
}
