// Blocks of rows and passes, dealt out so that every multiprocessor has about as many tiles of columns; and where results go.
#pragma once
#include "ring.cuh"
#include "values.cuh"

namespace nested {

constexpr int kStorers = kWarps * 32, kQuads = PASS_TILES / 2;  // of a lane's sums, each of 16 rows and 8 tokens of its warp

// What a block of threads multiplies: a piece of one block, then `rounds` whole ones.
struct Division {
    int passes, rounds, splits, cut_blocks;

    __device__ bool has_piece() const { return (int)blockIdx.x < cut_blocks * splits; }
    __device__ int cut_block() const { return blockIdx.x / splits; }
    __device__ int rank() const { return blockIdx.x % splits; }
    __device__ int border(int tiles_k, int rank) const { return tiles_k * rank / splits; }
    __device__ int piece() const { return rounds * gridDim.x + cut_block(); }  // as a block
    __device__ int whole(int round) const { return round * gridDim.x + blockIdx.x; }
};

// One tile after the other of what a block of threads multiplies.
struct DividedTile {
    const Division& division;
    int tiles_k, row_tile, column_tile, end, pass, round;

    __device__ DividedTile(const Division& division, int tiles_k) : division(division), tiles_k(tiles_k), round(0) {
        if (division.has_piece())
            begin(division.piece(), division.border(tiles_k, division.rank()), division.border(tiles_k, division.rank() + 1));
        else
            begin_whole();
    }
    __device__ void begin(int block, int from, int to) {
        row_tile = block / division.passes * kWarps, pass = block % division.passes;
        column_tile = from, end = to;
    }
    __device__ void begin_whole() { begin(division.whole(round++), 0, tiles_k); }
    __device__ bool advance() {  // whether to other columns alone
        if (++column_tile < end) return true;
        begin_whole();
        return false;
    }
};

// A multiplying warp's way through the tiles of a ring, whose weights begin at kRingWeights, step of 32 columns by step.
template <int kRingWeights>
struct RingWalk {
    const u8* ring;
    Barriers barriers;
    int left;  // tiles, of all that this block multiplies
    Place place;
    Codes codes;

    __device__ RingWalk(const u8* ring, const Barriers& barriers, int count) : ring(ring), barriers(barriers), left(count) {
        wait(barriers.filled, 0);
    }
    __device__ const u8* weights_at(Place at) const {
        return ring + kRingWeights + (at.stage * kWarps + threadIdx.x / 32) * kTileBytes;
    }
    __device__ void read_step(Place at, int step) {
        if (step > 0) return;
        read_codes(weights_at(at), false, codes);
        if (kHasLow) read_codes(weights_at(at), true, codes);
    }
    // Where the step after one lies. What follows the last tile is unpacked for nothing and not awaited.
    __device__ Place after(int step) const {
        if (step + 1 < kSteps) return place;
        const Place next = place.next();
        if (left > 0) wait(barriers.filled + 8 * next.stage, next.turn);
        return next;
    }
    __device__ void leave_tile() {
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive(barriers.emptied + 8 * place.stage);
        place.advance();
    }
};

struct Output {
    const float* bias;
    Value* y;
    int tokens, rows, passes;

    // A warp's sums of 16 rows from `row` and 8 tokens from `token`, of which a lane has two rows and two tokens.
    __device__ void store(int block, int warp, int quad, float4 sums) const {
        const int lane = threadIdx.x & 31, row = block / passes * kBlockRows + warp * kRows;
        const int token = block % passes * kPassTokens + quad * 8 + lane / 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int own = row + half * 8 + lane / 4;
            const float added = bias != nullptr && own < rows ? bias[own] : 0.f;
            const float2 pair = half == 0 ? make_float2(sums.x, sums.y) : make_float2(sums.z, sums.w);
            u32 values = as_bits(rounded(pair.x + added, pair.y + added));
            asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(values));  // now two rows of one token
            const int first = row + half * 8 + lane % 4 * 2;
            if (token >= tokens) continue;
            u32* to = reinterpret_cast<u32*>(y + (size_t)token * rows + first);
            if (rows % 2 == 0 && first < rows) *to = values;
            if (rows % 2 == 1)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    if (first + i < rows) reinterpret_cast<unsigned short*>(y)[(size_t)token * rows + first + i] = values >> (16 * i);
        }
    }
};

__device__ inline void wait_for_storers() { asm volatile("bar.sync 1, %0;" ::"n"(kStorers) : "memory"); }
__device__ inline u32 counted_pieces(const u32* counter) {
    u32 count;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
    return count;
}
__device__ inline u32 count_piece(u32* counter) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

// Wait until all pieces of a cut block are in `partial`, then add up and store a share of them.
__device__ inline void add_pieces(const Division& division, const float4* partial, u32* counters, const Output& output) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, splits = division.splits;
    u32* counter = counters + division.cut_block();
    __threadfence();
    wait_for_storers();
    if (threadIdx.x == 0) {
        count_piece(counter);
        while (counted_pieces(counter) < splits) {
        }
    }
    wait_for_storers();
    const float4* first_piece = partial + (size_t)division.cut_block() * splits * kQuads * kStorers;
    const auto border = [&](int rank) { return kQuads * kWarps * rank / splits; };
    for (int share = border(division.rank()) + warp; share < border(division.rank() + 1); share += kWarps) {
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
        for (int piece = 0; piece < splits; ++piece) {
            const float4 more = __ldcg(first_piece + ((size_t)piece * kQuads * kWarps + share) * 32 + lane);
            sum = make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
        }
        output.store(division.piece(), share % kWarps, share / kWarps, sum);
    }
    wait_for_storers();
    if (threadIdx.x == 0 && count_piece(counter) == 2 * splits - 1) *counter = 0;  // for the next launch
}

}  // namespace nested
