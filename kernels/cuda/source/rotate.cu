// Heads as attention takes them: queries to a tensor, keys and values to their pages.
#include "heads.cuh"

using namespace nested;

constexpr int kWarps = 4;

// A grid of (heads / kWarps, rows); q is [rows, heads, HEAD_DIM].
extern "C" __global__ void __launch_bounds__(kWarps * 32)
rotate_and_store(Projected projected, Value* q) {
    launch_dependents();
    const int lane = threadIdx.x & 31, number = blockIdx.x * kWarps + threadIdx.x / 32;
    const bool exists = number < projected.heads + 2 * projected.kv_heads;
    const Head head(projected, blockIdx.y, exists ? number : 0);
    const HeadFrame frame(projected, head.row, head.kv_head);
    wait_for_inputs();
    if (!exists) return;
    float x[kLaneDims];
    head.read(projected, x);
    head.finish(projected, frame, x);
    if (head.is_query) {
        Value* to = q + (head.row * projected.heads + number) * HEAD_DIM;
#pragma unroll
        for (int i = 0; i < kLaneDims; ++i) to[lane + 32 * i] = to_value(x[i]);
    } else {
        Stored* to = head.place(projected);
#pragma unroll
        for (int i = 0; i < kLaneDims; ++i) to[lane + 32 * i] = to_stored(x[i]);
    }
}
