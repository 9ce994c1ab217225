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

// Weighted sums of one group's nibbles: sum over spans of step * (sum of nibble * q).
struct GroupSums {
    Floats high, low;

    static inline GroupSums zero() { return {broadcast(0.0f), broadcast(0.0f)}; }
    template <int kBits>
    inline void add_span(Ints span_high, Ints span_low, float step) {
        high = fma(from(span_high), broadcast(step), high);
        if (kBits > 4) low = fma(from(span_low), broadcast(step), low);
    }
};

// y += high * sums.high + low * sums.low + zero * total
template <int kBits>
static inline Floats add_group(Floats y, const GroupPart& part, const GroupSums& sums, float total) {
    y = fma(part.high, sums.high, y);
    if (kBits > 4) y = fma(part.low, sums.low, y);
    return fma(part.zero, broadcast(total), y);
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
        const float* step = x.step + row * weight.num_spans();
        Floats result = broadcast(0.0f);
        for (int64_t group = 0; group < groups; ++group) {
            GroupSums sums = GroupSums::zero();
            for (int64_t span = 0; span < spans; ++span) {
                Ints high[2] = {zero_ints(), zero_ints()}, low[2] = {zero_ints(), zero_ints()};
                dot_step<kBits, 0>(streams, q, high[0], low[0]);
                dot_step<kBits, 1>(streams, q, high[1], low[1]);
                dot_step<kBits, 2>(streams, q, high[0], low[0]);
                dot_step<kBits, 3>(streams, q, high[1], low[1]);
                dot_step<kBits, 4>(streams, q, high[0], low[0]);
                dot_step<kBits, 5>(streams, q, high[1], low[1]);
                dot_step<kBits, 6>(streams, q, high[0], low[0]);
                dot_step<kBits, 7>(streams, q, high[1], low[1]);
                sums.add_span<kBits>(add(high[0], high[1]), add(low[0], low[1]), *step++);
                streams.next_span();
                q += kSpanInputs;
            }
            const GroupPart part = GroupPart::load_group<kBits>(weight, (block * groups + group) * kBlockRows);
            result = add_group<kBits>(result, part, sums, x.total[row * groups + group]);
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
    const int64_t groups = weight.num_groups(), spans = weight.num_spans(), in_features = weight.in_features;
    const int64_t spans_per_group = weight.group_size / kSpanInputs;
    const int8_t* q = x.q + row * in_features;
    const float* steps = x.step + row * spans;
    Floats results[kRows];
    for (int r = 0; r < kRows; ++r) results[r] = broadcast(0.0f);
    for (int64_t group = 0; group < groups; ++group) {
        GroupSums sums[kRows];
        for (int r = 0; r < kRows; ++r) sums[r] = GroupSums::zero();
        for (int64_t span = 0; span < spans_per_group; ++span) {
            Ints high[kRows], low[kRows];
            for (int r = 0; r < kRows; ++r) high[r] = low[r] = zero_ints();
            for (int step = 0; step < kSpanSteps; ++step) {
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
            for (int r = 0; r < kRows; ++r) sums[r].template add_span<kBits>(high[r], low[r], steps[r * spans]);
            ++steps;
        }
        const GroupPart part = GroupPart::load_group<kBits>(weight, (block * groups + group) * kBlockRows);
        for (int r = 0; r < kRows; ++r)
            results[r] = add_group<kBits>(results[r], part, sums[r], x.total[(row + r) * groups + group]);
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

// One span; returns the sum of step * q.
static inline float quantize_span(const float* values, int8_t* out, float* step) {
    // The bits of magnitudes are in the order of the magnitudes, NaN above infinity above all numbers.
    uint32_t largest = 0;
    for (int i = 0; i < kSpanInputs; ++i) {
        uint32_t bits;
        __builtin_memcpy(&bits, values + i, 4);
        bits &= 0x7FFFFFFF;
        largest = bits > largest ? bits : largest;
    }
    float magnitude;
    __builtin_memcpy(&magnitude, &largest, 4);
    if (!(magnitude <= 3.4e38f)) {  // NaN or infinite: so are all outputs of this row
        for (int i = 0; i < kSpanInputs; ++i) out[i] = 0;
        *step = __builtin_nanf("");
        return *step;
    }
    const float inverse = magnitude > 1e-30f ? 127.0f / magnitude : 0.0f;
    int32_t sum = 0;
    for (int i = 0; i < kSpanInputs; ++i) {
        // Adding and taking away 1.5 * 2^23 rounds to the nearest integer, ties to even.
        const int32_t rounded = (int32_t)((values[i] * inverse + 12582912.0f) - 12582912.0f);
        out[i] = (int8_t)rounded;
        sum += rounded;
    }
    *step = magnitude * (1.0f / 127.0f);
    return *step * (float)sum;
}

static void quantize(const float* x, int64_t first, int64_t last, int64_t in_features, int64_t group_size, int8_t* q,
                     float* step, float* total) {
    const int64_t spans_per_group = group_size / kSpanInputs, groups = in_features / group_size;
    for (int64_t group = first * groups; group < last * groups; ++group) {
        float sum = 0.0f;
        for (int64_t span = group * spans_per_group; span < (group + 1) * spans_per_group; ++span)
            sum += quantize_span(x + span * kSpanInputs, q + span * kSpanInputs, step + span);
        total[group] = sum;
    }
}
