// Queries against keys and values as numbers, over the same vector type as linear_kernel.h, after layer_kernel.h.

// Vector `index` of numbers of a page.
template <bool kIsBf16>
static inline Floats load_numbers(const uint8_t* numbers, int64_t index) {
    if (kIsBf16) return load_bf16((const uint16_t*)numbers + index);
    return load_floats((const float*)numbers + index);
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

// Memory to ask for while 16 tokens are computed, so many bytes a token, or none.
struct Ahead {
    const uint8_t* from;
    int64_t bytes;

    inline void ask(int64_t token) const {
        for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(from + token * bytes + byte, 0, 2);
    }
    Ahead if_first(bool first) const { return {from, first ? bytes : 0}; }
};

// kQueries query heads of one token against 16 tokens of a page, kVectors vectors of the head from `d` on. products holds a
// vector per query and token that grows along the head.
template <bool kIsBf16, int kQueries, int kVectors>
static inline void add_products(const float* q, const uint8_t* keys, int64_t dim, int64_t d, const Ahead& ahead,
                                Floats* products) {
    Floats query[kQueries][kVectors];
    for (int n = 0; n < kQueries; ++n)
        for (int v = 0; v < kVectors; ++v) query[n][v] = load_floats(q + n * dim + d + v * kBlockRows);
    for (int token = 0; token < kBlockRows; ++token) {
        ahead.ask(token);
        Floats sums[kQueries];
        for (int n = 0; n < kQueries; ++n) sums[n] = d == 0 ? broadcast(0.0f) : products[n * kBlockRows + token];
        for (int v = 0; v < kVectors; ++v) {
            const Floats key = load_numbers<kIsBf16>(keys, token * dim + d + v * kBlockRows);
            for (int n = 0; n < kQueries; ++n) sums[n] = fma(query[n][v], key, sums[n]);
        }
        for (int n = 0; n < kQueries; ++n) products[n * kBlockRows + token] = sums[n];
    }
}

// totals = totals * rescale + sum over `count` tokens of weight * value, for kVectors vectors of the head from `d` on;
// weights and totals of the next query lie kPageTokens and `stride` further.
template <bool kIsBf16, int kQueries, int kVectors>
static inline void add_values(const float* weights, const float* rescales, const uint8_t* values, int64_t count, int64_t dim,
                              int64_t d, const Ahead& ahead, float* totals, int64_t stride) {
    Floats sums[kQueries][kVectors];
    for (int n = 0; n < kQueries; ++n)
        for (int v = 0; v < kVectors; ++v)
            sums[n][v] = mul(load_floats(totals + n * stride + d + v * kBlockRows), broadcast(rescales[n]));
    for (int64_t token = 0; token < count; ++token) {
        ahead.ask(token);
        for (int v = 0; v < kVectors; ++v) {
            const Floats value = load_numbers<kIsBf16>(values, token * dim + d + v * kBlockRows);
            for (int n = 0; n < kQueries; ++n)
                sums[n][v] = fma(broadcast(weights[n * kPageTokens + token]), value, sums[n][v]);
        }
    }
    for (int n = 0; n < kQueries; ++n)
        for (int v = 0; v < kVectors; ++v) store_floats(totals + n * stride + d + v * kBlockRows, sums[n][v]);
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

// Scores of 16 tokens of a page from their products with a query; minus infinity for those that it does not see.
static inline Floats scores_of(const Model& model, Floats products, const Seen& seen, int64_t first) {
    Floats scores = mul(products, broadcast(model.attention_scale));
    if (model.softcap != 0.0f) scores = soft_capped(scores, model.softcap);
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

// One token's query heads of one key head, against the pages of a run.
struct QueryHeads {
    const Model& model;
    const float* q;   // [heads, head_dim]
    float* states;    // [heads, state_floats]
    float* scores;    // [heads, kPageTokens]: scores, then weights
    float* rescales;  // [heads]

    // Scores of 16 tokens of a page; `head` is the first of kQueries.
    template <bool kIsBf16, int kQueries>
    inline void score(int64_t head, const uint8_t* keys, const Seen& seen, int64_t first, const Ahead& ahead) const {
        const int64_t dim = model.head_dim;
        Floats products[kQueries * kBlockRows];
        int64_t d = 0;
        for (; d + 4 * kBlockRows <= dim; d += 4 * kBlockRows)
            add_products<kIsBf16, kQueries, 4>(q + head * dim, keys, dim, d, ahead.if_first(head == 0 && d == 0), products);
        for (; d < dim; d += kBlockRows)
            add_products<kIsBf16, kQueries, 1>(q + head * dim, keys, dim, d, ahead.if_first(head == 0 && d == 0), products);
        for (int n = 0; n < kQueries; ++n) {
            Floats dots = sum_lanes_of_each(products + n * kBlockRows);
            store_floats(scores + (head + n) * kPageTokens + first, scores_of(model, dots, seen, first));
        }
    }
    // Adds the weighted values of 16 tokens.
    template <bool kIsBf16, int kQueries>
    inline void add(int64_t head, const uint8_t* values, int64_t count, const Seen& seen, int64_t first,
                    const Ahead& ahead) const {
        const int64_t dim = model.head_dim, stride = state_floats(dim);
        const float* weights = scores + head * kPageTokens + first;
        float* totals = values_of(states + head * stride);
        // Earlier sums are rescaled once, by the first tokens of the page that are seen.
        float factors[kQueries];
        for (int n = 0; n < kQueries; ++n) factors[n] = first <= seen.begin ? rescales[head + n] : 1.0f;
        int64_t d = 0;
        for (; d + 4 * kBlockRows <= dim; d += 4 * kBlockRows)
            add_values<kIsBf16, kQueries, 4>(weights, factors, values, count, dim, d, ahead.if_first(head == 0 && d == 0),
                                             totals, stride);
        for (; d < dim; d += kBlockRows)
            add_values<kIsBf16, kQueries, 1>(weights, factors, values, count, dim, d, ahead.if_first(head == 0 && d == 0),
                                             totals, stride);
    }
    template <bool kIsBf16, int kQueries>
    void score_all(int64_t& head, int64_t heads, const uint8_t* keys, const Seen& seen, int64_t first,
                   const Ahead& ahead) const {
        for (; head + kQueries <= heads; head += kQueries) score<kIsBf16, kQueries>(head, keys, seen, first, ahead);
        if constexpr (kQueries > 1) score_all<kIsBf16, kQueries - 1>(head, heads, keys, seen, first, ahead);
    }
    template <bool kIsBf16, int kQueries>
    void add_all(int64_t& head, int64_t heads, const uint8_t* values, int64_t count, const Seen& seen, int64_t first,
                 const Ahead& ahead) const {
        for (; head + kQueries <= heads; head += kQueries) add<kIsBf16, kQueries>(head, values, count, seen, first, ahead);
        if constexpr (kQueries > 1) add_all<kIsBf16, kQueries - 1>(head, heads, values, count, seen, first, ahead);
    }
};

constexpr int kMaxQueries = 4;             // whose sums fit into registers
constexpr int64_t kAhead = 4 * kBlockRows;  // memory is asked for tokens so long before they are read
