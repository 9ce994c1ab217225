// Encodes whole pages as kvcache/codec/pages.py does; most loops are plain, and compilers turn them into vectors.

static inline void store_half(float value, uint8_t* to) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7FFFFFFF;
    uint16_t half;
    if (bits > 0x7F800000) {
        half = 0x7E00;
    } else if (bits >= 0x477FF000) {  // rounds beyond 65504
        half = 0x7C00;
    } else if (bits >= 0x38800000) {
        half = (uint16_t)((bits + 0xFFF + (bits >> 13 & 1) - (112u << 23)) >> 13);
    } else {  // a number of 2^-24, to the nearest, ties to even
        half = (uint16_t)__builtin_rintf(__builtin_fabsf(value) * 16777216.0f);
    }
    half |= sign;
    __builtin_memcpy(to, &half, 2);
}

// Codes 0 .. `largest` of values evenly spaced from the lowest on; the range to `range`, as it is read back.
struct PageRange {
    float low, divisor;

    PageRange(float lowest, float highest, float largest, uint8_t* range) {
        store_half(lowest, range);
        low = half_to_float(range);
        store_half((highest - low) / largest, range + 2);
        const float step = half_to_float(range + 2);
        divisor = step > 0.0f ? step : 1.0f;
    }
    float code_of(float value, float largest) const {
        const float code = __builtin_rintf((value - low) / divisor);
        return code < 0.0f ? 0.0f : code > largest ? largest : code;
    }
};

// Takes the page's mean off rows [kPageTokens, dim], as it is stored.
static inline void store_mean(const PairCode& code, int64_t dim, float* rows, uint8_t* record) {
    float mean[kMaxHeadDim] = {};
    for (int64_t token = 0; token < kPageTokens; ++token)
        for (int64_t d = 0; d < dim; ++d) mean[d] += rows[token * dim + d];
    float low = __builtin_inff(), high = -low;
    for (int64_t d = 0; d < dim; ++d) {
        mean[d] /= kPageTokens;
        low = mean[d] < low ? mean[d] : low;
        high = mean[d] > high ? mean[d] : high;
    }
    const PageRange range(low, high, 255.0f, record + code.mean_range);
    for (int64_t d = 0; d < dim; ++d) record[code.mean + d] = (uint8_t)range.code_of(mean[d], 255.0f);
    read_mean(code, record, dim, mean);
    for (int64_t token = 0; token < kPageTokens; ++token)
        for (int64_t d = 0; d < dim; ++d) rows[token * dim + d] -= mean[d];
}

static inline void store_norms(const PairCode& code, const float* norms, uint8_t* record) {
    float logs[kPageTokens], low = __builtin_inff(), high = -low;
    for (int64_t token = 0; token < kPageTokens; ++token) {
        if (!(norms[token] > 0.0f)) continue;
        logs[token] = __builtin_log2f(norms[token]);
        low = logs[token] < low ? logs[token] : low;
        high = logs[token] > high ? logs[token] : high;
    }
    if (low > high) low = high = 0.0f;
    const PageRange range(low, high, 253.0f, record + code.norm_range);
    for (int64_t token = 0; token < kPageTokens; ++token)
        record[code.norms + token] = norms[token] > 0.0f ? (uint8_t)(range.code_of(logs[token], 253.0f) + 1.0f) : 0;
}

// The nearest of `count` points of the plane to each of `pairs`, as numbers from 0 on; the first of equals. Whole vectors of
// pairs are read and written.
static inline void nearest(const float* points, int64_t count, const float* high, const float* low, int64_t pairs,
                           int32_t* found) {
    for (int64_t pair = 0; pair < pairs; pair += kBlockRows) {
        const Floats first = mul(load_floats(high + pair), broadcast(-1.0f));
        const Floats second = mul(load_floats(low + pair), broadcast(-1.0f));
        Floats least = broadcast(__builtin_inff()), numbers = broadcast(0.0f);
        for (int64_t point = 0; point < count; ++point) {
            const Floats right = add(broadcast(points[2 * point]), first), up = add(broadcast(points[2 * point + 1]), second);
            const Floats distance = add(mul(right, right), mul(up, up));
            numbers = if_less(distance, least, broadcast((float)point), numbers);
            least = if_less(distance, least, distance, least);
        }
        float lanes[kBlockRows];
        store_floats(lanes, numbers);
        for (int64_t lane = 0; lane < kBlockRows; ++lane) found[pair + lane] = (int32_t)lanes[lane];
    }
}

// A token's numbers to codes, one a pair; returns the norm that fits them best.
static inline float choose_pairs(const PairCode& code, const float* row, int64_t dim, int32_t* codes) {
    const int64_t pairs = dim / 2, entries = (int64_t)1 << (code.bits - 1), of_cluster = entries / code.num_clusters;
    float squares = 0.0f;
    for (int64_t d = 0; d < dim; ++d) squares += row[d] * row[d];
    const float size = __builtin_sqrtf(squares / (float)dim), divisor = size > 0.0f ? size : 1.0f;
    float high[kMaxHeadDim / 2] = {}, low[kMaxHeadDim / 2] = {};
    for (int64_t pair = 0; pair < pairs; ++pair) {
        const float a = row[2 * pair] / divisor, b = row[2 * pair + 1] / divisor;
        high[pair] = a > b ? a : b;
        low[pair] = a > b ? b : a;
    }
    nearest(code.clusters, code.num_clusters, high, low, pairs, codes);
    int32_t nearest_of[kMaxHeadDim / 2], clusters[kMaxHeadDim / 2];
    for (int64_t pair = 0; pair < pairs; ++pair) clusters[pair] = codes[pair];
    for (int64_t cluster = 0; cluster < code.num_clusters; ++cluster) {
        const int64_t first = cluster * of_cluster;
        nearest(code.entries + 2 * first, of_cluster, high, low, pairs, nearest_of);
        for (int64_t pair = 0; pair < pairs; ++pair)
            codes[pair] = clusters[pair] == cluster ? (int32_t)first + nearest_of[pair] : codes[pair];
    }
    float products = 0.0f, levels = 0.0f;
    for (int64_t pair = 0; pair < pairs; ++pair) {
        const float a = row[2 * pair], b = row[2 * pair + 1];
        const bool exchanged = a < b;
        const float x = code.entries[2 * codes[pair]], y = code.entries[2 * codes[pair] + 1];
        products += exchanged ? a * y + b * x : a * x + b * y;
        levels += x * x + y * y;
        codes[pair] |= exchanged ? (int32_t)entries : 0;
    }
    const float norm = products / levels;
    return norm > 0.0f ? norm : 0.0f;
}

static inline void pack_codes(const int32_t* codes, int64_t pairs, int64_t bits, uint8_t* out) {
    if (bits == 8) {
        for (int64_t pair = 0; pair < pairs; ++pair) out[pair] = (uint8_t)codes[pair];
        return;
    }
    const int64_t shift = bits - 4;
    for (int64_t pair = 0; pair < pairs; pair += 2)
        out[pair / 2] = (uint8_t)(codes[pair] >> shift | codes[pair + 1] >> shift << 4);
    for (int64_t pair = 0; shift > 0 && pair < pairs; pair += 4) {
        uint8_t byte = 0;
        for (int i = 0; i < 4; ++i) byte |= (uint8_t)((codes[pair + i] & 3) << 2 * i);
        out[pairs / 2 + pair / 4] = byte;
    }
}

static void seal(const PairCode& code, const uint8_t* numbers, int64_t number_bytes, int64_t dim, uint8_t* record) {
    float rows[kPageTokens * kMaxHeadDim], norms[kPageTokens];
    Floats zeros = broadcast(0.0f);
    for (int64_t i = 0; i < kPageTokens * dim; i += kBlockRows) {
        const Floats read = number_bytes == 2 ? load_numbers<true>(numbers, i) : load_numbers<false>(numbers, i);
        store_floats(rows + i, read);
        zeros = fma(read, broadcast(0.0f), zeros);
    }
    if (sum_lanes(zeros) != 0.0f) {  // a number is not finite: nor shall be what is read
        for (int64_t token = 0; token < kPageTokens; ++token) record[code.norms + token] = 1;
        store_half(__builtin_nanf(""), record + code.norm_range);
        if (code.mean >= 0) store_half(__builtin_nanf(""), record + code.mean_range);
        return;
    }
    if (code.mean >= 0) store_mean(code, dim, rows, record);
    for (int64_t token = 0; token < kPageTokens; ++token) {
        int32_t codes[kMaxHeadDim / 2];
        norms[token] = choose_pairs(code, rows + token * dim, dim, codes);
        pack_codes(codes, dim / 2, code.bits, record + token * dim / 2 * code.bits / 8);
    }
    store_norms(code, norms, record);
}
