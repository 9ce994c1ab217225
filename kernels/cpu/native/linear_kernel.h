// The kernels, written once over a vector type and compiled once per instruction set.
//
// Included by exactly one source file per instruction set, inside its namespace and after its vector type. The type offers
//   Bytes     64 unsigned bytes: load, store, shifted(v, n) (bits leave towards bit 0; towards bit 7 for n < 0; neighbours
//             may leak in), merge(v, mask, w) = (v & mask) | w, masked(v, mask)
//   Ints      16 int32 sums: zero, dot(sums, codes, four int8 activations)
//   Floats    16 floats: from(Ints), broadcast, load_part, load, store, fma, mul
//   kRowTile  rows computed together
// All arithmetic that can round is in `Epilogue`, one operation at a time in an order fixed by the number of groups, so a
// row's result depends on the row and the width alone, and is the same on every instruction set.

// Where the nibble of a code lies in a decoded byte: c2 at bits 3,2; c3 at bit 1; c4 at bit 0 (c6, c8 likewise in the low
// nibble). A width below 4 bits leaves the lower bits 0, which multiplies its sums by 4 or 2: exact, and divided out.
static inline float high_factor(int64_t bit_width) { return bit_width == 2 ? 0.25f : bit_width == 3 ? 0.5f : 1.0f; }
static inline float low_factor(int64_t bit_width) { return bit_width == 6 ? 0.25f : 1.0f; }

static inline int width_index(int64_t bit_width) {
    return bit_width == 2 ? 0 : bit_width == 3 ? 1 : bit_width == 4 ? 2 : bit_width == 6 ? 3 : 4;
}

// Field `step` of a 2-bit stream's two vectors, moved to bits 3,2.
template <int kStep>
static inline Bytes two_bits_high(const uint8_t* span) {
    return masked(shifted(load(span + (kStep / 4) * kLanes), 2 * (kStep % 4) - 2), 0x0C);
}

// High nibbles of one step.
template <int kBits, int kStep>
static inline Bytes high_nibbles(const uint8_t* c2, const uint8_t* c3, const uint8_t* c4) {
    Bytes codes = two_bits_high<kStep>(c2);
    if (kBits >= 3) codes = merge(shifted(load(c3), kStep - 1), 0x02, codes);
    if (kBits >= 4) codes = merge(shifted(load(c4), kStep), 0x01, codes);
    return codes;
}

// Low nibbles of one step; at 6 bits only their upper half.
template <int kBits, int kStep>
static inline Bytes low_nibbles(const uint8_t* c6, const uint8_t* c8) {
    Bytes codes = two_bits_high<kStep>(c6);
    if (kBits >= 8) codes = merge(shifted(load(c8 + (kStep / 4) * kLanes), 2 * (kStep % 4)), 0x03, codes);
    return codes;
}

// Streams of one block at the start of one group.
struct BlockStreams {
    const uint8_t* chunks[kNumChunks];

    BlockStreams(const Weight& weight, int64_t block) {
        for (int chunk = 0; chunk < kNumChunks; ++chunk)
            chunks[chunk] = weight.chunks[chunk] == nullptr ? nullptr
                                                            : weight.chunks[chunk] + block * weight.num_spans() *
                                                                                         kChunkBits[chunk] * kLanes;
    }
    void next_span() {
        for (int chunk = 0; chunk < kNumChunks; ++chunk) chunks[chunk] += kChunkBits[chunk] * kLanes;
    }
};

// The float part of one (block, group) at one width: level = high * sum of high nibbles (+ low * ...) + zero * total.
struct GroupPart {
    Floats high, low, zero;

    template <int kBits>
    static inline GroupPart load_group(const Weight& weight, int64_t index) {
        const FloatPart& own = weight.parts[width_index(kBits)];
        const FloatPart& nibble = kBits > 4 ? weight.parts[width_index(4)] : own;
        GroupPart part;
        part.high = mul(load_part(nibble.scale, weight.float_bytes, index), broadcast(high_factor(kBits)));
        part.zero = load_part(own.zero, weight.float_bytes, index);
        if (kBits > 4) part.low = mul(load_part(own.scale, weight.float_bytes, index), broadcast(low_factor(kBits)));
        return part;
    }
};

// y += step * (high * sum_high + low * sum_low + zero * total)
template <int kBits>
static inline Floats add_group(Floats y, const GroupPart& part, Ints sum_high, Ints sum_low, float step, float total) {
    Floats term = mul(part.zero, broadcast(total));
    term = fma(part.high, from(sum_high), term);
    if (kBits > 4) term = fma(part.low, from(sum_low), term);
    return fma(term, broadcast(step), y);
}

static inline void store_row(Floats y, const float* bias, float* out, int64_t first_row, int64_t out_features) {
    float values[kBlockRows];
    int64_t count = out_features - first_row;
    if (count >= kBlockRows) {
        if (bias != nullptr) y = add(y, load_floats(bias + first_row));
        store_floats(out + first_row, y);
        return;
    }
    store_floats(values, y);
    for (int64_t row = 0; row < count; ++row)
        out[first_row + row] = bias == nullptr ? values[row] : values[row] + bias[first_row + row];
}

template <int kBits, int kStep>
static inline void dot_step(const BlockStreams& streams, const int8_t* q, Ints& high, Ints& low) {
    high = dot(high, high_nibbles<kBits, kStep>(streams.chunks[0], streams.chunks[1], streams.chunks[2]), q + 4 * kStep);
    if (kBits > 4) low = dot(low, low_nibbles<kBits, kStep>(streams.chunks[3], streams.chunks[4]), q + 4 * kStep);
}

// One row: codes go from memory through registers into the sums.
template <int kBits>
static void linear_one_row(const Weight& weight, const Activations& x, int64_t row, const float* bias, float* y,
                           int64_t first, int64_t last) {
    const int64_t groups = weight.num_groups(), spans = weight.group_size / kSpanInputs;
    const int8_t* row_q = x.q + row * weight.in_features;
    for (int64_t block = first; block < last; ++block) {
        BlockStreams streams(weight, block);
        const int8_t* q = row_q;
        Floats result = broadcast(0.0f);
        for (int64_t group = 0; group < groups; ++group) {
            Ints high[2] = {zero_ints(), zero_ints()}, low[2] = {zero_ints(), zero_ints()};
            for (int64_t span = 0; span < spans; ++span) {
                dot_step<kBits, 0>(streams, q, high[0], low[0]);
                dot_step<kBits, 1>(streams, q, high[1], low[1]);
                dot_step<kBits, 2>(streams, q, high[0], low[0]);
                dot_step<kBits, 3>(streams, q, high[1], low[1]);
                dot_step<kBits, 4>(streams, q, high[0], low[0]);
                dot_step<kBits, 5>(streams, q, high[1], low[1]);
                dot_step<kBits, 6>(streams, q, high[0], low[0]);
                dot_step<kBits, 7>(streams, q, high[1], low[1]);
                streams.next_span();
                q += kSpanInputs;
            }
            const GroupPart part = GroupPart::load_group<kBits>(weight, (block * groups + group) * kBlockRows);
            result = add_group<kBits>(result, part, add(high[0], high[1]), add(low[0], low[1]),
                                      x.step[row * groups + group], x.total[row * groups + group]);
        }
        store_row(result, bias, y + row * weight.out_features, block * kBlockRows, weight.out_features);
    }
}

template <int kBits, int kStep>
static inline void decode_step(const BlockStreams& streams, uint8_t* high, uint8_t* low) {
    store(high + kStep * kLanes, high_nibbles<kBits, kStep>(streams.chunks[0], streams.chunks[1], streams.chunks[2]));
    if (kBits > 4) store(low + kStep * kLanes, low_nibbles<kBits, kStep>(streams.chunks[3], streams.chunks[4]));
}

// All codes of a block, one byte each: high nibbles, then low nibbles, each 16 * in_features bytes.
template <int kBits>
static void decode_block(const Weight& weight, int64_t block, uint8_t* high, uint8_t* low) {
    BlockStreams streams(weight, block);
    for (int64_t span = 0; span < weight.num_spans(); ++span) {
        decode_step<kBits, 0>(streams, high, low);
        decode_step<kBits, 1>(streams, high, low);
        decode_step<kBits, 2>(streams, high, low);
        decode_step<kBits, 3>(streams, high, low);
        decode_step<kBits, 4>(streams, high, low);
        decode_step<kBits, 5>(streams, high, low);
        decode_step<kBits, 6>(streams, high, low);
        decode_step<kBits, 7>(streams, high, low);
        streams.next_span();
        high += kSpanSteps * kLanes;
        low += kSpanSteps * kLanes;
    }
}

// kRows rows of one block whose codes are decoded.
template <int kBits, int kRows>
static void linear_tile(const Weight& weight, const Activations& x, int64_t row, const float* bias, float* y,
                        int64_t block, const uint8_t* high_codes, const uint8_t* low_codes) {
    const int64_t groups = weight.num_groups(), steps = weight.group_size / 4, in_features = weight.in_features;
    const int8_t* q = x.q + row * in_features;
    Floats results[kRows];
    for (int r = 0; r < kRows; ++r) results[r] = broadcast(0.0f);
    for (int64_t group = 0; group < groups; ++group) {
        Ints high[kRows], low[kRows];
        for (int r = 0; r < kRows; ++r) high[r] = low[r] = zero_ints();
        for (int64_t step = 0; step < steps; ++step) {
            const Bytes high_vector = load(high_codes);
            for (int r = 0; r < kRows; ++r) high[r] = dot(high[r], high_vector, q + r * in_features);
            if (kBits > 4) {
                const Bytes low_vector = load(low_codes);
                for (int r = 0; r < kRows; ++r) low[r] = dot(low[r], low_vector, q + r * in_features);
            }
            high_codes += kLanes;
            low_codes += kLanes;
            q += 4;
        }
        const GroupPart part = GroupPart::load_group<kBits>(weight, (block * groups + group) * kBlockRows);
        for (int r = 0; r < kRows; ++r)
            results[r] = add_group<kBits>(results[r], part, high[r], low[r], x.step[(row + r) * groups + group],
                                          x.total[(row + r) * groups + group]);
    }
    for (int r = 0; r < kRows; ++r)
        store_row(results[r], bias, y + (row + r) * weight.out_features, block * kBlockRows, weight.out_features);
}

template <int kBits>
static void linear_rows(const Weight& weight, const Activations& x, int64_t first_row, int64_t last_row,
                        const float* bias, float* y, int64_t block, uint8_t* scratch) {
    uint8_t* high = scratch;
    uint8_t* low = scratch + kBlockRows * weight.in_features;
    decode_block<kBits>(weight, block, high, low);
    int64_t row = first_row;
    for (; row + kRowTile <= last_row; row += kRowTile)
        linear_tile<kBits, kRowTile>(weight, x, row, bias, y, block, high, low);
    for (; row + 2 <= last_row; row += 2) linear_tile<kBits, 2>(weight, x, row, bias, y, block, high, low);
    if (row < last_row) linear_tile<kBits, 1>(weight, x, row, bias, y, block, high, low);
}

template <int kBits>
static void linear_segment(const Weight& weight, const Activations& x, const Segment& segment, const float* bias,
                           float* y, int64_t first, int64_t last, uint8_t* scratch) {
    if (segment.last - segment.first == 1)
        linear_one_row<kBits>(weight, x, segment.first, bias, y, first, last);
    else
        for (int64_t block = first; block < last; ++block)
            linear_rows<kBits>(weight, x, segment.first, segment.last, bias, y, block, scratch);
}

static void linear(const Weight& weight, const Activations& x, const Segment* segments, int64_t num_segments,
                   const float* bias, float* y, int64_t first, int64_t last, uint8_t* scratch) {
    // Block by block, so that streams that several widths share come from memory once.
    const int64_t stride = num_segments == 1 ? last - first : 1;
    for (int64_t block = first; block < last; block += stride)
        for (int64_t index = 0; index < num_segments; ++index) {
            const Segment& segment = segments[index];
            const int64_t end = block + stride;
            switch (segment.bit_width) {
                case 2: linear_segment<2>(weight, x, segment, bias, y, block, end, scratch); break;
                case 3: linear_segment<3>(weight, x, segment, bias, y, block, end, scratch); break;
                case 4: linear_segment<4>(weight, x, segment, bias, y, block, end, scratch); break;
                case 6: linear_segment<6>(weight, x, segment, bias, y, block, end, scratch); break;
                default: linear_segment<8>(weight, x, segment, bias, y, block, end, scratch); break;
            }
        }
}

static void quantize(const float* x, int64_t first, int64_t last, int64_t in_features, int64_t group_size, int8_t* q,
                     float* step, float* total) {
    const int64_t groups = in_features / group_size;
    for (int64_t index = first * groups; index < last * groups; ++index) {
        const float* values = x + index * group_size;
        int8_t* out = q + index * group_size;
        // The bits of magnitudes are in the order of the magnitudes, NaN above infinity above all numbers.
        uint32_t largest = 0;
        for (int64_t i = 0; i < group_size; ++i) {
            uint32_t bits;
            __builtin_memcpy(&bits, values + i, 4);
            bits &= 0x7FFFFFFF;
            largest = bits > largest ? bits : largest;
        }
        float magnitude;
        __builtin_memcpy(&magnitude, &largest, 4);
        if (!(magnitude <= 3.4e38f)) {  // NaN or infinite: so are all outputs of this row
            for (int64_t i = 0; i < group_size; ++i) out[i] = 0;
            step[index] = __builtin_nanf("");
            total[index] = 0.0f;
            continue;
        }
        const float inverse = magnitude > 1e-30f ? 127.0f / magnitude : 0.0f;
        int32_t sum = 0;
        for (int64_t i = 0; i < group_size; ++i) {
            // Adding and taking away 1.5 * 2^23 rounds to the nearest integer, ties to even.
            const float scaled = values[i] * inverse;
            const int32_t rounded = (int32_t)((scaled + 12582912.0f) - 12582912.0f);
            const int32_t kept = rounded > 127 ? 127 : rounded < -127 ? -127 : rounded;
            out[i] = (int8_t)kept;
            sum += kept;
        }
        step[index] = magnitude * (1.0f / 127.0f);
        total[index] = (float)sum;
    }
}
