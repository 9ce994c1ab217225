// Sums of a warp over pages and splits.
#pragma once
#include "sealed_pages.cuh"

namespace nested {

// Sums of a warp's columns in registers.
struct RunningSums : ValueSums<kNarrow> {
    Merged norms[2];

    __device__ RunningSums() { clear(); }
    __device__ void add(const ColumnSums<kNarrow>& state) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float2 factors = norms[i].add(state.largest[i], of_eight_sum(state.norm[i]));
#pragma unroll
            for (int product = 0; product < kProducts; ++product)
#pragma unroll
                for (int j = 0; j < kValueTiles; ++j)
#pragma unroll
                    for (int k = i; k < 4; k += 2) sums[product][j][k] = merged(sums[product][j][k], state.sums[product][j][k], factors);
        }
    }
};

// Sums of a warp's columns in shared memory, four numbers of a lane side by side.
struct StoredSums {
    static constexpr int kPlaces = 2 * kValueTiles;  // of a lane
    float4* place;
    Merged norms[2];

    __device__ explicit StoredSums(void* memory) : place(reinterpret_cast<float4*>(memory) + (threadIdx.x & 31)) {}
    __device__ void clear() {
        for (int j = 0; j < kPlaces; ++j) place[j * 32] = make_float4(0.f, 0.f, 0.f, 0.f);
        norms[0] = norms[1] = Merged();
    }
    __device__ void add(int j, float4 added, float2 even, float2 odd) {
        float4& sum = place[j * 32];
        sum = make_float4(merged(sum.x, added.x, even), merged(sum.y, added.y, odd), merged(sum.z, added.z, even), merged(sum.w, added.w, odd));
    }
    __device__ void add(const ColumnSums<false>& state) {
        const float2 even = norms[0].add(state.largest[0], of_eight_sum(state.norm[0]));
        const float2 odd = norms[1].add(state.largest[1], of_eight_sum(state.norm[1]));
#pragma unroll
        for (int j = 0; j < kPlaces; ++j) {
            const float (&sum)[4] = state.sums[j / kValueTiles][j % kValueTiles];
            add(j, make_float4(sum[0], sum[1], sum[2], sum[3]), even, odd);
        }
    }
    __device__ void add(const StoredSums& other) {
        const float2 even = norms[0].add(other.norms[0].largest, other.norms[0].norm);
        const float2 odd = norms[1].add(other.norms[1].largest, other.norms[1].norm);
        for (int j = 0; j < kPlaces; ++j) add(j, other.place[j * 32], even, odd);
    }
    // The two dimensions of value pair g * kValuePairs + pair of column 2c + i.
    __device__ float2 of(int pair, int i) const {
        const float4 first = place[pair / 2 * 32], second = place[(kValueTiles + pair / 2) * 32];
        if (pair % 2 == 0) return i == 0 ? make_float2(first.x, second.x) : make_float2(first.y, second.y);
        return i == 0 ? make_float2(first.z, second.z) : make_float2(first.w, second.w);
    }
};

// Pages begin .. end - 1 of a sequence, at most a split.
__device__ inline void attend_split(const SealedProblem& problem, const ColumnQueries& queries, const u32* tables, int sequence, int kv_head,
                                    int begin, int end, StoredSums& sums) {
    sums.clear();
    for (int page = begin; page < end; ++page) {
        ColumnSums<false> state;
        const auto read = [&]() -> const ColumnQueries& { return queries; };
        attend_sealed_page(problem, tables, sequence, kv_head, page, state, read, [&] {
            if (page + 1 < end) fetch_page(problem, sequence, kv_head, page + 1, false);
        });
        sums.add(state);
    }
}

}  // namespace nested
