// Runs linears, and all layers of a decoder over one batch.

#pragma once

#include "model.h"
#include "threads.h"

namespace anybit {

// Memory that grows to the largest call and stays.
class Buffer {
  public:
    void* at_least(size_t bytes);
    template <typename Number>
    Number* array(int64_t count) {
        return static_cast<Number*>(at_least((size_t)count * sizeof(Number)));
    }

  private:
    void* memory_ = nullptr;
    size_t size_ = 0;
};

// Memory of the operations between calls.
struct Workspace {
    Buffer digits, steps, totals, scratch;                      // of a linear
    Buffer normed, projected, attended, gate_up, gated, update;  // of a layer
    Buffer states;                                              // of attention
    Buffer likeliest;                                           // of sampling
};

// y [rows, out] = x [rows, in] times the weight (+ bias), each segment at its width.
void run_linear(const Kernels& kernels, Workers& workers, Workspace& space, const Linear& linear, const float* x,
                int64_t rows, const Segment* segments, int64_t num_segments, float* y);

// hidden [rows, hidden_size] through all layers, in place; pages holds one entry per layer.
void run_stack(const Kernels& kernels, Workers& workers, Workspace& space, const Model& model, const Batch& batch,
               const Pages* pages, float* hidden);

// Encodes pages of all layers; pages holds one entry per layer.
void run_seals(const Kernels& kernels, Workers& workers, const Model& model, const Pages* pages, const Seals& seals);

}  // namespace anybit
