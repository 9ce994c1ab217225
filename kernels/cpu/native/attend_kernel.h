// New tokens against the pages of a run, after sealed_attention_kernel.h.
//
// Tokens go 16 at a time, or by whole sealed pages, through the pages of a run, then the runs are merged: in this order
// whatever the number of threads, the cut of a prompt or the company, so that a query's result depends on its own history alone.

// An exact page of one key head while a run's queries are computed against it, [kPageTokens, head_dim], and the one after it.
struct ExactPage {
    const uint8_t *keys, *values, *next_keys, *next_values;
};

// `written` tokens of a page; otherwise as attend_sealed.
template <bool kIsBf16, typename QueriesOf, typename SeenBy>
static void attend_exact(const ExactPage& page, int64_t written, int64_t dim, int64_t heads, int64_t first_query,
                         int64_t last_query, const QueriesOf& queries_of, const SeenBy& seen_by) {
    const int64_t token_bytes = dim * (kIsBf16 ? 2 : 4);
    // What is read kAhead tokens after token `first`, asked for once.
    const auto after = [&](const uint8_t* numbers, const uint8_t* next, int64_t first) {
        const int64_t wanted = first + kAhead;
        return Ahead{wanted < kPageTokens ? numbers + wanted * token_bytes : next + (wanted - kPageTokens) * token_bytes,
                     token_bytes};
    };
    for (int64_t first = 0; first < written; first += kBlockRows) {
        const Ahead ahead = after(page.keys, page.values, first);
        for (int64_t token = first_query; token < last_query; ++token) {
            const Seen seen = seen_by(token);
            int64_t head = 0;
            if (seen.touches(first))
                queries_of(token).template score_all<kIsBf16, kMaxQueries>(head, heads, page.keys + first * token_bytes, seen,
                                                                           first, ahead.if_first(token == first_query));
        }
    }
    for (int64_t token = first_query; token < last_query; ++token) {
        const Seen seen = seen_by(token);
        const QueryHeads own = queries_of(token);
        for (int64_t head = 0; head < heads && seen.begin < seen.end; ++head)
            own.rescales[head] =
                first_lane(weigh(own.scores + head * kPageTokens, seen, own.states + head * state_floats(dim)));
    }
    for (int64_t first = 0; first < written; first += kBlockRows) {
        const Ahead ahead = after(page.values, page.next_keys, first);
        const int64_t count = written - first < kBlockRows ? written - first : kBlockRows;
        for (int64_t token = first_query; token < last_query; ++token) {
            const Seen seen = seen_by(token);
            int64_t head = 0;
            if (seen.touches(first))
                queries_of(token).template add_all<kIsBf16, kMaxQueries>(head, heads, page.values + first * token_bytes, count,
                                                                         seen, first, ahead.if_first(token == first_query));
        }
    }
}

template <bool kIsBf16>
static void attend_run(const Model& model, const Layer& layer, const Batch& batch, const Pages& pages,
                       const AttentionGroup& group, const AttentionItem& item, int64_t run, const float* qkv, float* states,
                       float* scratch) {
    const int64_t dim = model.head_dim, kv_heads = model.num_kv_heads, heads = model.num_heads / kv_heads;
    const int64_t width = (model.num_heads + 2 * kv_heads) * dim, stride = state_floats(dim);
    const int64_t* rows = group.row_ids + item.seq * group.num_tokens;
    const int64_t* table = group.block_tables + item.seq * group.max_pages;
    const int64_t num_queries = (item.last - item.first) * heads;
    for (int64_t query = 0; query < num_queries; ++query) {
        float* state = states + query * stride;
        for (int64_t i = 0; i < stride; ++i) state[i] = 0.0f;
        largest_of(state) = -__builtin_inff();
    }
    const auto queries_of = [&](int64_t token) {
        const int64_t query = (token - item.first) * heads;
        return QueryHeads{model, qkv + rows[token] * width + item.kv_head * heads * dim, states + query * stride,
                          scratch + query * kPageTokens, scratch + num_queries * kPageTokens + query};
    };
    const auto head_of = [&](const uint8_t* all, int64_t page, int64_t bytes) {
        return all + (page * kv_heads + item.kv_head) * bytes;
    };
    const int64_t last_position = batch.positions[rows[item.last - 1]], own_page = last_position / kPageTokens;
    const int64_t oldest_seen = layer.window > 0 ? batch.positions[rows[item.first]] - layer.window + 1 : 0;
    const SealedPages* sealed = group.sealed < 0 ? nullptr : pages.sealed + group.sealed;
    const SealedScratch unpacked(scratch + scores_floats(num_queries), num_queries);
    bool is_prepared = false;
    for (int64_t number = run * kRunPages; number < (run + 1) * kRunPages && number <= own_page; ++number) {
        const int64_t start = number * kPageTokens;
        if (start + kPageTokens <= oldest_seen) continue;
        const auto seen_by = [&](int64_t token) { return Seen(batch.positions[rows[token]], layer.window, start); };
        const int64_t next = table[number + 1 < group.max_pages ? number + 1 : number];
        if (sealed == nullptr || number == own_page) {
            const int64_t bytes = kPageTokens * dim * (kIsBf16 ? 2 : 4);
            const ExactPage page{head_of(pages.keys, table[number], bytes), head_of(pages.values, table[number], bytes),
                                 head_of(pages.keys, next, bytes), head_of(pages.values, next, bytes)};
            const int64_t written = last_position - start + 1 < kPageTokens ? last_position - start + 1 : kPageTokens;
            attend_exact<kIsBf16>(page, written, dim, heads, item.first, item.last, queries_of, seen_by);
            continue;
        }
        if (number + 1 < own_page) {
            ask_for(head_of(sealed->keys, next, sealed->key_bytes), sealed->key_bytes);
            ask_for(head_of(sealed->values, next, sealed->value_bytes), sealed->value_bytes);
        }
        const int64_t first_page = number == 0 ? group.first_pages[item.seq] : -1;
        const SealedPage page{*sealed, head_of(sealed->keys, table[number], sealed->key_bytes),
                              head_of(sealed->values, table[number], sealed->value_bytes),
                              first_page < 0 ? nullptr : head_of(sealed->keys, first_page, sealed->key_bytes),
                              first_page < 0 ? nullptr : head_of(sealed->values, first_page, sealed->value_bytes)};
        for (int64_t token = item.first; !is_prepared && token < item.last; ++token) {
            const QueryHeads own = queries_of(token);
            SealedQueries{own, page, unpacked, (token - item.first) * heads}.prepare(heads);
        }
        is_prepared = true;
        attend_sealed(page, unpacked, dim, heads, item.first, item.last, queries_of, seen_by);
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
