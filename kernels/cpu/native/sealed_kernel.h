// Sealed pages: the basis that their vectors are in, and what their bytes stand for. Over the same vector type as
// linear_kernel.h, before layer_kernel.h.

// vector = vector * signs, then sums and differences of neighbours, of neighbours' neighbours ..., over sqrt(size).
static inline void butterfly(float* vector, int64_t size) {
    for (int64_t span = 1; span < size; span *= 2)
        for (int64_t begin = 0; begin < size; begin += 2 * span)
            for (int64_t i = begin; i < begin + span; ++i) {
                const float a = vector[i], b = vector[i + span];
                vector[i] = a + b;
                vector[i + span] = a - b;
            }
    const float scale = 1.0f / __builtin_sqrtf((float)size);
    for (int64_t i = 0; i < size; ++i) vector[i] *= scale;
}
static inline void multiply_numbers(float* vector, const float* by, int64_t size) {
    for (int64_t i = 0; i < size; ++i) vector[i] *= by[i];
}
static inline void to_basis(float* vector, const float* signs, int64_t size) {
    multiply_numbers(vector, signs, size);
    butterfly(vector, size);
}
static inline void from_basis(float* vector, const float* signs, int64_t size) {
    butterfly(vector, size);
    multiply_numbers(vector, signs, size);
}

// A row's queries, keys and values [heads + 2 kv_heads, head_dim].
static inline void row_to_basis(const Model& model, const SealedPages& sealed, float* projected) {
    const int64_t dim = model.head_dim, heads = model.num_heads, kv_heads = model.num_kv_heads;
    if (sealed.weights != nullptr) {
        for (int64_t head = 0; head < heads; ++head) {
            const float* weights = sealed.weights + head / (heads / kv_heads) * dim;
            for (int64_t d = 0; d < dim; ++d) projected[head * dim + d] /= weights[d];
        }
        multiply_numbers(projected + heads * dim, sealed.weights, kv_heads * dim);
    }
    for (int64_t head = 0; head < heads + 2 * kv_heads; ++head) to_basis(projected + head * dim, sealed.signs, dim);
}

static inline float half_to_float(const uint8_t* from) {
    uint16_t half;
    __builtin_memcpy(&half, from, 2);
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7FFF;
    uint32_t bits;
    if (rest >= 0x7C00) {  // infinite, or not a number
        bits = sign | 0x7F800000 | (rest & 0x3FF) << 13;
    } else if (rest >= 0x400) {
        bits = sign | ((rest << 13) + ((127 - 15) << 23));
    } else {  // the number of 2^-24
        const float value = (float)rest * 5.9604644775390625e-8f;
        return sign ? -value : value;
    }
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

// A page's norms, 0 for the code 0 and else 2^(low + step * (code - 1)); not a number if the page is none.
static inline void read_norms(const PairCode& code, const uint8_t* record, float* norms) {
    const float low = half_to_float(record + code.norm_range), step = half_to_float(record + code.norm_range + 2);
    float logs[kPageTokens], codes[kPageTokens];
    for (int64_t token = 0; token < kPageTokens; ++token) {
        codes[token] = (float)record[code.norms + token];
        logs[token] = (low + step * (codes[token] - 1.0f)) * 0.693147180559945f;
    }
    for (int64_t token = 0; token < kPageTokens; token += kBlockRows) {
        const Floats read = zero_below(load_floats(codes + token), 1.0f, exp_floats(load_floats(logs + token)));
        store_floats(norms + token, add(read, broadcast(0.0f * low)));
    }
}
static inline void read_mean(const PairCode& code, const uint8_t* record, int64_t dim, float* mean) {
    if (code.mean < 0) {
        for (int64_t d = 0; d < dim; ++d) mean[d] = 0.0f;
        return;
    }
    const float low = half_to_float(record + code.mean_range), step = half_to_float(record + code.mean_range + 2);
    for (int64_t d = 0; d < dim; ++d) mean[d] = low + step * (float)record[code.mean + d];
}

// A page's codes one a byte, [kPageTokens, width / 2]; those beyond the head's mean nothing, and a vector less one are written
// beyond the last.
static inline void read_codes(const PairCode& code, const uint8_t* record, int64_t dim, int64_t width, uint8_t* out) {
    const int64_t pairs = dim / 2;
    if (code.bits == 8) {
        for (int64_t token = 0; token < kPageTokens; ++token) __builtin_memcpy(out + token * width / 2, record + token * pairs, pairs);
        return;
    }
    // Each token has a plane of four bits, with codes of six another one of two; those of four bits alone lie side by side.
    const int64_t together = code.bits == 4 && width == dim ? kPageTokens : 1;
    for (int64_t token = 0; token < kPageTokens; token += together) {
        const uint8_t* plane = record + token * pairs * code.bits / 8;
        for (int64_t pair = 0; pair < pairs * together; pair += kLanes) {
            Bytes codes = nibbles(plane + pair / 2);
            if (code.bits == 6) codes = select(0x3C, shifted(codes, -2), nibble_halves(plane + pairs / 2 + pair / 4));
            store(out + token * width / 2 + pair, codes);
        }
    }
}

// Levels of a page's keys, ready for products along the head: of every 16 tokens, fours of one half of 4 pairs and of the
// other by turns, each of all tokens. kVectors vectors hold 16 tokens' codes.
template <int kBits, int kVectors>
static inline void read_keys(const LevelTable<kBits>& table, const uint8_t* codes, uint8_t* levels) {
    for (int64_t first = 0; first < kPageTokens; first += kBlockRows) {
        Bytes fours[kVectors];
        for (int v = 0; v < kVectors; ++v, codes += kLanes) fours[v] = load(codes);
        for (int done = 1; done < kVectors; done *= 2) {  // each turn moves one bit of a four's place from its end to its front
            Bytes moved[kVectors];
            for (int v = 0; v < kVectors / 2; ++v) {
                moved[v] = even_fours(fours[2 * v], fours[2 * v + 1]);
                moved[kVectors / 2 + v] = odd_fours(fours[2 * v], fours[2 * v + 1]);
            }
            for (int v = 0; v < kVectors; ++v) fours[v] = moved[v];
        }
        for (int v = 0; v < kVectors; ++v, levels += 2 * kLanes) {
            const PairLevels found = table.look_up(fours[v]);
            store(levels, found.firsts);
            store(levels + kLanes, found.seconds);
        }
    }
}

// Levels of a page's values, ready for sums over tokens t, t + 16, t + 32 and t + 48: of every t, 16 pairs at a time, the
// fours of their one half and of their other.
template <int kBits>
static inline void read_values(const LevelTable<kBits>& table, const uint8_t* codes, int64_t width, uint8_t* levels) {
    const int64_t quarter = kPageTokens / 4 * width / 2;
    for (int64_t place = 0; place < quarter; place += kLanes) {
        Bytes even[2], odd[2], fours[4];
        zip_bytes(load(codes + place), load(codes + 2 * quarter + place), even);
        zip_bytes(load(codes + quarter + place), load(codes + 3 * quarter + place), odd);
        for (int half = 0; half < 2; ++half) zip_bytes(even[half], odd[half], fours + 2 * half);
        for (int v = 0; v < 4; ++v, levels += 2 * kLanes) {
            const PairLevels found = table.look_up(fours[v]);
            store(levels, found.firsts);
            store(levels + kLanes, found.seconds);
        }
    }
}

static inline void ask_for(const uint8_t* from, int64_t bytes) {
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(from + byte, 0, 2);
}
