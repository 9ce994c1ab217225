// The integer step of the solvers, over the same vector type as linear_kernel.h; `kernels.portable.choose_codes` says what
// it computes.
//
// Rows are independent and every operation has its place, so all instruction sets give the same codes.

constexpr int64_t kMaxCodeVectors = kMaxCodes / kBlockRows;
constexpr float kNoLevel = 1e18f;  // where a vector has more lanes than there are codes

// The index of the first of the largest of the lanes of `count` vectors.
static inline int64_t first_largest(const Floats* values, int64_t count) {
    Floats largest = values[0];
    for (int64_t i = 1; i < count; ++i) largest = max(largest, values[i]);
    const float limit = max_lanes(largest);
    Floats ranks = broadcast(0.0f);
    for (int64_t i = 0; i < count; ++i) {
        alignas(64) float rank[kBlockRows];
        for (int64_t lane = 0; lane < kBlockRows; ++lane) rank[lane] = (float)(kMaxCodes - i * kBlockRows - lane);
        ranks = max(ranks, zero_below(values[i], limit, load_floats(rank)));
    }
    return kMaxCodes - (int64_t)max_lanes(ranks);
}

// The code of one width whose level is nearest: rounded, and its neighbours looked at, as rounding may just miss it.
static inline int64_t nearest_code(const float* levels, int64_t num_codes, float target) {
    const float step = levels[1] - levels[0], position = step == 0.0f ? 0.0f : (target - levels[0]) / step;
    const int64_t rounded = (int64_t)__builtin_fminf(__builtin_fmaxf(position + 0.5f, 0.0f), (float)(num_codes - 1));
    const int64_t first = rounded > 0 ? rounded - 1 : 0, last = rounded + 1 < num_codes ? rounded + 1 : num_codes - 1;
    int64_t chosen = first;
    for (int64_t code = first + 1; code <= last; ++code) {
        const float best = levels[chosen] - target, error = levels[code] - target;
        if (error * error < best * best) chosen = code;
    }
    return chosen;
}

// Rows row .. row + kTogether - 1. What one column's code costs is a chain of dependent operations, so that several rows
// side by side take hardly longer than one.
template <int kCount, int kVectors, int kTogether>
static void choose_together(const CodeBlock& block, int64_t row) {
    constexpr int kLevels = kVectors * kBlockRows;
    alignas(64) float levels[kTogether][kCount][kLevels], target[kTogether][kCount][kMaxCodeColumns];
    const int64_t columns = block.columns;
    const auto part = [&](int t, int r) { return r * block.rows + row + t; };
    for (int t = 0; t < kTogether; ++t)
        for (int r = 0; r < kCount; ++r) {
            const float scale = block.scale[part(t, r)], zero = block.zero[part(t, r)];
            for (int code = 0; code < kLevels; ++code)
                levels[t][r][code] = code < block.num_codes ? (float)(code >> block.shifts[r]) * scale + zero : kNoLevel;
            __builtin_memcpy(target[t][r], block.targets + part(t, r) * columns, columns * sizeof(float));
        }
    for (int64_t column = 0; column < columns; ++column) {
        int64_t chosen[kTogether];
        for (int t = 0; t < kTogether; ++t) {
            if (kCount == 1 && kVectors > 1 && block.shifts[0] == 0) {
                chosen[t] = nearest_code(levels[t][0], block.num_codes, target[t][0][column]);
                continue;
            }
            Floats gain[kVectors];  // cost with its sign turned
            for (int i = 0; i < kVectors; ++i) {
                gain[i] = broadcast(0.0f);
                for (int r = 0; r < kCount; ++r) {
                    const Floats error =
                        add(load_floats(levels[t][r] + i * kBlockRows), broadcast(-target[t][r][column]));
                    gain[i] = fma(mul(error, error), broadcast(-block.weights[r * columns + column]), gain[i]);
                }
            }
            chosen[t] = first_largest(gain, kVectors);
        }
        for (int t = 0; t < kTogether; ++t) {
            block.codes[(row + t) * columns + column] = (uint8_t)chosen[t];
            for (int r = 0; r < kCount; ++r) {
                const int64_t place = part(t, r) * columns + column;
                const float value = levels[t][r][chosen[t]];
                block.values[place] = value;
                const Floats error =
                    broadcast((block.origin == nullptr ? target[t][r][column] : block.origin[place]) - value);
                const float* coupling = block.coupling + (r * columns + column) * columns;
                // The coupling of a column with itself and those before it is zero.
                for (int64_t k = column / kBlockRows * kBlockRows; k < columns; k += kBlockRows)
                    store_floats(target[t][r] + k, fma(error, load_floats(coupling + k), load_floats(target[t][r] + k)));
            }
        }
    }
    for (int t = 0; t < kTogether; ++t)
        for (int r = 0; r < kCount; ++r)
            __builtin_memcpy(block.targets + part(t, r) * columns, target[t][r], columns * sizeof(float));
}

constexpr int kRowsTogether = 4;

template <int kCount, int kVectors>
static void choose_rows_together(const CodeBlock& block, int64_t first, int64_t last) {
    int64_t row = first;
    for (; row + kRowsTogether <= last; row += kRowsTogether) choose_together<kCount, kVectors, kRowsTogether>(block, row);
    for (; row < last; ++row) choose_together<kCount, kVectors, 1>(block, row);
}

template <int kCount>
static void choose_rows(const CodeBlock& block, int64_t first, int64_t last) {
    if (block.num_codes <= kBlockRows) return choose_rows_together<kCount, 1>(block, first, last);
    if (kCount == 1) return choose_rows_together<kCount, kMaxCodeVectors>(block, first, last);
    for (int64_t row = first; row < last; ++row) choose_together<kCount, kMaxCodeVectors, 1>(block, row);
}

static void choose_codes(const CodeBlock& block, int64_t first, int64_t last) {
    switch (block.num_widths) {
        case 1: return choose_rows<1>(block, first, last);
        case 2: return choose_rows<2>(block, first, last);
        case 3: return choose_rows<3>(block, first, last);
        case 4: return choose_rows<4>(block, first, last);
        default: return choose_rows<5>(block, first, last);
    }
}
