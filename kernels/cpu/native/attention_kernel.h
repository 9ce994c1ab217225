// Attention over pages of keys and values, over the same vector type as linear_kernel.h, after layer_kernel.h.
//
// Tokens go 16 at a time through the pages of a run, then the runs are merged: in this order whatever the number of threads,
// the cut of a prompt or the company, so that a query's result depends on its own history alone.

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

// One token's query heads of one key head, against the pages of a run.
struct QueryHeads {
    const Model& model;
    const float* q;   // [heads, head_dim]
    float* states;    // [heads, state_floats]
    float* scores;    // [heads, kPageTokens]: scores, then weights
    float* rescales;  // [heads]
    const float* norms;  // [kPageTokens], of a sealed page's keys, else null
    const float* means;  // [heads], products of a sealed page's mean

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
            if (norms != nullptr) dots = fma(dots, load_floats(norms + first), broadcast(means[head + n]));
            dots = mul(dots, broadcast(model.attention_scale));
            if (model.softcap != 0.0f) dots = soft_capped(dots, model.softcap);
            store_floats(scores + (head + n) * kPageTokens + first, masked_scores(dots, seen, first));
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

// A page of one key head while a run's queries are computed against it.
struct PageOfRun {
    const uint8_t *keys, *values;            // exact: [kPageTokens, head_dim]; sealed: the records
    const uint8_t *next_keys, *next_values;  // of the page after it
    const uint8_t *first_keys, *first_values;  // where the first tokens are exact; null: not in this page
    const SealedPages* sealed;               // null: exact
};

// Where a sealed page is unpacked, 16 tokens at a time.
struct SealedScratch {
    float *tokens, *key_norms, *value_norms, *mean, *means;

    explicit SealedScratch(float* from)
        : tokens(from), key_norms(tokens + kBlockRows * kMaxHeadDim), value_norms(key_norms + kPageTokens),
          mean(value_norms + kPageTokens), means(mean + kMaxHeadDim) {}

    const uint8_t* unpack(const PairCode& code, const uint8_t* record, const uint8_t* exact, int64_t exact_tokens, int64_t first,
                          int64_t dim, const float* less) const {
        read_pairs(code, record, first, dim, tokens);
        if (exact != nullptr && first == 0) read_exactly(exact, exact_tokens, dim, less, tokens);
        return (const uint8_t*)tokens;
    }
    static void make_exact(float* norms, const uint8_t* exact, int64_t exact_tokens) {
        for (int64_t token = 0; exact != nullptr && token < exact_tokens; ++token) norms[token] = 1.0f;
    }
};

template <bool kIsBf16>
static void attend_run(const Model& model, const Layer& layer, const Batch& batch, const Pages& pages,
                       const AttentionGroup& group, const AttentionItem& item, int64_t run, const float* qkv, float* states,
                       float* scratch) {
    constexpr int64_t kNumberBytes = kIsBf16 ? 2 : 4;
    const int64_t dim = model.head_dim, kv_heads = model.num_kv_heads, heads = model.num_heads / kv_heads;
    const int64_t width = (model.num_heads + 2 * kv_heads) * dim, stride = state_floats(dim);
    const int64_t* rows = group.row_ids + item.seq * group.num_tokens;
    const int64_t* table = group.block_tables + item.seq * group.max_pages;
    const int64_t num_queries = (item.last - item.first) * heads;
    const SealedScratch unpacked(scratch + scores_floats(num_queries));
    for (int64_t query = 0; query < num_queries; ++query) {
        float* state = states + query * stride;
        for (int64_t i = 0; i < stride; ++i) state[i] = 0.0f;
        largest_of(state) = -__builtin_inff();
    }
    const auto heads_of = [&](int64_t token, bool is_sealed) {
        const int64_t query = (token - item.first) * heads;
        return QueryHeads{model, qkv + rows[token] * width + item.kv_head * heads * dim, states + query * stride,
                          scratch + query * kPageTokens, scratch + num_queries * kPageTokens + query,
                          is_sealed ? unpacked.key_norms : nullptr, unpacked.means + query};
    };
    const int64_t last_position = batch.positions[rows[item.last - 1]], own_page = last_position / kPageTokens;
    const int64_t oldest_seen = layer.window > 0 ? batch.positions[rows[item.first]] - layer.window + 1 : 0;
    const auto page_of_run = [&](int64_t number) {
        const int64_t next = number + 1 < group.max_pages ? number + 1 : number;
        const auto head_of = [&](const uint8_t* all, int64_t page, int64_t bytes) {
            return all + (table[page] * kv_heads + item.kv_head) * bytes;
        };
        if (group.sealed < 0 || number >= own_page) {
            const int64_t bytes = kPageTokens * dim * kNumberBytes;
            return PageOfRun{head_of(pages.keys, number, bytes), head_of(pages.values, number, bytes),
                             head_of(pages.keys, next, bytes), head_of(pages.values, next, bytes), nullptr, nullptr, nullptr};
        }
        const SealedPages& sealed = pages.sealed[group.sealed];
        const int64_t later = next < own_page ? next : number;
        const int64_t first = number == 0 ? group.first_pages[item.seq] * kv_heads + item.kv_head : -1;
        return PageOfRun{head_of(sealed.keys, number, sealed.key_bytes), head_of(sealed.values, number, sealed.value_bytes),
                         head_of(sealed.keys, later, sealed.key_bytes), head_of(sealed.values, later, sealed.value_bytes),
                         first < 0 ? nullptr : sealed.keys + first * sealed.key_bytes,
                         first < 0 ? nullptr : sealed.values + first * sealed.value_bytes, &sealed};
    };
    for (int64_t number = run * kRunPages; number < (run + 1) * kRunPages && number <= own_page; ++number) {
        const int64_t start = number * kPageTokens;
        if (start + kPageTokens <= oldest_seen) continue;
        const int64_t written = last_position - start + 1 < kPageTokens ? last_position - start + 1 : kPageTokens;
        const auto seen_by = [&](int64_t token) { return Seen(batch.positions[rows[token]], layer.window, start); };
        const PageOfRun page = page_of_run(number);
        const SealedPages* sealed = page.sealed;
        // What is read kAhead tokens after token `first`.
        const auto after = [&](const uint8_t* numbers, const uint8_t* next, int64_t first) {
            const int64_t wanted = first + kAhead, token_bytes = dim * kNumberBytes;
            if (sealed != nullptr) return Ahead{numbers, 0};
            return Ahead{wanted < kPageTokens ? numbers + wanted * token_bytes : next + (wanted - kPageTokens) * token_bytes,
                         token_bytes};
        };
        if (sealed != nullptr) {
            ask_for(page.next_keys, sealed->key_bytes);
            ask_for(page.next_values, sealed->value_bytes);
            read_norms(sealed->key_code, page.keys, unpacked.key_norms);
            read_norms(sealed->value_code, page.values, unpacked.value_norms);
            unpacked.make_exact(unpacked.key_norms, page.first_keys, sealed->exact_tokens);
            unpacked.make_exact(unpacked.value_norms, page.first_values, sealed->exact_tokens);
            read_mean(sealed->key_code, page.keys, dim, unpacked.mean);
            for (int64_t token = item.first; token < item.last; ++token)
                for (int64_t head = 0; head < heads; ++head) {
                    const float* q = heads_of(token, true).q + head * dim;
                    Floats sums = broadcast(0.0f);
                    for (int64_t d = 0; d < dim; d += kBlockRows) sums = fma(load_floats(q + d), load_floats(unpacked.mean + d), sums);
                    unpacked.means[(token - item.first) * heads + head] = sum_lanes(sums);
                }
        }
        for (int64_t first = 0; first < written; first += kBlockRows) {
            const uint8_t* keys = page.keys + first * dim * kNumberBytes;
            if (sealed != nullptr)
                keys = unpacked.unpack(sealed->key_code, page.keys, page.first_keys, sealed->exact_tokens, first, dim, unpacked.mean);
            const Ahead ahead = after(page.keys, page.values, first);
            for (int64_t token = item.first; token < item.last; ++token) {
                int64_t head = 0;
                const Seen seen = seen_by(token);
                if (!seen.touches(first)) continue;
                const QueryHeads own = heads_of(token, sealed != nullptr);
                if (sealed != nullptr)
                    own.template score_all<false, kMaxQueries>(head, heads, keys, seen, first, ahead);
                else
                    own.template score_all<kIsBf16, kMaxQueries>(head, heads, keys, seen, first, ahead.if_first(token == item.first));
            }
        }
        for (int64_t token = item.first; token < item.last; ++token) {
            const Seen seen = seen_by(token);
            const QueryHeads own = heads_of(token, sealed != nullptr);
            for (int64_t head = 0; head < heads && seen.begin < seen.end; ++head) {
                float* weights = own.scores + head * kPageTokens;
                own.rescales[head] = first_lane(weigh(weights, seen, own.states + head * stride));
                for (int64_t first = 0; sealed != nullptr && first < kPageTokens; first += kBlockRows)
                    if (seen.touches(first))
                        store_floats(weights + first, mul(load_floats(weights + first), load_floats(unpacked.value_norms + first)));
            }
        }
        for (int64_t d = 0; sealed != nullptr && d < dim; ++d) unpacked.mean[d] = 0.0f;  // values have none
        for (int64_t first = 0; first < written; first += kBlockRows) {
            const uint8_t* values = page.values + first * dim * kNumberBytes;
            if (sealed != nullptr)
                values = unpacked.unpack(sealed->value_code, page.values, page.first_values, sealed->exact_tokens, first, dim,
                                         unpacked.mean);
            const Ahead ahead = after(page.values, page.next_keys, first);
            const int64_t count = written - first < kBlockRows ? written - first : kBlockRows;
            for (int64_t token = item.first; token < item.last; ++token) {
                int64_t head = 0;
                const Seen seen = seen_by(token);
                if (!seen.touches(first)) continue;
                const QueryHeads own = heads_of(token, sealed != nullptr);
                if (sealed != nullptr)
                    own.template add_all<false, kMaxQueries>(head, heads, values, count, seen, first, ahead);
                else
                    own.template add_all<kIsBf16, kMaxQueries>(head, heads, values, count, seen, first,
                                                               ahead.if_first(token == item.first));
            }
        }
    }
}

static void attend(const Model& model, const Layer& layer, const Batch& batch, const Pages& pages,
                   const AttentionGroup& group, const AttentionItem& item, int64_t run, const float* qkv, float* states,
                   float* scratch) {
    if (pages.number_bytes == 2)
        attend_run<true>(model, layer, batch, pages, group, item, run, qkv, states, scratch);
    else
        attend_run<false>(model, layer, batch, pages, group, item, run, qkv, states, scratch);
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

static void write_attended(const Model& model, const Pages& pages, const AttentionGroup& group, const AttentionItem& item,
                           const float* states, float* out) {
    const int64_t dim = model.head_dim, queries_per_head = model.num_heads / model.num_kv_heads;
    const int64_t* rows = group.row_ids + item.seq * group.num_tokens;
    for (int64_t token = item.first; token < item.last; ++token)
        for (int64_t query = 0; query < queries_per_head; ++query, states += state_floats(dim)) {
            float* result = out + (rows[token] * model.num_heads + item.kv_head * queries_per_head + query) * dim;
            const Floats sum = broadcast(states[1]);
            for (int64_t d = 0; d < dim; d += kBlockRows)
                store_floats(result + d, div(load_floats(states + kStateHead + d), sum));
            if (group.sealed >= 0) from_basis(result, pages.sealed[group.sealed].signs, dim);
        }
}
