#include "stack.h"

#include <atomic>
#include <cstdlib>

namespace anybit {
namespace {

// Tokens of one sequence attended together: they share the conversion of a page, and more would balance badly.
constexpr int64_t kTokenTile = 32;
// Fewer numbers than this are faster on one thread than shared out.
constexpr int64_t kWorthSharing = 16384;

int64_t tiles(int64_t tokens) { return (tokens + kTokenTile - 1) / kTokenTile; }

// Calls work(first, last) so that every row is done once, on all threads where that pays.
template <typename Work>
void over_rows(Workers& workers, int64_t rows, int64_t numbers_per_row, const Work& work) {
    if (rows == 1 || rows * numbers_per_row < kWorthSharing) {
        work(0, rows);
        return;
    }
    workers.each([&](int index, int threads) { work(share(rows, index, threads), share(rows, index + 1, threads)); });
}

void attend_all(const Kernels& kernels, Workers& workers, Workspace& space, const Model& model, const Layer& layer,
                const Batch& batch, const Pages& pages, const float* qkv, float* out) {
    const int64_t queries = kTokenTile * (model.num_heads / model.num_kv_heads);
    const int64_t floats = 2 * kPageTokens * model.head_dim + queries * (model.head_dim + 2);
    const int64_t stride = (floats + 15) / 16 * 16;
    float* scratch = space.heads.array<float>(stride * workers.size());
    std::atomic<int64_t> next{0};
    // Items differ in length with the history behind them, so threads take one after the other.
    workers.each([&](int thread, int) {
        for (int64_t item = next.fetch_add(1);; item = next.fetch_add(1)) {
            int64_t rest = item, group_index = 0;
            for (; group_index < batch.num_groups; ++group_index) {
                const AttentionGroup& group = batch.groups[group_index];
                const int64_t items = group.num_seqs * model.num_kv_heads * tiles(group.num_tokens);
                if (rest < items) break;
                rest -= items;
            }
            if (group_index == batch.num_groups) return;
            const AttentionGroup& group = batch.groups[group_index];
            const int64_t tile = rest % tiles(group.num_tokens);
            const int64_t head = rest / tiles(group.num_tokens) % model.num_kv_heads;
            const int64_t seq = rest / tiles(group.num_tokens) / model.num_kv_heads;
            const int64_t first = tile * kTokenTile;
            const int64_t last = first + kTokenTile < group.num_tokens ? first + kTokenTile : group.num_tokens;
            kernels.attend(model, layer, batch, pages, group, seq, head, first, last, qkv, out,
                           scratch + stride * thread);
        }
    });
}

}  // namespace

void* Buffer::at_least(size_t bytes) {
    if (bytes > size_) {
        std::free(memory_);
        size_ = (bytes + 4095) / 4096 * 4096;
        memory_ = std::aligned_alloc(64, size_);
    }
    return memory_;
}

int64_t share(int64_t count, int index, int threads) { return count * index / threads; }

void run_linear(const Kernels& kernels, Workers& workers, Workspace& space, const Linear& linear, const float* x,
                int64_t rows, const Segment* segments, int64_t num_segments, float* y) {
    const Weight& weight = *linear.weight;
    const int64_t in_features = weight.in_features, groups = weight.num_groups(), blocks = weight.num_blocks();
    const int64_t scratch_bytes = 2 * kBlockRows * in_features;
    int8_t* q = space.quantized.array<int8_t>(rows * in_features);
    float* step = space.steps.array<float>(rows * weight.num_spans());
    float* total = space.totals.array<float>(rows * groups);
    uint8_t* decoded = space.decoded.array<uint8_t>(scratch_bytes * workers.size());
    over_rows(workers, rows, in_features, [&](int64_t first, int64_t last) {
        kernels.quantize(x, first, last, in_features, weight.group_size, q, step, total);
    });
    const Activations activations = {q, step, total};
    workers.each([&](int index, int threads) {
        kernels.linear(weight, activations, segments, num_segments, linear.bias, y, share(blocks, index, threads),
                       share(blocks, index + 1, threads), decoded + scratch_bytes * index);
    });
}

void run_stack(const Kernels& kernels, Workers& workers, Workspace& space, const Model& model, const Batch& batch,
               const Pages* pages, float* hidden) {
    const int64_t rows = batch.rows, hidden_size = model.hidden_size, inner = model.intermediate_size;
    const int64_t heads_size = model.num_heads * model.head_dim;
    const int64_t qkv_size = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim;
    float* normed = space.normed.array<float>(rows * hidden_size);
    float* update = space.update.array<float>(rows * hidden_size);
    float* qkv = space.projected.array<float>(rows * qkv_size);
    float* attended = space.attended.array<float>(rows * heads_size);
    float* gate_up = space.gate_up.array<float>(rows * 2 * inner);
    float* gated = space.gated.array<float>(rows * inner);

    const auto norm = [&](const float* x, const float* weight, float* out) {
        over_rows(workers, rows, hidden_size, [&](int64_t first, int64_t last) {
            kernels.rms_norm(x, weight, first, last, hidden_size, model.norm_eps, out);
        });
    };
    const auto linear = [&](const Linear& layer, const float* x, float* y) {
        run_linear(kernels, workers, space, layer, x, rows, batch.segments, batch.num_segments, y);
    };
    const auto add_update = [&](const float* output_norm) {
        if (output_norm != nullptr) norm(update, output_norm, update);
        over_rows(workers, rows, hidden_size, [&](int64_t first, int64_t last) {
            kernels.add(hidden, update, first * hidden_size, last * hidden_size);
        });
    };
    for (int64_t index = 0; index < model.num_layers; ++index) {
        const Layer& layer = model.layers[index];
        norm(hidden, layer.attention_norm, normed);
        linear(layer.qkv, normed, qkv);
        over_rows(workers, rows, qkv_size, [&](int64_t first, int64_t last) {
            kernels.rotate_and_write(model, layer, batch, pages[index], qkv, first, last);
        });
        attend_all(kernels, workers, space, model, layer, batch, pages[index], qkv, attended);
        linear(layer.output, attended, update);
        add_update(layer.attention_output_norm);
        norm(hidden, layer.mlp_norm, normed);
        linear(layer.gate_up, normed, gate_up);
        over_rows(workers, rows, 2 * inner, [&](int64_t first, int64_t last) {
            kernels.gate(model.activation, gate_up, first, last, inner, gated);
        });
        linear(layer.down, gated, update);
        add_update(layer.mlp_output_norm);
    }
}

}  // namespace anybit
