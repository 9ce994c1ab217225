// y = x W^T (+ bias) for few tokens: nested codes at one width, or at one for each n-tile, times fixed point activations.
//
// A warp owns ROW_TILES tiles of 16 rows and walks over columns. Codes are the unsigned bytes of the A operand of
// mma.m16n8k32; the B operand holds the two signed digits of a token in neighbouring columns, so that a lane's
// accumulators are (digit 1, digit 0) of one token: their sum is exact, whatever the order. Floats enter once per (row, group), in
// an order that only SEGMENTS and the number of columns decide: within a segment group after group, then segment after segment.
#ifdef WIDTHS
#include "mixed.cuh"
#else
#include "uniform.cuh"
#endif

#ifndef ROW_WARPS  // side by side
#define ROW_WARPS 4
#endif
#ifndef COLUMN_WARPS  // that share row tiles
#define COLUMN_WARPS 2
#endif
#ifndef SEGMENTS  // of the columns, summed one by one
#define SEGMENTS 2
#endif
#ifndef DEPTH  // tiles of weights that are requested ahead
#define DEPTH 2
#endif
#ifndef MIN_BLOCKS  // that a multiprocessor is to have registers for
#define MIN_BLOCKS 1
#endif

using namespace nested;

constexpr int kThreads = ROW_WARPS * COLUMN_WARPS * 32;
constexpr int kSegmentsOfBlock = SEGMENTS / CLUSTER, kSegmentsOfWarp = kSegmentsOfBlock / COLUMN_WARPS;
static_assert(SEGMENTS % (COLUMN_WARPS * CLUSTER) == 0, "a warp takes whole segments");

// A grid of (blocks of a cluster, passes of TOKEN_TILES n-tiles, groups of rows); the passes over the same rows run side by side
// and find the weights in the cache. Digits and scales are as digits.cuh says. `row_widths` is read where WIDTHS is defined,
// and where OWN_PASSES is: then passes of other widths are left alone. Rows of an n-tile, or of a pass, have one width.
extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS)
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
nested_linear_decode(ServedWeight weight, const long long* row_widths, const uint4* digits, const float2* scales,
                     const float* bias, Value* y, int tokens, int slots, int rows, int row_tiles, int tiles_k) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, part = warp % COLUMN_WARPS;
    const int row_tile = (blockIdx.z * ROW_WARPS + warp / COLUMN_WARPS) * ROW_TILES;
    const int first_token = blockIdx.y * TOKEN_TILES * kTokens;
    const auto border = [&](int segment) { return tiles_k * segment / SEGMENTS; };
    const int first_segment = blockIdx.x * kSegmentsOfBlock + part * kSegmentsOfWarp;
    const int first = border(first_segment), last = border(first_segment + kSegmentsOfWarp);
    // Lanes that hold the digits of tokens that are not there load nothing.
    const bool has_token = TOKEN_TILES > 1 || lane < 8 * (tokens - first_token);
    extern __shared__ float segment_sums[];  // [row warps][segments of the block][row tiles][n-tiles][2][32]
    constexpr int kOfSegment = ROW_TILES * TOKEN_TILES * 64;
    float* row_sums = segment_sums + warp / COLUMN_WARPS * kSegmentsOfBlock * kOfSegment;
    float* own_sums = row_sums + part * kSegmentsOfWarp * kOfSegment;

    launch_dependents();
#ifdef OWN_PASSES
    if (row_widths[first_token] != BITS) {
        wait_for_inputs();  // what follows relies on what came before this kernel as well
        return;
    }
#endif
    float out[ROW_TILES][TOKEN_TILES][2] = {};
    if (row_tile < row_tiles) {
        size_t base[ROW_TILES];
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) base[r] = (size_t)min(row_tile + r, row_tiles - 1) * tiles_k;
        Tile ring[DEPTH][ROW_TILES];
        // Weights do not depend on what came before in the stream.
#pragma unroll
        for (int d = 0; d < DEPTH; ++d)
#pragma unroll
            for (int r = 0; r < ROW_TILES; ++r)
                if (first + d < last) ring[d][r].request(weight, base[r] + first + d, lane);
        Widths widths;
#ifdef WIDTHS
#pragma unroll
        for (int q = 0; q < TOKEN_TILES; ++q) widths.of[q] = (int)row_widths[first_token + q * kTokens];
#endif
        wait_for_inputs();
        digits += (size_t)blockIdx.y * TOKEN_TILES * tiles_k * 64;
        scales += first_token;
        int segment = 0, segment_end = border(first_segment + 1);
        for (int k0 = first; k0 < last; k0 += DEPTH) {
#pragma unroll
            for (int d = 0; d < DEPTH; ++d) {
                const int k = k0 + d;
                if (k >= last) break;
                add_tile(ring[d], k, tiles_k, digits, scales, slots, has_token, widths, out);
#pragma unroll
                for (int r = 0; r < ROW_TILES; ++r)
                    if (k + DEPTH < last) ring[d][r].request(weight, base[r] + k + DEPTH, lane);
                if (SEGMENTS > 1 && k + 1 == segment_end) {
#pragma unroll
                    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
                        for (int q = 0; q < TOKEN_TILES; ++q)
#pragma unroll
                            for (int half = 0; half < 2; ++half) {
                                own_sums[segment * kOfSegment + ((r * TOKEN_TILES + q) * 2 + half) * 32 + lane] = out[r][q][half];
                                out[r][q][half] = 0.f;
                            }
                    ++segment;
                    segment_end = border(first_segment + segment + 1);
                }
            }
        }
    }
    if (SEGMENTS > 1) {
        wait_for_all();
        // All warps of these rows add, each some of the values.
        u32 sums[CLUSTER];
#pragma unroll
        for (int rank = 0; rank < CLUSTER; ++rank) sums[rank] = shared_of(row_sums, rank);
        for (int index = (blockIdx.x * COLUMN_WARPS + part) * 32 + lane; index < kOfSegment; index += CLUSTER * COLUMN_WARPS * 32) {
            float sum = 0.f;
#pragma unroll
            for (int at = 0; at < SEGMENTS; ++at)
                sum += load_shared(sums[at / kSegmentsOfBlock] + 4 * (at % kSegmentsOfBlock * kOfSegment + index));
            const int half = index / 32 % 2, q = index / 64 % TOKEN_TILES, r = index / (64 * TOKEN_TILES);
            if (row_tile + r < row_tiles)
                store(y, bias, first_token + q * kTokens + index % 4, (row_tile + r) * kRows + half * 8 + index % 32 / 4, tokens, rows, sum);
        }
        if (CLUSTER > 1) wait_for_all();  // nobody leaves while others read its sums
    } else {
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
            for (int q = 0; q < TOKEN_TILES; ++q)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    if (row_tile + r < row_tiles)
                        store(y, bias, first_token + q * kTokens + lane % 4, (row_tile + r) * kRows + half * 8 + lane / 4, tokens, rows, out[r][q][half]);
    }
}
