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

// 16 tokens of a page from number `index` on as floats [16, dim]; those from `count` on, which nobody has written, as 0.
// Meanwhile memory is asked for the 16 tokens at `ahead`, which may be anywhere: computing goes on while they come.
static inline void load_tokens(const uint8_t* numbers, int64_t index, int64_t count, int64_t dim, int64_t number_bytes,
                               const uint8_t* ahead, float* out) {
    const int64_t written = (count < kBlockRows ? count : kBlockRows) * dim;
    for (int64_t line = 0; line < kBlockRows * dim * number_bytes; line += 64) __builtin_prefetch(ahead + line, 0, 2);
    if (number_bytes == 4)
        for (int64_t i = 0; i < written; i += kBlockRows) store_floats(out + i, load_floats((const float*)numbers + index + i));
    else
        for (int64_t i = 0; i < written; i += kBlockRows) store_floats(out + i, load_bf16((const uint16_t*)numbers + index + i));
    for (int64_t i = written; i < kBlockRows * dim; i += kBlockRows) store_floats(out + i, broadcast(0.0f));
}

static inline Floats soft_capped(Floats scores, float cap) {
    // cap * tanh(s / cap) = cap - 2 cap / (e^(2 s / cap) + 1)
    const Floats e = exp_floats(max(broadcast(-80.0f), mul(scores, broadcast(2.0f / cap))));
    return add(broadcast(cap), div(broadcast(-2.0f * cap), add(e, broadcast(1.0f))));
}

// What a query has seen so far, as one row of floats: the largest score, the sum of the weights e^(score - largest), and
// head_dim weighted sums of values.
static inline float& largest_of(float* state) { return state[0]; }
static inline float& sum_of(float* state) { return state[1]; }
static inline float* values_of(float* state) { return state + kStateHead; }

// What sums weighted for the score `before` as the largest are multiplied with when it is `now`.
static inline Floats rescale_factor(float before, float now) { return exp_floats(broadcast(before - now)); }

// totals = totals * rescale + sum over 16 tokens of weight * value, for kVectors vectors of the head; even and odd tokens
// apart.
template <int kVectors>
static inline void add_values(const float* weights, const float* values, int64_t dim, Floats rescale, float* totals) {
    Floats even[kVectors], odd[kVectors];
    for (int v = 0; v < kVectors; ++v) {
        even[v] = mul(load_floats(totals + v * kBlockRows), rescale);
        odd[v] = broadcast(0.0f);
    }
    for (int token = 0; token < kBlockRows; token += 2) {
        const Floats first = broadcast(weights[token]), second = broadcast(weights[token + 1]);
        const float* row = values + token * dim;
        for (int v = 0; v < kVectors; ++v) {
            even[v] = fma(first, load_floats(row + v * kBlockRows), even[v]);
            odd[v] = fma(second, load_floats(row + dim + v * kBlockRows), odd[v]);
        }
    }
    for (int v = 0; v < kVectors; ++v) store_floats(totals + v * kBlockRows, add(even[v], odd[v]));
}

// Scores of one query and 16 tokens; kVectors 0: a head of any size.
template <int kVectors>
static inline Floats score_tokens(const float* q, const float* keys, int64_t dim) {
    Floats products[kBlockRows];
    const int64_t vectors = kVectors > 0 ? kVectors : dim / kBlockRows;
    for (int token = 0; token < kBlockRows; ++token) {
        Floats sum = mul(load_floats(q), load_floats(keys + token * dim));
        for (int64_t v = 1; v < vectors; ++v)
            sum = fma(load_floats(q + v * kBlockRows), load_floats(keys + token * dim + v * kBlockRows), sum);
        products[token] = sum;
    }
    return sum_lanes_of_each(products);
}

// The tokens of a page that one query sees: begin .. end-1.
struct Seen {
    int64_t begin, end;

    Seen(int64_t position, int64_t window, int64_t start) {
        const int64_t oldest = window > 0 ? position - window + 1 : 0;
        begin = oldest > start ? oldest - start : 0;
        end = position - start + 1 < kPageTokens ? position - start + 1 : kPageTokens;
    }
    // Whether any of the 16 tokens from `first` on is among them.
    bool touches(int64_t first) const { return begin < first + kBlockRows && first < end && begin < end; }
    bool contains(int64_t first) const { return begin <= first && first + kBlockRows <= end; }
};

static inline Floats masked_scores(Floats scores, const Seen& seen, int64_t first) {
    if (seen.contains(first)) return scores;
    float lanes[kBlockRows];
    store_floats(lanes, scores);
    for (int64_t lane = 0; lane < kBlockRows; ++lane)
        if (first + lane < seen.begin || first + lane >= seen.end) lanes[lane] = -__builtin_inff();
    return load_floats(lanes);
}

// Turns a query's scores of a page into weights, in place; returns what its earlier sums must be multiplied with.
static inline Floats weigh(float* scores, const Seen& seen, float* state) {
    Floats largest = broadcast(-__builtin_inff());
    for (int64_t first = 0; first < kPageTokens; first += kBlockRows)
        if (seen.touches(first)) largest = max(largest, load_floats(scores + first));
    const float before = largest_of(state), page_largest = max_lanes(largest);
    const float now = page_largest > before ? page_largest : before;
    const Floats rescale = rescale_factor(before, now);
    Floats sums = broadcast(0.0f);
    for (int64_t first = 0; first < kPageTokens; first += kBlockRows)
        if (seen.touches(first)) {
            // A score of minus infinity must weigh exactly nothing, which exp_floats does not say.
            const Floats shifted_scores = add(load_floats(scores + first), broadcast(-now));
            const Floats weights = zero_below(shifted_scores, -87.0f, exp_floats(shifted_scores));
            store_floats(scores + first, weights);
            sums = add(sums, weights);
        }
    largest_of(state) = now;
    sum_of(state) = sum_of(state) * first_lane(rescale) + sum_lanes(sums);
    return rescale;
}

static inline void add_all_values(const float* weights, const float* values, int64_t dim, Floats rescale, float* totals) {
    int64_t d = 0;
    for (; d + 4 * kBlockRows <= dim; d += 4 * kBlockRows) add_values<4>(weights, values + d, dim, rescale, totals + d);
    for (; d < dim; d += kBlockRows) add_values<1>(weights, values + d, dim, rescale, totals + d);
}

constexpr int64_t kAhead = 2 * kBlockRows;

static void attend(const Model& model, const Layer& layer, const Batch& batch, const Pages& pages,
                   const AttentionGroup& group, const AttentionItem& item, int64_t run, const float* qkv, float* states,
                   float* scratch) {
    const int64_t dim = model.head_dim, heads = model.num_heads, kv_heads = model.num_kv_heads;
    const int64_t queries_per_head = heads / kv_heads, width = (heads + 2 * kv_heads) * dim, stride = state_floats(dim);
    const int64_t* rows = group.row_ids + item.seq * group.num_tokens;
    const int64_t* table = group.block_tables + item.seq * group.max_pages;
    const int64_t num_queries = (item.last - item.first) * queries_per_head;
    float* numbers = scratch;                                // keys or values of 16 tokens
    float* scores = numbers + kBlockRows * dim;              // [queries, kPageTokens]
    float* rescales = scores + num_queries * kPageTokens;    // [queries]
    for (int64_t query = 0; query < num_queries; ++query) {
        float* state = states + query * stride;
        for (int64_t i = 0; i < stride; ++i) state[i] = 0.0f;
        largest_of(state) = -__builtin_inff();
    }
    const int64_t last_position = batch.positions[rows[item.last - 1]];
    const int64_t oldest_seen = layer.window > 0 ? batch.positions[rows[item.first]] - layer.window + 1 : 0;
    for (int64_t page = run * kRunPages; page < (run + 1) * kRunPages && page * kPageTokens <= last_position; ++page) {
        const int64_t index = (table[page] * kv_heads + item.kv_head) * kPageTokens * dim, start = page * kPageTokens;
        if (start + kPageTokens <= oldest_seen) continue;
        const int64_t written = last_position - start + 1 < kPageTokens ? last_position - start + 1 : kPageTokens;
        const int64_t next_page = page + 1 < group.max_pages ? page + 1 : page;
        const int64_t next_index = (table[next_page] * kv_heads + item.kv_head) * kPageTokens * dim;
        // What is wanted kAhead tokens after token `first`: of the same numbers, or of those that are read next.
        const auto ahead = [&](const uint8_t* same, const uint8_t* next, int64_t next_at, int64_t first) {
            const int64_t wanted = first + kAhead;
            return wanted < kPageTokens ? same + (index + wanted * dim) * pages.number_bytes
                                        : next + (next_at + (wanted - kPageTokens) * dim) * pages.number_bytes;
        };
        const auto seen_by = [&](int64_t query) {
            return Seen(batch.positions[rows[item.first + query / queries_per_head]], layer.window, start);
        };
        for (int64_t first = 0; first < written; first += kBlockRows) {
            load_tokens(pages.keys, index + first * dim, written - first, dim, pages.number_bytes,
                        ahead(pages.keys, pages.values, index, first), numbers);
            for (int64_t query = 0; query < num_queries; ++query) {
                const Seen seen = seen_by(query);
                if (!seen.touches(first)) continue;
                const float* q = qkv + rows[item.first + query / queries_per_head] * width +
                                 (item.kv_head * queries_per_head + query % queries_per_head) * dim;
                Floats dots = dim == 64 ? score_tokens<4>(q, numbers, dim) : score_tokens<0>(q, numbers, dim);
                dots = mul(dots, broadcast(model.attention_scale));
                if (model.softcap != 0.0f) dots = soft_capped(dots, model.softcap);
                store_floats(scores + query * kPageTokens + first, masked_scores(dots, seen, first));
            }
        }
        for (int64_t query = 0; query < num_queries; ++query) {
            const Seen seen = seen_by(query);
            if (seen.begin < seen.end)
                rescales[query] = first_lane(weigh(scores + query * kPageTokens, seen, states + query * stride));
        }
        for (int64_t first = 0; first < written; first += kBlockRows) {
            load_tokens(pages.values, index + first * dim, written - first, dim, pages.number_bytes,
                        ahead(pages.values, pages.keys, next_index, first), numbers);
            for (int64_t query = 0; query < num_queries; ++query) {
                const Seen seen = seen_by(query);
                if (!seen.touches(first)) continue;
                // Earlier sums are rescaled once, by the first tokens of the page that are seen.
                const float rescale = first + kBlockRows > seen.begin && first <= seen.begin ? rescales[query] : 1.0f;
                add_all_values(scores + query * kPageTokens + first, numbers, dim, broadcast(rescale),
                               values_of(states + query * stride));
            }
        }
    }
}

static void merge_states(float* into, const float* from, int64_t count, int64_t dim) {
    const int64_t stride = state_floats(dim);
    for (int64_t query = 0; query < count; ++query, into += stride, from += stride) {
        const float before = into[0], other = from[0], now = other > before ? other : before;
        if (now == -__builtin_inff()) continue;
        const Floats keep = rescale_factor(before, now), take = rescale_factor(other, now);
        into[0] = now;
        into[1] = into[1] * first_lane(keep) + from[1] * first_lane(take);
        for (int64_t d = kStateHead; d < stride; d += kBlockRows)
            store_floats(into + d, fma(load_floats(from + d), take, mul(load_floats(into + d), keep)));
    }
}

static void write_attended(const Model& model, const AttentionGroup& group, const AttentionItem& item, const float* states,
                           float* out) {
    const int64_t dim = model.head_dim, queries_per_head = model.num_heads / model.num_kv_heads;
    const int64_t* rows = group.row_ids + item.seq * group.num_tokens;
    for (int64_t token = item.first; token < item.last; ++token)
        for (int64_t query = 0; query < queries_per_head; ++query, states += state_floats(dim)) {
            float* result = out + (rows[token] * model.num_heads + item.kv_head * queries_per_head + query) * dim;
            const Floats sum = broadcast(states[1]);
            for (int64_t d = 0; d < dim; d += kBlockRows)
                store_floats(result + d, div(load_floats(states + kStateHead + d), sum));
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
