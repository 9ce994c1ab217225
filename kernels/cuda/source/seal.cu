// Encodes full pages of keys and values as records, as kvcache/codec/pages.py does, for all layers at once.
//
// A block takes the keys or the values of one page, KV head and layer.
#include "seal_uniform.cuh"

using namespace nested;

#ifndef KEY_CLUSTERS  // in which the entries of the table lie, of which the nearest is chosen first; one: there are none
#define KEY_CLUSTERS 1
#endif
#ifndef VALUE_CLUSTERS
#define VALUE_CLUSTERS 1
#endif

using KeySealer = PageSealer<KEY_BITS, KEY_CLUSTERS, true>;
using ValueSealer = PageSealer<VALUE_BITS, VALUE_CLUSTERS, false>;

struct SealProblem {
    const __nv_bfloat16* own_keys;  // of each layer [slots, kv heads, kPage, HEAD_DIM]
    const __nv_bfloat16* own_values;
    const long long* layers;  // [layers]: whose own pages they are
    u8* const* records;       // [layers, 2]: keys [pages, kv heads, KeyRecord::kBytes], and values
    const float2* key_entries;  // [2^(KEY_BITS - 1)], of ordered pairs
    const float2* key_clusters;
    const float2* value_entries;
    const float2* value_clusters;
    const long long* slots;  // [pages]: own pages, and where they are sealed
    const long long* page_ids;
    const long long* first_slots;  // own pages whose first tokens are kept as they are, and where
    const long long* first_page_ids;
    long long layer_stride;  // numbers from one layer's own pages to the next one's
    int pages, kv_heads, exact_tokens;
};

union Workspace {
    KeySealer::Workspace keys;
    ValueSealer::Workspace values;
};

// A grid of (pages to seal, then those with first tokens, x kv heads; keys and values; layers).
extern "C" __global__ void __launch_bounds__(kSealThreads, 2)
seal_pages(SealProblem problem) {
    __shared__ Workspace workspace;
    // Attention reads sealed pages before what came before it has ended, so nothing may begin before these are sealed.
    const bool is_value = blockIdx.y == 1, is_first = blockIdx.x >= problem.pages * problem.kv_heads;
    const int index = blockIdx.x - (is_first ? problem.pages * problem.kv_heads : 0);
    const int number = index / problem.kv_heads, kv_head = index % problem.kv_heads;
    if (!is_first) {
        if (is_value) {
            ValueSealer::prepare(workspace.values, problem.value_entries, problem.value_clusters);
        } else {
            KeySealer::prepare(workspace.keys, problem.key_entries, problem.key_clusters);
        }
    }
    wait_for_inputs();
    const size_t slot = (is_first ? problem.first_slots : problem.slots)[number];
    const size_t page_id = (is_first ? problem.first_page_ids : problem.page_ids)[number];
    const __nv_bfloat16* rows = (is_value ? problem.own_values : problem.own_keys) + problem.layers[blockIdx.z] * problem.layer_stride +
                                (slot * problem.kv_heads + kv_head) * kPage * HEAD_DIM;
    u8* record = problem.records[2 * blockIdx.z + is_value] +
                 (page_id * problem.kv_heads + kv_head) * (is_value ? ValueRecord::kBytes : KeyRecord::kBytes);
    if (is_first) {
        for (int i = threadIdx.x; i < problem.exact_tokens * HEAD_DIM / 8; i += kSealThreads)
            reinterpret_cast<uint4*>(record)[i] = load_operand(rows + 8 * i);
    } else if (is_value) {
        ValueSealer::seal(rows, workspace.values, record);
    } else {
        KeySealer::seal(rows, workspace.keys, record);
    }
}
