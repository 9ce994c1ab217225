// Activations to fixed point numbers, over no vector type: compilers turn these loops into vectors. Included as linear_kernel.h is.

// One group; returns the sum of its fixed point numbers.
static inline int32_t quantize_group(const float* values, int64_t size, int8_t* high, int8_t* low, float* step) {
    // The bits of magnitudes are in the order of the magnitudes, NaN above infinity above all numbers.
    uint32_t largest = 0;
    for (int64_t i = 0; i < size; ++i) {
        uint32_t bits;
        __builtin_memcpy(&bits, values + i, 4);
        bits &= 0x7FFFFFFF;
        largest = bits > largest ? bits : largest;
    }
    float magnitude;
    __builtin_memcpy(&magnitude, &largest, 4);
    if (!(magnitude <= 3.4e38f)) {  // NaN or infinite: so are all outputs of this row
        for (int64_t i = 0; i < size; ++i) high[i] = low[i] = 0;
        *step = __builtin_nanf("");
        return 0;
    }
    const float inverse = magnitude > 1e-30f ? (float)kLargestActivation / magnitude : 0.0f;
    int32_t sum = 0;
    for (int64_t i = 0; i < size; ++i) {
        // Adding and taking away 1.5 * 2^23 rounds to the nearest integer, ties to even.
        const int32_t rounded = (int32_t)((values[i] * inverse + 12582912.0f) - 12582912.0f);
        const int32_t upper = (rounded + 64) >> 7;
        high[i] = (int8_t)upper;
        low[i] = (int8_t)(rounded - (upper << 7));
        sum += rounded;
    }
    *step = magnitude * (1.0f / (float)kLargestActivation);
    return sum;
}

static void quantize(const float* x, int64_t first, int64_t last, int64_t in_features, int64_t group_size, int8_t* digits,
                     float* step, float* total) {
    const int64_t groups = in_features / group_size;
    for (int64_t row = first; row < last; ++row)
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t index = row * groups + group;
            int8_t* high = digits + row * kDigits * in_features + group * group_size;
            const int32_t sum = quantize_group(x + row * in_features + group * group_size, group_size, high, high + in_features,
                                               step + index);
            total[index] = step[index] * (float)sum;
        }
}
