#include "stack.h"

#include <algorithm>
#include <cstdlib>

namespace anybit {
namespace {

// Tokens of one sequence attended together: they share the conversion of keys and values, and more would balance badly.
constexpr int64_t kTokenTile = 16;
constexpr int64_t kAlignment = 64;

int64_t divided_up(int64_t count, int64_t by) { return (count + by - 1) / by; }
int64_t aligned(int64_t bytes) { return divided_up(bytes, kAlignment) * kAlignment; }

// Memory for the activations of a linear. What few rows need is computed by every thread for itself, in memory of its
// own: faster than to wait for another one. Many rows are shared out.
class ActivationSpace {
  public:
    ActivationSpace(Workspace& space, int64_t rows, int64_t max_in_features, int threads)
        : is_private_(rows < threads), digits_stride_(aligned(rows * kDigits * max_in_features)),
          group_stride_(aligned(rows * (max_in_features / kSpanInputs) * (int64_t)sizeof(float)) / (int64_t)sizeof(float)) {
        const int64_t copies = is_private_ ? threads : 1;
        digits_ = space.digits.array<int8_t>(copies * digits_stride_);
        steps_ = space.steps.array<float>(copies * group_stride_);
        totals_ = space.totals.array<float>(copies * group_stride_);
    }

    bool is_private() const { return is_private_; }
    int copy_of(const Team& team) const { return is_private_ ? team.index() : 0; }
    int8_t* digits(const Team& team) const { return digits_ + copy_of(team) * digits_stride_; }
    float* steps(const Team& team) const { return steps_ + copy_of(team) * group_stride_; }
    float* totals(const Team& team) const { return totals_ + copy_of(team) * group_stride_; }

  private:
    bool is_private_;
    int64_t digits_stride_, group_stride_;
    int8_t* digits_;
    float *steps_, *totals_;
};

// One thread's part of linears over a batch. `prepare` turns rows into the input of the next linear; see ActivationSpace.
class LinearTask {
  public:
    LinearTask(const Kernels& kernels, Team& team, const ActivationSpace& space, uint8_t* scratch, int64_t rows,
               const Segment* segments, int64_t num_segments)
        : kernels_(kernels), team_(team), space_(space), scratch_(scratch), rows_(rows), segments_(segments),
          num_segments_(num_segments) {}

    // Calls fill(first, last), which gives rows first .. last-1 of x [rows, in], and quantizes them for `weight`.
    template <typename Fill>
    void prepare(const Weight& weight, const float* x, const Fill& fill) {
        const int64_t first = space_.is_private() ? 0 : team_.first(rows_);
        const int64_t last = space_.is_private() ? rows_ : team_.last(rows_);
        fill(first, last);
        kernels_.quantize(x, first, last, weight.in_features, weight.group_size, space_.digits(team_), space_.steps(team_),
                          space_.totals(team_));
        if (!space_.is_private()) team_.wait_for_all();
    }

    // This thread's outputs for what `prepare` made; they are whole for all once the threads have met.
    void run(const Linear& linear, bool accumulate, float* y) {
        const int64_t blocks = linear.weight->num_blocks();
        const Activations x = {space_.digits(team_), space_.steps(team_), space_.totals(team_)};
        kernels_.linear(*linear.weight, x, segments_, num_segments_, linear.bias, accumulate, y, team_.first(blocks),
                        team_.last(blocks), scratch_);
    }

  private:
    const Kernels& kernels_;
    Team& team_;
    const ActivationSpace& space_;
    uint8_t* scratch_;
    int64_t rows_;
    const Segment* segments_;
    int64_t num_segments_;
};

// All threads' attention in one layer. A prompt's tokens are taken tile by tile, each tile by one thread; single tokens
// run by run of their history, which many threads can do at once, and whose results are merged in the same order.
class AttentionTask {
  public:
    AttentionTask(const Kernels& kernels, Workspace& space, const Model& model, const Batch& batch, int threads)
        : kernels_(kernels), model_(model), batch_(batch), queries_(model.num_heads / model.num_kv_heads) {
        num_tiles_ = num_merges_ = 0;
        int64_t states = 0;
        for (int64_t index = 0; index < batch.num_groups; ++index) {
            const AttentionGroup& group = batch.groups[index];
            const int64_t items = group.num_seqs * model.num_kv_heads;
            if (is_split(group)) {
                num_tiles_ += items * num_runs(group);
                num_merges_ += items;
                states += items * num_runs(group) * queries_;
            } else {
                num_tiles_ += items * divided_up(group.num_tokens, kTokenTile);
            }
        }
        const int64_t state = state_floats(model.head_dim), tile_queries = kTokenTile * queries_;
        attend_floats_ = attend_scratch_floats(tile_queries);
        scratch_stride_ = attend_floats_ + 2 * tile_queries * state;
        scratch_ = space.states.array<float>(scratch_stride_ * threads + states * state);
        run_states_ = scratch_ + scratch_stride_ * threads;
    }

    // This thread's part; the results are whole for all once the threads have met.
    void run(Team& team, const Layer& layer, const Pages& pages, const float* qkv, float* out) {
        float* scratch = scratch_ + scratch_stride_ * team.index();
        // Every thread's fair share, later items (with the longer histories) spread evenly among them.
        for (int64_t index = team.index(); index < num_tiles_; index += team.size()) attend(layer, pages, qkv, out, index, scratch);
        if (num_merges_ == 0) return;
        team.wait_for_all();
        for (int64_t index = team.first(num_merges_); index < team.last(num_merges_); ++index) merge(pages, index, out);
    }

  private:
    static bool is_split(const AttentionGroup& group) { return group.num_tokens == 1; }
    static int64_t num_runs(const AttentionGroup& group) { return divided_up(group.max_pages, kRunPages); }

    void attend(const Layer& layer, const Pages& pages, const float* qkv, float* out, int64_t index, float* scratch) {
        float* run_states = run_states_;
        for (int64_t number = 0; number < batch_.num_groups; ++number) {
            const AttentionGroup& group = batch_.groups[number];
            const int64_t runs = num_runs(group), tiles = divided_up(group.num_tokens, kTokenTile);
            const int64_t parts = is_split(group) ? runs : tiles, items = group.num_seqs * model_.num_kv_heads * parts;
            if (index >= items) {
                index -= items;
                if (is_split(group)) run_states += items * queries_ * state_floats(model_.head_dim);
                continue;
            }
            const int64_t part = index % parts, item_index = index / parts;
            AttentionItem item = {item_index / model_.num_kv_heads, item_index % model_.num_kv_heads, 0, 1};
            if (is_split(group)) {
                kernels_.attend(model_, layer, batch_, pages, group, item, part, qkv,
                                run_states + index * queries_ * state_floats(model_.head_dim), scratch);
                return;
            }
            item.first = part * kTokenTile;
            item.last = std::min(item.first + kTokenTile, group.num_tokens);
            attend_tile(layer, pages, qkv, out, group, item, runs, scratch);
            return;
        }
    }

    void attend_tile(const Layer& layer, const Pages& pages, const float* qkv, float* out, const AttentionGroup& group,
                     const AttentionItem& item, int64_t runs, float* scratch) {
        const int64_t count = (item.last - item.first) * queries_, floats = count * state_floats(model_.head_dim);
        float* total = scratch + attend_floats_;
        float* own = total + floats;
        const int64_t last_position = batch_.positions[group.row_ids[item.seq * group.num_tokens + item.last - 1]];
        for (int64_t run = 0; run < runs && run * kRunPages * kPageTokens <= last_position; ++run) {
            kernels_.attend(model_, layer, batch_, pages, group, item, run, qkv, run == 0 ? total : own, scratch);
            if (run > 0) kernels_.merge_states(total, own, count, model_.head_dim);
        }
        kernels_.write_attended(model_, pages, group, item, total, out);
    }

    void merge(const Pages& pages, int64_t index, float* out) {
        const int64_t floats = queries_ * state_floats(model_.head_dim);
        float* states = run_states_;
        for (int64_t number = 0; number < batch_.num_groups; ++number) {
            const AttentionGroup& group = batch_.groups[number];
            if (!is_split(group)) continue;
            const int64_t runs = num_runs(group), items = group.num_seqs * model_.num_kv_heads;
            if (index >= items) {
                index -= items;
                states += items * runs * floats;
                continue;
            }
            states += index * runs * floats;
            for (int64_t run = 1; run < runs; ++run)
                kernels_.merge_states(states, states + run * floats, queries_, model_.head_dim);
            const AttentionItem item = {index / model_.num_kv_heads, index % model_.num_kv_heads, 0, 1};
            kernels_.write_attended(model_, pages, group, item, states, out);
            return;
        }
    }

    const Kernels& kernels_;
    const Model& model_;
    const Batch& batch_;
    int64_t queries_;  // per key head
    int64_t num_tiles_, num_merges_, attend_floats_, scratch_stride_;
    float *scratch_, *run_states_;
};

}  // namespace

void* Buffer::at_least(size_t bytes) {
    if (bytes > size_) {
        std::free(memory_);
        size_ = (bytes + 4095) / 4096 * 4096;
        memory_ = std::aligned_alloc(kAlignment, size_);
    }
    return memory_;
}

void run_linear(const Kernels& kernels, Workers& workers, Workspace& space, const Linear& linear, const float* x,
                int64_t rows, const Segment* segments, int64_t num_segments, float* y) {
    const ActivationSpace activations(space, rows, linear.weight->in_features, workers.size());
    const int64_t scratch_bytes = linear_scratch_bytes(rows);
    uint8_t* scratch = space.scratch.array<uint8_t>(scratch_bytes * workers.size());
    workers.each([&](Team& team) {
        LinearTask task(kernels, team, activations, scratch + scratch_bytes * team.index(), rows, segments, num_segments);
        task.prepare(*linear.weight, x, [](int64_t, int64_t) {});
        task.run(linear, false, y);
    });
}

void run_stack(const Kernels& kernels, Workers& workers, Workspace& space, const Model& model, const Batch& batch,
               const Pages* pages, float* hidden) {
    const int64_t rows = batch.rows, hidden_size = model.hidden_size, inner = model.intermediate_size;
    const int64_t heads_size = model.num_heads * model.head_dim;
    const int64_t qkv_size = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim;
    const ActivationSpace activations(space, rows, std::max({hidden_size, inner, heads_size}), workers.size());
    AttentionTask attention(kernels, space, model, batch, workers.size());
    const int64_t scratch_bytes = linear_scratch_bytes(rows);
    uint8_t* scratch = space.scratch.array<uint8_t>(scratch_bytes * workers.size());
    // Rows that every thread computes for itself go to memory of its own.
    const int64_t copies = activations.is_private() ? workers.size() : 1;
    float* all_normed = space.normed.array<float>(copies * rows * hidden_size);
    float* all_gated = space.gated.array<float>(copies * rows * inner);
    float* update = space.update.array<float>(rows * hidden_size);
    float* qkv = space.projected.array<float>(rows * qkv_size);
    float* attended = space.attended.array<float>(rows * heads_size);
    float* gate_up = space.gate_up.array<float>(rows * 2 * inner);

    workers.each([&](Team& team) {
        LinearTask task(kernels, team, activations, scratch + scratch_bytes * team.index(), rows, batch.segments,
                        batch.num_segments);
        float* normed = all_normed + activations.copy_of(team) * rows * hidden_size;
        float* gated = all_gated + activations.copy_of(team) * rows * inner;

        const auto prepare_normed = [&](const Weight& weight, const float* norm) {
            task.prepare(weight, normed, [&](int64_t first, int64_t last) {
                kernels.rms_norm(hidden, norm, first, last, hidden_size, model.norm_eps, normed);
            });
        };
        // hidden += linear(...), with a norm in between in some families.
        const auto add_update = [&](const Linear& linear, const float* output_norm) {
            task.run(linear, output_norm == nullptr, output_norm == nullptr ? hidden : update);
            team.wait_for_all();
            if (output_norm == nullptr) return;
            const int64_t first = team.first(rows), last = team.last(rows);
            kernels.rms_norm(update, output_norm, first, last, hidden_size, model.norm_eps, update);
            kernels.add(hidden, update, first * hidden_size, last * hidden_size);
            team.wait_for_all();
        };

        for (int64_t index = 0; index < model.num_layers; ++index) {
            const Layer& layer = model.layers[index];
            prepare_normed(*layer.qkv.weight, layer.attention_norm);
            task.run(layer.qkv, false, qkv);
            team.wait_for_all();
            kernels.rotate_and_write(model, layer, batch, pages[index], qkv, team.first(rows), team.last(rows));
            team.wait_for_all();
            attention.run(team, layer, pages[index], qkv, attended);
            team.wait_for_all();
            task.prepare(*layer.output.weight, attended, [](int64_t, int64_t) {});
            add_update(layer.output, layer.attention_output_norm);
            prepare_normed(*layer.gate_up.weight, layer.mlp_norm);
            task.run(layer.gate_up, false, gate_up);
            team.wait_for_all();
            task.prepare(*layer.down.weight, gated, [&](int64_t first, int64_t last) {
                kernels.gate(model.activation, gate_up, first, last, inner, gated);
            });
            add_update(layer.down, layer.mlp_output_norm);
        }
    });
}

void run_seals(const Kernels& kernels, Workers& workers, const Model& model, const Pages* pages, const Seals& seals) {
    const int64_t heads = model.num_kv_heads, dim = model.head_dim;
    workers.each([&](Team& team) {
        const int64_t records = model.num_layers * seals.count * heads;
        for (int64_t index = team.first(records); index < team.last(records); ++index) {
            const Pages& exact = pages[index / heads / seals.count];
            const SealedPages& sealed = exact.sealed[seals.sealed];
            const int64_t number = index / heads % seals.count, head = index % heads;
            const int64_t from = (seals.exact_pages[number] * heads + head) * kPageTokens * dim * exact.number_bytes;
            const int64_t to = seals.sealed_pages[number] * heads + head;
            kernels.seal(sealed.key_code, exact.keys + from, exact.number_bytes, dim, sealed.keys + to * sealed.key_bytes);
            kernels.seal(sealed.value_code, exact.values + from, exact.number_bytes, dim, sealed.values + to * sealed.value_bytes);
        }
    });
}

}  // namespace anybit
