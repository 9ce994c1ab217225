// Queries against sealed pages, after attention_kernel.h.
//
// Codes are looked up as levels, whole numbers of steps of their table, a byte each. Queries and weights are fixed point
// numbers of two digits (activations_kernel.h), so that products and their sums are whole numbers too, and exact. A page's
// norms and mean are applied to scores and weights.

// Pages hold vectors of so many numbers at least; more than the head's are multiplied with 0.
static inline int64_t width_of(int64_t dim) { return dim < 32 ? 32 : dim; }

// Numbers as products with levels take them.
struct FixedPoint {
    float step;
    int32_t start;  // of sums of products, which takes back that levels are larger by 128
};
static inline FixedPoint to_fixed(const float* values, int64_t size, uint8_t* fours) {
    int8_t high[kMaxHeadDim], low[kMaxHeadDim];
    FixedPoint fixed;
    fixed.start = -128 * quantize_group(values, size, high, low, &fixed.step);
    for (int64_t i = 0; i < size; i += 4) store_four(high + i, low + i, fours + 2 * i);
    return fixed;
}

// Working memory of one item: what is said of queries is there for each of them.
struct SealedScratch {
    float *key_norms, *value_norms, *mean, *means, *exact;
    FixedPoint* fixed;
    uint8_t *fours, *codes, *levels;

    SealedScratch(float* from, int64_t queries)
        : key_norms(from), value_norms(key_norms + kPageTokens), mean(value_norms + kPageTokens), means(mean + kMaxHeadDim),
          exact(means + (queries + 15) / 16 * 16), fixed((FixedPoint*)(exact + kBlockRows * kMaxHeadDim)),
          fours((uint8_t*)(fixed + (queries + 7) / 8 * 8)), codes(fours + queries * 2 * kMaxHeadDim),
          levels(codes + kPageTokens * kMaxHeadDim / 2 + kLanes) {}
};

// One sealed page of one key head.
struct SealedPage {
    const SealedPages& pages;
    const uint8_t *keys, *values;              // the records
    const uint8_t *first_keys, *first_values;  // where the first tokens are exact; null: not in this page

    int64_t exact_tokens() const { return first_keys == nullptr ? 0 : pages.exact_tokens; }
};

template <int kBits>
static inline void read_levels(const PairCode& code, const uint8_t* record, bool are_keys, int64_t dim,
                               const SealedScratch& scratch) {
    const int64_t width = width_of(dim);
    const uint8_t* codes = record;
    if (kBits != 8 || width != dim) {
        read_codes(code, record, dim, width, scratch.codes);
        codes = scratch.codes;
    }
    const LevelTable<kBits> table{code.levels};
    if (!are_keys) return read_values<kBits>(table, codes, width, scratch.levels);
    switch (width) {
        case 32: return read_keys<kBits, 4>(table, codes, scratch.levels);
        case 64: return read_keys<kBits, 8>(table, codes, scratch.levels);
        case 128: return read_keys<kBits, 16>(table, codes, scratch.levels);
        default: return read_keys<kBits, 32>(table, codes, scratch.levels);
    }
}
static inline void read_levels(const PairCode& code, const uint8_t* record, bool are_keys, int64_t dim,
                               const SealedScratch& scratch) {
    if (code.bits == 8) return read_levels<8>(code, record, are_keys, dim, scratch);
    if (code.bits == 6) return read_levels<6>(code, record, are_keys, dim, scratch);
    return read_levels<4>(code, record, are_keys, dim, scratch);
}

// A sequence's exact first tokens, as floats.
static inline const uint8_t* read_exactly(const uint8_t* record, int64_t numbers, float* out) {
    for (int64_t i = 0; i < numbers; i += kBlockRows) store_floats(out + i, load_bf16((const uint16_t*)record + i));
    return (const uint8_t*)out;
}

// One token's query heads of one key head; `query` is the first of them among the item's.
struct SealedQueries {
    const QueryHeads& own;
    const SealedPage& page;
    const SealedScratch& scratch;
    int64_t query;

    const uint8_t* fours_of(int64_t head) const { return scratch.fours + (query + head) * 2 * width_of(own.model.head_dim); }

    // Once for all pages. Numbers of a head go as read_keys has them.
    void prepare(int64_t heads) const {
        const int64_t dim = own.model.head_dim, width = width_of(dim);
        float numbers[kMaxHeadDim] = {};
        for (int64_t head = 0; head < heads; ++head) {
            for (int64_t d = 0; d < dim; d += 8)
                for (int64_t i = 0; i < 8; ++i) numbers[d + i % 2 * 4 + i / 2] = own.q[head * dim + d + i];
            scratch.fixed[query + head] = to_fixed(numbers, width, scratch.fours + (query + head) * 2 * width);
        }
    }

    // Scores of all tokens of the page, whose levels of keys are there.
    template <int kQueries>
    void score(int64_t head, const Seen& seen) const {
        const Model& model = own.model;
        const int64_t dim = model.head_dim, num_fours = width_of(dim) / 4;
        for (int n = 0; n < kQueries; ++n) {
            Floats sums = broadcast(0.0f);
            for (int64_t d = 0; d < dim; d += kBlockRows)
                sums = fma(load_floats(own.q + (head + n) * dim + d), load_floats(scratch.mean + d), sums);
            scratch.means[query + head + n] = sum_lanes(sums);
        }
        for (int64_t first = 0; first < kPageTokens; first += kLevelBlocks * kBlockRows) {
            LevelSums sums[kQueries][kLevelBlocks];
            for (int n = 0; n < kQueries; ++n)
                for (int b = 0; b < kLevelBlocks; ++b) sums[n][b] = level_sums(scratch.fixed[query + head + n].start);
            const uint8_t* levels = scratch.levels + first * num_fours * 4;
#pragma GCC unroll 4
            for (int64_t four = 0; four < num_fours; ++four)
                for (int b = 0; b < kLevelBlocks; ++b) {
                    const Bytes keys = load(levels + (b * num_fours + four) * kLanes);
                    for (int n = 0; n < kQueries; ++n) dot_levels(sums[n][b], keys, fours_of(head + n) + 8 * four);
                }
            for (int n = 0; n < kQueries; ++n)
                for (int b = 0; b < kLevelBlocks; ++b) {
                    const int64_t token = first + b * kBlockRows;
                    const float step = scratch.fixed[query + head + n].step * page.pages.key_code.step;
                    const Floats products = fma(mul(from(total(sums[n][b])), broadcast(step)),
                                                load_floats(scratch.key_norms + token), broadcast(scratch.means[query + head + n]));
                    store_floats(own.scores + (head + n) * kPageTokens + token, scores_of(model, products, seen, token));
                }
        }
    }
    // Puts the exact tokens' scores in the place of what their codes stand for.
    void score_exactly(int64_t head, const uint8_t* keys, const Seen& seen) const {
        float* scores = own.scores + head * kPageTokens;
        float others[kBlockRows];
        __builtin_memcpy(others, scores, sizeof others);
        own.template score<false, 1>(head, keys, seen, 0, Ahead{keys, 0});
        for (int64_t token = page.exact_tokens(); token < kBlockRows; ++token) scores[token] = others[token];
    }
    template <int kQueries>
    void score_all(int64_t& head, int64_t heads, const Seen& seen) const {
        for (; head + kQueries <= heads; head += kQueries) score<kQueries>(head, seen);
        if constexpr (kQueries > 1) score_all<kQueries - 1>(head, heads, seen);
    }

    // Weights of the page's tokens, in the place of their scores.
    void weigh_all(int64_t heads, const Seen& seen) const {
        for (int64_t head = 0; head < heads; ++head) {
            float* weights = own.scores + head * kPageTokens;
            own.rescales[head] = first_lane(weigh(weights, seen, own.states + head * state_floats(own.model.head_dim)));
            for (int64_t first = 0; first < kPageTokens; first += kBlockRows)
                if (!seen.touches(first)) store_floats(weights + first, broadcast(0.0f));
        }
    }

    // Adds the weighted values of the page, whose levels are there.
    template <int kQueries>
    void add(int64_t head, const Seen& seen, const uint8_t* exact_values) const {
        const int64_t dim = own.model.head_dim, vectors = width_of(dim) / 32, stride = state_floats(dim);
        uint8_t fours[kQueries][2 * kPageTokens];
        FixedPoint fixed[kQueries];
        float factors[kQueries];
        for (int n = 0; n < kQueries; ++n) {
            float weights[kPageTokens];
            __builtin_memcpy(weights, own.scores + (head + n) * kPageTokens, sizeof weights);
            for (int64_t token = 0; token < page.exact_tokens(); ++token) weights[token] = 0.0f;
            float ordered[kPageTokens];
            for (int64_t token = 0; token < kPageTokens / 4; ++token)
                for (int64_t i = 0; i < 4; ++i) {
                    const int64_t other = token + i * kPageTokens / 4;
                    ordered[4 * token + i] = weights[other] * scratch.value_norms[other];
                }
            fixed[n] = to_fixed(ordered, kPageTokens, fours[n]);
            factors[n] = own.rescales[head + n];
        }
        float* totals = values_of(own.states + head * stride);
        if (seen.begin < page.exact_tokens()) {
            own.template add<false, kQueries>(head, exact_values, page.exact_tokens(), seen, 0, Ahead{exact_values, 0});
            for (float& factor : factors) factor = 1.0f;
        }
        for (int64_t v = 0; v < vectors; ++v) {
            LevelSums sums[kQueries][2];
            for (int n = 0; n < kQueries; ++n) sums[n][0] = sums[n][1] = level_sums(fixed[n].start);
#pragma GCC unroll 4
            for (int64_t four = 0; four < kPageTokens / 4; ++four)
                for (int half = 0; half < 2; ++half) {
                    const Bytes values = load(scratch.levels + ((four * vectors + v) * 2 + half) * kLanes);
                    for (int n = 0; n < kQueries; ++n) dot_levels(sums[n][half], values, fours[n] + 8 * four);
                }
            for (int n = 0; n < kQueries; ++n) {
                const Floats step = broadcast(fixed[n].step * page.pages.value_code.step);
                Floats values[2];
                zip_floats(mul(from(total(sums[n][0])), step), mul(from(total(sums[n][1])), step), values);
                for (int64_t d = 32 * v; d < 32 * (v + 1) && d < dim; d += kBlockRows) {
                    float* to = totals + n * stride + d;
                    store_floats(to, fma(load_floats(to), broadcast(factors[n]), values[(d - 32 * v) / kBlockRows]));
                }
            }
        }
    }
    template <int kQueries>
    void add_all(int64_t& head, int64_t heads, const Seen& seen, const uint8_t* exact_values) const {
        for (; head + kQueries <= heads; head += kQueries) add<kQueries>(head, seen, exact_values);
        if constexpr (kQueries > 1) add_all<kQueries - 1>(head, heads, seen, exact_values);
    }
};

// A page, which all queries come after: `queries_of(token)` and `seen_by(token)` are those of tokens first .. last-1.
template <typename QueriesOf, typename SeenBy>
static void attend_sealed(const SealedPage& page, const SealedScratch& scratch, int64_t dim, int64_t heads, int64_t first,
                          int64_t last, const QueriesOf& queries_of, const SeenBy& seen_by) {
    const SealedPages& pages = page.pages;
    const int64_t exact_tokens = page.exact_tokens();
    read_norms(pages.key_code, page.keys, scratch.key_norms);
    read_norms(pages.value_code, page.values, scratch.value_norms);
    read_mean(pages.key_code, page.keys, dim, scratch.mean);
    read_levels(pages.key_code, page.keys, true, dim, scratch);
    const uint8_t* exact = read_exactly(page.first_keys, exact_tokens * dim, scratch.exact);
    const auto for_all = [&](const auto& visit) {
        for (int64_t token = first; token < last; ++token) {
            const Seen seen = seen_by(token);
            if (seen.begin >= seen.end) continue;
            const QueryHeads own = queries_of(token);
            visit(SealedQueries{own, page, scratch, (token - first) * heads}, seen);
        }
    };
    for_all([&](const SealedQueries& queries, const Seen& seen) {
        int64_t head = 0;
        queries.template score_all<kLevelQueries>(head, heads, seen);
        for (head = 0; exact_tokens > 0 && head < heads; ++head) queries.score_exactly(head, exact, seen);
        queries.weigh_all(heads, seen);
    });
    read_levels(pages.value_code, page.values, false, dim, scratch);
    exact = read_exactly(page.first_values, exact_tokens * dim, scratch.exact);
    for_all([&](const SealedQueries& queries, const Seen& seen) {
        int64_t head = 0;
        queries.template add_all<kLevelQueries>(head, heads, seen, exact);
    });
}
