// Rows of a nested table as floats, one block per row.
#include "nested.cuh"

using namespace nested;

__device__ inline u32 code_of(const Weight& weight, size_t tile, int lane, int step, int j, int byte) {
    const size_t place = tile * 32 + lane;
    const int row = 4 * (j % 2);
    const auto two = [&](const uint4* stream, int first) {
        return reinterpret_cast<const u8*>(stream + place)[step * 4 + byte] >> (row + first) & 3u;
    };
    const auto one = [&](const uint2* stream, int first) {
        return reinterpret_cast<const u8*>(stream + place)[step / 2 * 4 + byte] >> (row + first + 2 * (step % 2)) & 1u;
    };
    const int columns = j / 2;  // the first or the last 16 of a step
    u32 high = two(weight.c2, 2 - 2 * columns), low = 0;
    if (kHasC3) high = high << 1 | one(weight.c3, 1 - columns);
    if (kHasC4) high = high << 1 | one(weight.c4, columns);
    if (kHasC6) low = two(weight.c6, 2 - 2 * columns);
    if (kHasC8) low = low << 2 | two(weight.c8, 2 * columns);
    return high | low << 8;
}

extern "C" __global__ void nested_embedding(Weight weight, const long long* row_ids, float* out, int columns, int tiles_k) {
    launch_dependents();
    wait_for_inputs();
    const long long row = row_ids[blockIdx.x];
    const int in_tile = (int)(row % kRows);
    for (int column = threadIdx.x; column < columns; column += blockDim.x) {
        const int in_columns = column % kColumns, step = in_columns / 32, in_step = in_columns % 32;
        const size_t tile = (size_t)(row / kRows) * tiles_k + column / kColumns;
        const u32 code = code_of(weight, tile, in_tile % 8 * 4 + in_step % 16 / 4, step, in_tile / 8 + in_step / 16 * 2, in_step % 4);
        const size_t part = (tile * kGroups + in_columns / GROUP) * kRows + in_tile;
        const float2 high = part_floats(weight.high[part]);
        float value = high.x * (float)(code & 255);
        if (kHasLow) {
            const float2 low = part_floats(weight.low[part]);
            value = value + low.x * (float)(code >> 8) + low.y;
        } else {
            value += high.y;
        }
        out[(size_t)blockIdx.x * columns + column] = value;
    }
}
