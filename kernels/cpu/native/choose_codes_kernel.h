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

template <int kCount, int kVectors>
static void choose_row(const CodeBlock& block, int64_t row) {
    constexpr int kLevels = kVectors * kBlockRows;
    alignas(64) float levels[kCount][kLevels], target[kCount][kMaxCodeColumns];
    const int64_t columns = block.columns;
    for (int r = 0; r < kCount; ++r) {
        const float scale = block.scale[r * block.rows + row], zero = block.zero[r * block.rows + row];
        for (int code = 0; code < kLevels; ++code)
            levels[r][code] = code < block.num_codes ? (float)(code >> block.shifts[r]) * scale + zero : kNoLevel;
        __builtin_memcpy(target[r], block.targets + (r * block.rows + row) * columns, columns * sizeof(float));
    }
    for (int64_t column = 0; column < columns; ++column) {
        Floats gain[kVectors];  // cost with its sign turned
        for (int i = 0; i < kVectors; ++i) {
            gain[i] = broadcast(0.0f);
            for (int r = 0; r < kCount; ++r) {
                const Floats error = add(load_floats(levels[r] + i * kBlockRows), broadcast(-target[r][column]));
                gain[i] = fma(mul(error, error), broadcast(-block.weights[r * columns + column]), gain[i]);
            }
        }
        const int64_t chosen = first_largest(gain, kVectors);
        block.codes[row * columns + column] = (uint8_t)chosen;
        for (int r = 0; r < kCount; ++r) {
            const int64_t place = (r * block.rows + row) * columns + column;
            const float value = levels[r][chosen];
            block.values[place] = value;
            const Floats error =
                broadcast((block.origin == nullptr ? target[r][column] : block.origin[place]) - value);
            const float* coupling = block.coupling + (r * columns + column) * columns;
            // The coupling of a column with itself and those before it is zero.
            for (int64_t k = column / kBlockRows * kBlockRows; k < columns; k += kBlockRows)
                store_floats(target[r] + k, fma(error, load_floats(coupling + k), load_floats(target[r] + k)));
        }
    }
    for (int r = 0; r < kCount; ++r)
        __builtin_memcpy(block.targets + (r * block.rows + row) * columns, target[r], columns * sizeof(float));
}

template <int kCount>
static void choose_rows(const CodeBlock& block, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
        if (block.num_codes <= kBlockRows) choose_row<kCount, 1>(block, row);
        else choose_row<kCount, kMaxCodeVectors>(block, row);
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
