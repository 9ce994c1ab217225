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

// A page's norms, 0 for the code 0 and else 2^(low + step * (code - 1)).
static inline void read_norms(const PairCode& code, const uint8_t* record, float* norms) {
    const float low = half_to_float(record + code.norm_range), step = half_to_float(record + code.norm_range + 2);
    for (int64_t token = 0; token < kPageTokens; ++token)
        norms[token] = (low + step * ((float)record[code.norms + token] - 1.0f)) * 0.693147180559945f;
    for (int64_t token = 0; token < kPageTokens; token += kBlockRows)
        store_floats(norms + token, exp_floats(load_floats(norms + token)));
    for (int64_t token = 0; token < kPageTokens; ++token)
        if (record[code.norms + token] == 0) norms[token] = 0.0f * low;  // not a number if the page is none
        else if (!(low == low)) norms[token] = low;
}
static inline void read_mean(const PairCode& code, const uint8_t* record, int64_t dim, float* mean) {
    if (code.mean < 0) {
        for (int64_t d = 0; d < dim; ++d) mean[d] = 0.0f;
        return;
    }
    const float low = half_to_float(record + code.mean_range), step = half_to_float(record + code.mean_range + 2);
    for (int64_t d = 0; d < dim; ++d) mean[d] = low + step * (float)record[code.mean + d];
}

// What the codes of 16 tokens from `first` on stand for, before norms and mean: out [16, dim].
static inline void read_pairs(const PairCode& code, const uint8_t* record, int64_t first, int64_t dim, float* out) {
    const int64_t bytes = dim / 2 * code.bits / 8;
    for (int64_t token = 0; token < kBlockRows; ++token, out += dim) {
        const uint8_t* codes = record + (first + token) * bytes;
        if (code.bits == 8) {
            for (int64_t pair = 0; pair < dim / 2; ++pair) __builtin_memcpy(out + 2 * pair, code.pairs + 2 * codes[pair], 8);
        } else if (code.bits == 4) {
            for (int64_t byte = 0; byte < bytes; ++byte) __builtin_memcpy(out + 4 * byte, code.pairs + 4 * codes[byte], 16);
        } else {  // a plane of four bits, then one of two
            const uint8_t* low = codes + dim / 4;
            for (int64_t four = 0; four < dim / 8; ++four)
                for (int64_t i = 0; i < 4; ++i) {
                    const int64_t index = (codes[2 * four + i / 2] >> i % 2 * 4 & 15) << 2 | (low[four] >> 2 * i & 3);
                    __builtin_memcpy(out + 8 * four + 2 * i, code.pairs + 2 * index, 8);
                }
        }
    }
}

// Puts a sequence's exact first tokens in the place of what their codes stand for; their norms are 1.
static inline void read_exactly(const uint8_t* record, int64_t tokens, int64_t dim, const float* mean, float* out) {
    for (int64_t i = 0; i < tokens * dim; i += kBlockRows) {
        store_floats(out + i, load_bf16((const uint16_t*)record + i));
        for (int64_t lane = 0; lane < kBlockRows; ++lane) out[i + lane] -= mean[(i + lane) % dim];
    }
}

static inline void ask_for(const uint8_t* from, int64_t bytes) {
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(from + byte, 0, 2);
}
