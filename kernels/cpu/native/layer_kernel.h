// Everything of a decoder layer but its linears, over the same vector type as linear_kernel.h.
//
// Sums go lane by lane along a row and then across the lanes in one fixed tree; attention goes page by page. A row's result
// depends on its own inputs alone, and is the same on every instruction set.

// e^x to about 1e-7 for x <= 88; 0 below -87 (Cody and Waite's reduction, a polynomial of degree 6).
static inline Floats exp_floats(Floats x) {
    x = max(x, broadcast(-87.0f));
    const Floats magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding and taking it away rounds to a whole number
    const Floats n = add(fma(x, broadcast(1.44269504f), magic), broadcast(-12582912.0f));
    Floats r = fma(n, broadcast(-0.693359375f), x);
    r = fma(n, broadcast(2.12194440e-4f), r);
    Floats p = broadcast(1.9875691500e-4f);
    p = fma(p, r, broadcast(1.3981999507e-3f));
    p = fma(p, r, broadcast(8.3334519073e-3f));
    p = fma(p, r, broadcast(4.1665795894e-2f));
    p = fma(p, r, broadcast(1.6666665459e-1f));
    p = fma(p, r, broadcast(5.0000001201e-1f));
    p = fma(mul(p, r), r, add(r, broadcast(1.0f)));
    return scaled_by_power(p, n);
}

static inline float max_lanes(Floats v) {
    float lanes[kBlockRows];
    store_floats(lanes, v);
    float largest = lanes[0];
    for (int lane = 1; lane < kBlockRows; ++lane) largest = lanes[lane] > largest ? lanes[lane] : largest;
    return largest;
}

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
        for (int64_t head = 0; head < kv_heads; ++head) {
            const int64_t index =
                ((batch.page_ids[row] * kv_heads + head) * kPageTokens + batch.page_offsets[row]) * dim;
            write_numbers(projected + (heads + head) * dim, dim, pages.keys, index, pages.number_bytes);
            write_numbers(projected + (heads + kv_heads + head) * dim, dim, pages.values, index, pages.number_bytes);
        }
    }
}

// The first `count` tokens of one page and head as floats [count, dim].
static inline void load_page(const uint8_t* numbers, int64_t index, int64_t count, int64_t dim, int64_t number_bytes,
                             float* out) {
    for (int64_t i = 0; i < count * dim; i += kBlockRows)
        store_floats(out + i, number_bytes == 4 ? load_floats((const float*)numbers + index + i)
                                                : load_bf16((const uint16_t*)numbers + index + i));
}

static inline Floats soft_capped(Floats scores, float cap) {
    // cap * tanh(s / cap) = cap - 2 cap / (e^(2 s / cap) + 1)
    const Floats e = exp_floats(max(broadcast(-80.0f), mul(scores, broadcast(2.0f / cap))));
    return add(broadcast(cap), div(broadcast(-2.0f * cap), add(e, broadcast(1.0f))));
}

// Online softmax state of one query: after it, dim floats of the weighted sum.
struct QueryState {
    float largest, sum;
};

// total = total * rescale + sum over tokens of weight * value, for kVectors vectors of the head.
template <int kVectors>
static inline void add_values(const float* weights, const float* values, int64_t begin, int64_t end, int64_t dim,
                              float rescale, float* total) {
    Floats part[kVectors];
    for (int v = 0; v < kVectors; ++v) part[v] = mul(load_floats(total + v * kBlockRows), broadcast(rescale));
    for (int64_t token = begin; token < end; ++token) {
        const Floats weight = broadcast(weights[token]);
        for (int v = 0; v < kVectors; ++v) part[v] = fma(weight, load_floats(values + token * dim + v * kBlockRows), part[v]);
    }
    for (int v = 0; v < kVectors; ++v) store_floats(total + v * kBlockRows, part[v]);
}

// One query against the tokens begin .. end-1 of a page.
static inline void attend_page(const float* q, const float* keys, const float* values, int64_t begin, int64_t end,
                               int64_t dim, float scale, float softcap, QueryState& state, float* total) {
    alignas(64) float scores[kPageTokens];
    for (int64_t token = 0; token < kPageTokens; ++token) scores[token] = -__builtin_inff();
    for (int64_t token = begin; token < end; ++token) {
        Floats products = broadcast(0.0f);
        for (int64_t d = 0; d < dim; d += kBlockRows)
            products = fma(load_floats(q + d), load_floats(keys + token * dim + d), products);
        scores[token] = sum_lanes(products) * scale;
    }
    if (softcap != 0.0f)
        for (int64_t token = 0; token < kPageTokens; token += kBlockRows) {
            float capped[kBlockRows];
            store_floats(capped, soft_capped(load_floats(scores + token), softcap));
            for (int64_t i = 0; i < kBlockRows; ++i)
                if (token + i >= begin && token + i < end) scores[token + i] = capped[i];
        }
    Floats largest = load_floats(scores);
    for (int64_t token = kBlockRows; token < kPageTokens; token += kBlockRows)
        largest = max(largest, load_floats(scores + token));
    const float page_largest = max_lanes(largest);
    const float now = page_largest > state.largest ? page_largest : state.largest;
    // Minus infinity minus itself would not be a number; the first page has nothing to rescale.
    alignas(64) float rescale[kBlockRows];
    store_floats(rescale, exp_floats(broadcast(state.sum == 0.0f ? 0.0f : state.largest - now)));
    Floats sums = broadcast(0.0f);
    for (int64_t token = 0; token < kPageTokens; token += kBlockRows) {
        const Floats weights = exp_floats(add(load_floats(scores + token), broadcast(-now)));
        store_floats(scores + token, weights);
    }
    for (int64_t token = 0; token < begin; ++token) scores[token] = 0.0f;
    for (int64_t token = end; token < kPageTokens; ++token) scores[token] = 0.0f;
    for (int64_t token = 0; token < kPageTokens; token += kBlockRows) sums = add(sums, load_floats(scores + token));
    state.sum = state.sum * rescale[0] + sum_lanes(sums);
    state.largest = now;
    int64_t d = 0;
    for (; d + 4 * kBlockRows <= dim; d += 4 * kBlockRows)
        add_values<4>(scores, values + d, begin, end, dim, rescale[0], total + d);
    for (; d < dim; d += kBlockRows) add_values<1>(scores, values + d, begin, end, dim, rescale[0], total + d);
}

static void attend(const Model& model, const Layer& layer, const Batch& batch, const Pages& pages,
                   const AttentionGroup& group, int64_t seq, int64_t kv_head, int64_t first, int64_t last,
                   const float* qkv, float* out, float* scratch) {
    const int64_t dim = model.head_dim, heads = model.num_heads, kv_heads = model.num_kv_heads;
    const int64_t queries_per_head = heads / kv_heads, width = (heads + 2 * kv_heads) * dim;
    const int64_t* rows = group.row_ids + seq * group.num_tokens;
    const int64_t* table = group.block_tables + seq * group.max_pages;
    float* keys = scratch;
    float* values = keys + kPageTokens * dim;
    float* totals = values + kPageTokens * dim;
    const int64_t num_queries = (last - first) * queries_per_head;
    QueryState* states = (QueryState*)(totals + num_queries * dim);
    for (int64_t query = 0; query < num_queries; ++query) states[query] = {-__builtin_inff(), 0.0f};
    for (int64_t i = 0; i < num_queries * dim; ++i) totals[i] = 0.0f;
    const int64_t last_position = batch.positions[rows[last - 1]];
    const int64_t oldest_seen = layer.window > 0 ? batch.positions[rows[first]] - layer.window + 1 : 0;
    for (int64_t page = oldest_seen > 0 ? oldest_seen / kPageTokens : 0; page * kPageTokens <= last_position; ++page) {
        const int64_t index = (table[page] * kv_heads + kv_head) * kPageTokens * dim, start = page * kPageTokens;
        const int64_t written = last_position - start + 1 < kPageTokens ? last_position - start + 1 : kPageTokens;
        load_page(pages.keys, index, written, dim, pages.number_bytes, keys);
        load_page(pages.values, index, written, dim, pages.number_bytes, values);
        for (int64_t token = first; token < last; ++token) {
            const int64_t position = batch.positions[rows[token]];
            const int64_t oldest = layer.window > 0 ? position - layer.window + 1 : 0;
            const int64_t begin = oldest > start ? oldest - start : 0;
            const int64_t end = position - start + 1 < kPageTokens ? position - start + 1 : kPageTokens;
            if (begin >= end) continue;
            for (int64_t query = 0; query < queries_per_head; ++query) {
                const int64_t number = (token - first) * queries_per_head + query;
                const float* q = qkv + rows[token] * width + (kv_head * queries_per_head + query) * dim;
                attend_page(q, keys, values, begin, end, dim, model.attention_scale, model.softcap, states[number],
                            totals + number * dim);
            }
        }
    }
    for (int64_t token = first; token < last; ++token)
        for (int64_t query = 0; query < queries_per_head; ++query) {
            const int64_t number = (token - first) * queries_per_head + query;
            float* result = out + rows[token] * heads * dim + (kv_head * queries_per_head + query) * dim;
            const Floats sum = broadcast(states[number].sum);
            for (int64_t d = 0; d < dim; d += kBlockRows)
                store_floats(result + d, div(load_floats(totals + number * dim + d), sum));
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
