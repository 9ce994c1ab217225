// Everything of a decoder layer but its linears and its attention, over the same vector type as linear_kernel.h.
//
// Sums go lane by lane along a row and then across the lanes in one fixed tree. A row's result depends on its own inputs
// alone, and is the same on every instruction set.

static void rms_norm(const float* x, const float* weight, int64_t first, int64_t last, int64_t size, float eps,
                     float* out) {
    for (int64_t row = first; row < last; ++row) {
        const float* values = x + row * size;
        Floats squares = broadcast(0.0f);
        for (int64_t i = 0; i < size; i += kBlockRows) squares = fma(load_floats(values + i), load_floats(values + i), squares);
        const float scale = 1.0f / __builtin_sqrtf(sum_lanes(squares) / (float)size + eps);
        for (int64_t i = 0; i < size; i += kBlockRows)
            store_floats(out + row * size + i, mul(mul(load_floats(values + i), broadcast(scale)), load_floats(weight + i)));
    }
}

// In the half-split order of Hugging Face checkpoints (arXiv 2104.09864).
static inline void rotate(float* head, const float* cosines, const float* sines, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = head[i], b = head[half + i];
        head[i] = a * cosines[i] - b * sines[i];
        head[half + i] = b * cosines[i] + a * sines[i];
    }
}

static inline void write_numbers(const float* from, int64_t count, uint8_t* page, int64_t index, int64_t number_bytes) {
    if (number_bytes == 4) {
        __builtin_memcpy(page + index * 4, from, (size_t)count * 4);
        return;
    }
    uint16_t* out = (uint16_t*)page + index;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        __builtin_memcpy(&bits, from + i, 4);
        const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
        out[i] = (bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : (uint16_t)rounded;
    }
}

static void rotate_and_write(const Model& model, const Layer& layer, const Batch& batch, const Pages& pages, float* qkv,
                             int64_t first, int64_t last) {
    const int64_t dim = model.head_dim, heads = model.num_heads, kv_heads = model.num_kv_heads;
    for (int64_t row = first; row < last; ++row) {
        float* projected = qkv + row * (heads + 2 * kv_heads) * dim;
        if (layer.query_norm != nullptr) {
            rms_norm(projected, layer.query_norm, 0, heads, dim, model.norm_eps, projected);
            rms_norm(projected + heads * dim, layer.key_norm, 0, kv_heads, dim, model.norm_eps, projected + heads * dim);
        }
        const float* cosines = layer.cosines + batch.positions[row] * (dim / 2);
        const float* sines = layer.sines + batch.positions[row] * (dim / 2);
        for (int64_t head = 0; head < heads + kv_heads; ++head) rotate(projected + head * dim, cosines, sines, dim / 2);
        if (batch.row_formats != nullptr && batch.row_formats[row] >= 0)
            row_to_basis(model, pages.sealed[batch.row_formats[row]], projected);
        for (int64_t head = 0; head < kv_heads; ++head) {
            const int64_t index =
                ((batch.page_ids[row] * kv_heads + head) * kPageTokens + batch.page_offsets[row]) * dim;
            write_numbers(projected + (heads + head) * dim, dim, pages.keys, index, pages.number_bytes);
            write_numbers(projected + (heads + kv_heads + head) * dim, dim, pages.values, index, pages.number_bytes);
        }
    }
}

static void gate(int64_t activation, const float* gate_up, int64_t first, int64_t last, int64_t size, float* out) {
    for (int64_t row = first; row < last; ++row) {
        const float* gates = gate_up + row * 2 * size;
        for (int64_t i = 0; i < size; i += kBlockRows) {
            const Floats x = load_floats(gates + i), up = load_floats(gates + size + i);
            Floats exponent;
            if (activation == kSilu) {
                exponent = mul(x, broadcast(-1.0f));
            } else {  // x / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3): arXiv 1606.08415, section 2
                const Floats u = mul(fma(mul(x, x), broadcast(0.044715f), broadcast(1.0f)), x);
                exponent = mul(u, broadcast(-1.5957691216f));
            }
            exponent = min(exponent, broadcast(88.0f));
            const Floats activated = div(x, add(exp_floats(exponent), broadcast(1.0f)));
            store_floats(out + row * size + i, mul(activated, up));
        }
    }
}

static void add_rows(float* x, const float* y, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) x[i] += y[i];
}

static Likeliest greedy(const float* logits, int64_t first, int64_t last) {
    Floats best = broadcast(-__builtin_inff()), zeros = broadcast(0.0f);
    int64_t i = first;
    for (; i + kBlockRows <= last; i += kBlockRows) {
        const Floats values = load_floats(logits + i);
        best = max(best, values);
        zeros = fma(values, broadcast(0.0f), zeros);  // NaN once a number is not finite
    }
    float largest = max_lanes(best), zero = sum_lanes(zeros);
    for (; i < last; ++i) {
        largest = logits[i] > largest ? logits[i] : largest;
        zero += logits[i] * 0.0f;
    }
    if (zero != 0.0f) return {-1, 0.0f};
    for (i = first; i < last; ++i)
        if (logits[i] == largest) return {i, largest};
    return {last, -__builtin_inff()};  // of no numbers
}
