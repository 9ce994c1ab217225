// y = x W^T (+ bias) for many tokens on Hopper: the weight at one width as numbers of the activations' type.
//
// A warpgroup owns 64 rows, of which each warp turns its 16 into the A registers of wgmma.m64nNk16: codes become numbers by
// one byte permutation a pair, then scale and zero. Values of the tokens are the B operand, in shared memory in the order of
// `values.cuh`; one warpgroup more keeps the ring filled. While a step of 32 columns is multiplied, the next is unpacked.
// Sums stay on the tensor cores from the first column to the last, so their order is not that of linear_decode.cu.
#include "ring.cuh"
#include "values.cuh"

using namespace nested;

constexpr int kWeights = STAGES * kInputBytes, kBarriers = kWeights + STAGES * kWarps * kTileBytes;
constexpr int kStorers = kWarps * 32, kQuads = PASS_TILES / 2;  // of a lane's sums, each of 16 rows and 8 tokens of its warp

using Fragments = u32[2][4];  // of 32 columns, 16 at a time

// Scale and zero of a lane's two rows in one group, each number twice; above 4 bits that of the low nibble too. Codes count
// from the one nearest to zero, so that rounding the scale costs a weight no more than its own rounding does.
struct Levels {
    Pair scale[2], from[2], zero[2], low_scale[2];

    __device__ void read(const u8* tile, int group) {
        const Part* parts = reinterpret_cast<const Part*>(tile + kCodeBytes);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int place = group * kRows + half * 8 + threadIdx.x % 32 / 4;
            const float2 high = part_floats(parts[place]);
            float offset = high.y;
            if (kHasLow) {
                const float2 low = part_floats(parts[kGroups * kRows + place]);
                low_scale[half] = twice(low.x);
                offset = low.y;
            }
            const float nearest = fminf(fmaxf(rintf(__fdividef(-offset, high.x)), 0.f), 15.f);
            scale[half] = twice(high.x);
            from[half] = twice(kAbove + nearest);
            zero[half] = twice(__fmaf_rn(nearest, high.x, offset));
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
            if (kHasLow) value = fused(counted(low[j], s, twice(kAbove)), levels.low_scale[j % 2], value);
            value = fused(counted(high[j], s, levels.from[j % 2]), levels.scale[j % 2], value);
            fragments[s][j] = as_bits(value);
            // Here and not on the way into a product, where products would wait for one another.
            asm volatile("" : "+r"(fragments[s][j]));
        }
}

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

extern "C" __global__ void __launch_bounds__(kThreads, 1)
nested_linear_values(Weight weight, const u8* values, const float* bias, Value* y, float4* partial, u32* counters, int tokens, int rows,
                     int row_tiles, int tiles_k, Division division) {
    extern __shared__ __align__(1024) u8 ring[];  // then barriers
    const u32 start = shared_address(ring);
    const Barriers barriers = {start + kBarriers, start + kBarriers + 8 * STAGES};
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, passes = division.passes;
    const DividedTile first_tile(division, tiles_k);
    const int piece_tiles = division.has_piece() ? first_tile.end - first_tile.column_tile : 0;
    const int all_tiles = piece_tiles + division.rounds * tiles_k;

    launch_dependents();
    barriers.init();
    if (warp >= kWarps) {
        give_registers<kFewRegisters>();
        fill_ring(barriers, start + kWeights, weight, row_tiles, tiles_k, all_tiles, first_tile, [&](const DividedTile& tile, int stage) {
            const u32 barrier = barriers.filled + 8 * stage;
            expect_bytes(barrier, kInputBytes);
            const size_t place = (size_t)tile.pass * tiles_k + tile.column_tile;
            copy_bytes(start + stage * kInputBytes, values + place * kInputBytes, kInputBytes, barrier);
        });
        return;
    }

    take_registers<kManyRegisters>();
    const Output output = {bias, y, tokens, rows, passes};
    float sums[kValueSums];
    Fragments fragments, later_fragments;
    Codes codes;
    Levels levels;
    Place place;
    int left = all_tiles;
    const auto unpack_step = [&](Place at, int step, Fragments& to) {
        const u8* tile = ring + kWeights + (at.stage * kWarps + warp) * kTileBytes;
        if (step == 0) {
            read_codes(tile, false, codes);
            if (kHasLow) read_codes(tile, true, codes);
        }
        if (step % kStepsOfGroup == 0) levels.read(tile, step / kStepsOfGroup);
        unpack(codes, levels, step, to);
    };
    const auto multiply_step = [&](unsigned long long described, int step, const Fragments& from) {
        begin_products();
#pragma unroll
        for (int s = 0; s < 2; ++s) multiply_values(sums, from[s], described + described_step(2 * step + s));
        commit_products();
    };
    const auto multiply_tiles = [&](int count) {
#pragma unroll
        for (int i = 0; i < kValueSums; ++i) sums[i] = 0.f;
        for (int tile = 0; tile < count; ++tile) {
            const unsigned long long described = describe_values(start + place.stage * kInputBytes);
            --left;
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                multiply_step(described, step, step % 2 == 0 ? fragments : later_fragments);
                wait_for_former_values();  // and so the other fragments are free
                const bool is_last = step + 1 == kSteps;
                const Place at = is_last ? place.next() : place;
                if (is_last && left > 0) wait(barriers.filled + 8 * at.stage, at.turn);  // else unpacked for nothing
                unpack_step(at, is_last ? 0 : step + 1, step % 2 == 0 ? later_fragments : fragments);
            }
            wait_for_values(sums);
            __syncwarp();
            if (lane == 0) arrive(barriers.emptied + 8 * place.stage);
            place.advance();
        }
    };
    const auto quad_of_sums = [&](int q) { return make_float4(sums[4 * q], sums[4 * q + 1], sums[4 * q + 2], sums[4 * q + 3]); };
    const auto store_sums = [&](int block) {
#pragma unroll
        for (int q = 0; q < kQuads; ++q) output.store(block, warp, q, quad_of_sums(q));
    };

    wait(barriers.filled, 0);
    unpack_step(place, 0, fragments);
    const int splits = division.splits;
    const bool is_shared = division.has_piece() && splits > 1;
    if (division.has_piece()) multiply_tiles(piece_tiles);
    if (division.has_piece() && !is_shared) store_sums(division.piece());
    if (is_shared)
#pragma unroll
        for (int q = 0; q < kQuads; ++q) partial[((size_t)blockIdx.x * kQuads + q) * kStorers + threadIdx.x] = quad_of_sums(q);
    for (int round = 0; round < division.rounds; ++round) {
        multiply_tiles(tiles_k);
        store_sums(division.whole(round));
    }
    if (!is_shared) return;

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
