// What Python calls, by plain C types; `kernels/cpu/bindings.py` declares the other side. The interpreter lock is free meanwhile.

#include <Python.h>

#include <atomic>
#include <cstring>
#include <mutex>

#include "packing.h"
#include "stack.h"

namespace anybit {
namespace {

bool runs_here(const Kernels* kernels) {
    if (kernels == nullptr) return false;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (kernels == avx2_kernels()) return avx2;
#if !defined(__clang__) || __clang_major__ >= 19
    if (kernels == avx2_vnni_kernels()) return avx2 && __builtin_cpu_supports("avxvnni");
#endif
    if (kernels == avx512_kernels()) return avx512;
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    if (kernels == avx512_vnni_kernels()) return vnni;
    if (kernels == avx512_vbmi_kernels()) return vnni && __builtin_cpu_supports("avx512vbmi");
#endif
    return true;
}

// The best first.
const Kernels* candidate(int index) {
    switch (index) {
        case 0: return avx512_vbmi_kernels();
        case 1: return avx512_vnni_kernels();
        case 2: return avx512_kernels();
        case 3: return avx2_vnni_kernels();
        case 4: return avx2_kernels();
        default: return scalar_kernels();
    }
}
constexpr int kNumCandidates = 6;

const Kernels* selected = nullptr;
std::mutex in_use;  // one operation at a time: they share the threads and the workspace

const Kernels& kernels() {
    for (int index = 0; selected == nullptr; ++index)
        if (runs_here(candidate(index))) selected = candidate(index);
    return *selected;
}

Workspace workspace;

}  // namespace
}  // namespace anybit

using namespace anybit;

extern "C" {

// Name of an instruction set that runs here, the best at index 0; null behind the last.
const char* anybit_available(int index) {
    for (int next = 0; next < kNumCandidates; ++next)
        if (runs_here(candidate(next)) && index-- == 0) return candidate(next)->name;
    return nullptr;
}

// Use another instruction set; 0 if it is there and runs here.
int anybit_select(const char* name) {
    for (int index = 0; index < kNumCandidates; ++index)
        if (runs_here(candidate(index)) && std::strcmp(candidate(index)->name, name) == 0) {
            std::lock_guard<std::mutex> lock(in_use);
            selected = candidate(index);
            return 0;
        }
    return -1;
}

const char* anybit_selected() { return kernels().name; }

int anybit_get_threads() { return Workers::instance().size(); }

void anybit_set_threads(int count) {
    std::lock_guard<std::mutex> lock(in_use);
    Workers::instance().resize(count);
}

void anybit_pack_chunk(const uint8_t* canonical, int64_t stored_rows, int64_t in_features, int chunk, int64_t blocks,
                       uint8_t* packed) {
    std::lock_guard<std::mutex> lock(in_use);
    Workers::instance().each([&](Team& team) {
        pack_chunk(canonical, stored_rows, in_features, chunk, packed, team.first(blocks), team.last(blocks));
    });
}

void anybit_pack_part(const uint8_t* canonical, int64_t stored_rows, int64_t groups, int64_t float_bytes,
                      int64_t blocks, uint8_t* packed) {
    pack_part(canonical, stored_rows, groups, float_bytes, packed, blocks);
}

// y [rows, out] = x [rows, in] times the weight, each segment at its width; bias [out] or null.
void anybit_linear(const Weight* weight, const float* x, int64_t rows, const Segment* segments, int64_t num_segments,
                   const float* bias, float* y) {
    std::lock_guard<std::mutex> lock(in_use);
    run_linear(kernels(), Workers::instance(), workspace, Linear{weight, bias}, x, rows, segments, num_segments, y);
}

// hidden [rows, hidden_size] through all layers, in place; pages holds one entry per layer.
void anybit_stack(const Model* model, const Batch* batch, const Pages* pages, float* hidden) {
    std::lock_guard<std::mutex> lock(in_use);
    run_stack(kernels(), Workers::instance(), workspace, *model, *batch, pages, hidden);
}

void anybit_seal(const Model* model, const Pages* pages, const Seals* seals) {
    std::lock_guard<std::mutex> lock(in_use);
    run_seals(kernels(), Workers::instance(), *model, pages, *seals);
}

// out [count, in]: rows of the weight as floats.
void anybit_embedding(const Weight* weight, int64_t bit_width, const int64_t* rows, int64_t count, float* out) {
    std::lock_guard<std::mutex> lock(in_use);
    Workers::instance().each([&](Team& team) {
        for (int64_t index = team.first(count); index < team.last(count); ++index)
            decode_row(*weight, bit_width, rows[index], out + index * weight->in_features);
    });
}

// out [rows, size] = x / sqrt(mean(x^2) + eps) * weight; size a multiple of 16.
void anybit_rms_norm(const float* x, const float* weight, int64_t rows, int64_t size, float eps, float* out) {
    kernels().rms_norm(x, weight, 0, rows, size, eps, out);
}

// Of each of `rows` rows of logits [rows, count] the index of the largest, or -1 if a number is not finite.
void anybit_greedy(const float* logits, int64_t rows, int64_t count, int64_t* out) {
    std::lock_guard<std::mutex> lock(in_use);
    const int threads = Workers::instance().size();
    Likeliest* parts = workspace.likeliest.array<Likeliest>(rows * threads);
    Workers::instance().each([&](Team& team) {
        for (int64_t row = 0; row < rows; ++row)
            parts[row * threads + team.index()] =
                kernels().greedy(logits + row * count, team.first(count), team.last(count));
    });
    for (int64_t row = 0; row < rows; ++row) {
        Likeliest best = parts[row * threads];
        for (int thread = 1; thread < threads; ++thread) {
            const Likeliest& other = parts[row * threads + thread];
            if (best.index >= 0 && (other.index < 0 || other.logit > best.logit)) best = other;
        }
        out[row] = best.index;
    }
}

void anybit_choose_codes(const CodeBlock* block) {
    std::lock_guard<std::mutex> lock(in_use);
    Workers::instance().each([&](Team& team) {
        kernels().choose_codes(*block, team.first(block->rows), team.last(block->rows));
    });
}

// Reads `bytes` bytes at `from` once on all threads; returns their sum, so that nothing is left out.
uint64_t anybit_read(const uint64_t* from, int64_t bytes) {
    std::lock_guard<std::mutex> lock(in_use);
    std::atomic<uint64_t> sum{0};
    Workers::instance().each([&](Team& team) {
        uint64_t own[8] = {};
        const int64_t words = bytes / 8, last = team.last(words);
        for (int64_t word = team.first(words); word + 8 <= last; word += 8) {
            __builtin_prefetch(from + word + 512, 0, 2);  // as the linears do
            for (int lane = 0; lane < 8; ++lane) own[lane] += from[word + lane];
        }
        for (uint64_t lane : own) sum.fetch_add(lane);
    });
    return sum.load();
}

static struct PyModuleDef module_definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, nullptr, nullptr,
                                               nullptr, nullptr, nullptr};

// The module is empty: it lets an ordinary extension build and find the library.
PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&module_definition); }
}
