// Attention of several new tokens a sequence over paged bfloat16 keys and values.
#include "attention_pages.cuh"

using namespace nested;

// A grid of (row tiles / kWarps, kv heads, sequences); a warp takes 16 rows through all pages.
// Shared memory: [warps][2][kValueBlocks][8][4][32 lanes] floats, the sums of a split and those of all before it.
extern "C" __global__ void __launch_bounds__(kWarps * 32)
attend_rows(Problem problem) {
    launch_dependents();
    wait_for_inputs();
    extern __shared__ float shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, sequence = blockIdx.z, kv_head = blockIdx.y;
    // The last rows have most to do, so they begin first.
    const int first_row = ((gridDim.x - 1 - blockIdx.x) * kWarps + warp) * kTileRows;
    const int group = problem.heads / problem.kv_heads;
    if (first_row >= problem.tokens * group) return;
    Queries queries;
    queries.read(problem, sequence, kv_head, first_row);
    const int last_position = queries.last(), last_page = last_position / kPage;
    float* of_split = shared + 2 * warp * kSumsOfPage + lane;
    float* of_all = of_split + kSumsOfPage;
    for (int i = 0; i < kValueBlocks * 32; ++i) of_all[i * 32] = 0.f;
    Merged all[2];
    for (int page = first_page(problem, queries.first()); page <= last_page;) {
        for (int i = 0; i < kValueBlocks * 32; ++i) of_split[i * 32] = 0.f;
        Merged pages[2];
        for (const int end = min((page / kSplitPages + 1) * kSplitPages, last_page + 1); page < end; ++page) {
            Attended<1> attended;
            attended.attend(problem, queries, PageInMemory(problem, sequence, kv_head, page), page * kPage, last_position, 0, {});
            const float2 factors[2] = {pages[0].add(attended.largest[0], attended.norm[0]), pages[1].add(attended.largest[1], attended.norm[1])};
#pragma unroll
            for (int block = 0; block < kValueBlocks; ++block)
#pragma unroll
                for (int j = 0; j < 8; ++j)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float& sum = of_split[((block * 8 + j) * 4 + i) * 32];
                        sum = merged(sum, attended.sum[block][j][i], factors[i / 2]);
                    }
        }
        const float2 factors[2] = {all[0].add(pages[0].largest, pages[0].norm), all[1].add(pages[1].largest, pages[1].norm)};
        for (int i = 0; i < kValueBlocks * 32; ++i) of_all[i * 32] = merged(of_all[i * 32], of_split[i * 32], factors[i % 4 / 2]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = first_row + lane / 4 + 8 * half, token = row / group, head = kv_head * group + row % group;
        if (token >= problem.tokens) continue;
        Value* to = problem.out + (((size_t)sequence * problem.tokens + token) * problem.heads + head) * HEAD_DIM;
        for (int block = 0; block < kValueBlocks; ++block)
            for (int i = 0; i < 2; ++i)
                for (int j = 0; j < 8; ++j)
                    to[64 * block + 8 * (2 * (lane % 4) + i) + j] =
                        to_value(__fdiv_rn(of_all[((block * 8 + j) * 4 + 2 * half + i) * 32], all[half].norm));
    }
}
