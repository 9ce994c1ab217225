// Nested linear layers, written once over a vector type and compiled once per instruction set.
//
// Included by exactly one source file per instruction set, inside its namespace and after its vector type. The type offers
//   Bytes     64 unsigned bytes: load, store, shifted(v, n) (towards bit 0; towards bit 7 for n < 0; neighbours may leak
//             in), masked(v, mask), select(mask, v, w) = bits of v where mask is set, of w elsewhere
//   Halves    the nibbles of both steps of a pair: split(v, mask), mask of the lower one
//   PairSums  sums of one digit: zero_pair_sums, dot_pair(sums, halves, digits of both steps), end_span, total -> Ints
//   StepSums  the same for codes that lie one a byte: zero_step_sums, dot_step(sums, codes, four digits), end_span, total
//   Ints      16 int32: joined(high digit, low digit)
//   Floats    16 floats: from(Ints), broadcast, load_part, load, store, fma, mul, add
//   kTileRows, kTileBlocks, kDirectRows, kDirectBlocks   how many rows and blocks are computed together
// Sums of integers are exact. All arithmetic that can round is in `add_group`, in an order fixed by the number of groups, so
// a row's result depends on the row and the width alone, and is the same on every instruction set.

static inline int width_index(int64_t bit_width) {
    return bit_width == 2 ? 0 : bit_width == 3 ? 1 : bit_width == 4 ? 2 : bit_width == 6 ? 3 : 4;
}

// Pair `kPair` of one chunk stream, its fields where they belong.
template <int kChunk, int kPair>
static inline Bytes fields(const uint8_t* span) {
    constexpr Place place = kPlaces[kChunk][kPair];
    return shifted(load(span + place.vector * kLanes), place.shift);
}

// High nibbles of a pair, both halves; a width below 4 bits leaves garbage in the bits it does not have.
template <int kBits, int kPair>
static inline Bytes high_pair(const uint8_t* const* streams) {
    const Bytes c2 = fields<0, kPair>(streams[0]);
    if (kBits == 2) return c2;
    const Bytes c3 = select(0xCC, c2, fields<1, kPair>(streams[1]));
    if (kBits == 3) return c3;
    return select(0xEE, c3, fields<2, kPair>(streams[2]));
}
template <int kBits>
constexpr uint8_t high_mask() {
    return kBits == 2 ? 0x0C : kBits == 3 ? 0x0E : 0x0F;
}

// Low nibbles of a pair; at 6 bits only their upper half.
template <int kBits, int kPair>
static inline Bytes low_pair(const uint8_t* const* streams) {
    const Bytes c6 = fields<3, kPair>(streams[3]);
    if (kBits == 6) return c6;
    return select(0xCC, c6, fields<4, kPair>(streams[4]));
}
template <int kBits>
constexpr uint8_t low_mask() {
    return kBits == 6 ? 0x0C : 0x0F;
}

constexpr int64_t kBytesAhead = 4096;

// Streams of one block from one span on.
struct BlockStreams {
    const uint8_t* chunks[kNumChunks];

    BlockStreams() = default;
    BlockStreams(const Weight& weight, int64_t block, int64_t span) {
        const int64_t vectors = block * weight.num_spans() + span;
        for (int chunk = 0; chunk < kNumChunks; ++chunk)
            chunks[chunk] = weight.chunks[chunk] + (weight.chunks[chunk] == nullptr ? 0 : vectors * kChunkBits[chunk] * kLanes);
    }
    inline void next_span() {
        for (int chunk = 0; chunk < kNumChunks; ++chunk) chunks[chunk] += kChunkBits[chunk] * kLanes;
    }
    // Asks memory for a later span of the streams of a width: several short streams at once are more than processors
    // follow by themselves.
    template <int kBits>
    inline void ask_ahead() const {
        for (int chunk = 0; chunk <= width_index(kBits); ++chunk)
            for (int vector = 0; vector < kChunkBits[chunk]; ++vector)
                __builtin_prefetch(chunks[chunk] + kBytesAhead + vector * kLanes, 0, 2);
    }
};

// The float part of one width. A width without all bits of a nibble has its sums multiplied by 4 or 2, as the bits are not
// moved down: the factors take that back, exactly.
struct FloatParts {
    const void *high, *low, *zero;
    int64_t float_bytes;
    float high_factor, low_factor;

    FloatParts(const Weight& weight, int64_t bit_width) {
        const FloatPart& own = weight.parts[width_index(bit_width)];
        high = bit_width > 4 ? weight.parts[width_index(4)].scale : own.scale;
        low = own.scale;
        zero = own.zero;
        float_bytes = weight.float_bytes;
        high_factor = bit_width == 2 ? 0.25f : bit_width == 3 ? 0.5f : 1.0f;
        low_factor = bit_width == 6 ? 0.25f : 1.0f;
    }
};

// The float part of one (block, group): level = high * high nibble (+ low * low nibble) + zero.
template <int kNibbles>
struct GroupPart {
    Floats high, low, zero;

    GroupPart(const FloatParts& parts, int64_t index) {
        high = load_part(parts.high, parts.float_bytes, index);
        if (kNibbles == 2) low = load_part(parts.low, parts.float_bytes, index);
        zero = load_part(parts.zero, parts.float_bytes, index);
    }
};

// y += high * step * high sums (+ low * step * low sums) + zero * total
template <int kNibbles>
static inline Floats add_group(Floats y, const GroupPart<kNibbles>& part, const FloatParts& parts, Ints high, Ints low,
                               float step, float total) {
    y = fma(part.high, mul(from(high), broadcast(step * parts.high_factor)), y);
    if (kNibbles == 2) y = fma(part.low, mul(from(low), broadcast(step * parts.low_factor)), y);
    return fma(part.zero, broadcast(total), y);
}

// Where results go.
struct Output {
    const float* bias;
    bool accumulate;
    float* y;
    int64_t out_features;

    inline void store_block(int64_t row, int64_t block, Floats values) const {
        const int64_t first = block * kBlockRows, count = out_features - first;
        float* to = y + row * out_features + first;
        if (count >= kBlockRows) {
            if (bias != nullptr) values = add(values, load_floats(bias + first));
            if (accumulate) values = add(load_floats(to), values);
            store_floats(to, values);
            return;
        }
        float lanes[kBlockRows];
        store_floats(lanes, values);
        for (int64_t lane = 0; lane < count; ++lane) {
            if (bias != nullptr) lanes[lane] += bias[first + lane];
            to[lane] = accumulate ? to[lane] + lanes[lane] : lanes[lane];
        }
    }
};

// Few rows: codes go from memory through registers into the sums. Blocks are taken together because a block's chain of
// dependent sums alone would leave the multipliers waiting.
template <int kBits, int kBlocks, int kRows>
struct Direct {
    static constexpr int kNibbles = kBits > 4 ? 2 : 1;

    PairSums high[kBlocks][kRows][kDigits], low[kBlocks][kRows][kDigits];

    inline void clear() {
        for (int block = 0; block < kBlocks; ++block)
            for (int row = 0; row < kRows; ++row)
                for (int digit = 0; digit < kDigits; ++digit) {
                    high[block][row][digit] = zero_pair_sums();
                    if (kNibbles == 2) low[block][row][digit] = zero_pair_sums();
                }
    }
    template <int kPair>
    inline void add_pair(const BlockStreams* streams, const int8_t* digits, int64_t in_features) {
        Halves high_codes[kBlocks], low_codes[kBlocks];
        for (int block = 0; block < kBlocks; ++block) {
            high_codes[block] = split(high_pair<kBits, kPair>(streams[block].chunks), high_mask<kBits>());
            if constexpr (kNibbles == 2)
                low_codes[block] = split(low_pair<kBits, kPair>(streams[block].chunks), low_mask<kBits>());
        }
        for (int row = 0; row < kRows; ++row)
            for (int digit = 0; digit < kDigits; ++digit) {
                const int8_t* pair = digits + (row * kDigits + digit) * in_features + 8 * kPair;
                for (int block = 0; block < kBlocks; ++block) {
                    dot_pair(high[block][row][digit], high_codes[block], pair);
                    if constexpr (kNibbles == 2) dot_pair(low[block][row][digit], low_codes[block], pair);
                }
            }
    }
    inline void add_span(const BlockStreams* streams, const int8_t* digits, int64_t in_features) {
        add_pair<0>(streams, digits, in_features);
        add_pair<1>(streams, digits, in_features);
        add_pair<2>(streams, digits, in_features);
        add_pair<3>(streams, digits, in_features);
        for (int block = 0; block < kBlocks; ++block)
            for (int row = 0; row < kRows; ++row)
                for (int digit = 0; digit < kDigits; ++digit) {
                    end_span(high[block][row][digit]);
                    if (kNibbles == 2) end_span(low[block][row][digit]);
                }
    }
    static inline Ints joined_total(const PairSums* sums) {
        return joined(total(sums[0]), total(sums[1]));
    }

    static void run(const Weight& weight, const FloatParts& parts, const Activations& x, int64_t row, const Output& out,
                    int64_t block) {
        const int64_t groups = weight.num_groups(), spans = weight.group_size / kSpanInputs, in = weight.in_features;
        const int8_t* digits = x.digits + row * kDigits * in;
        BlockStreams streams[kBlocks];
        Floats results[kBlocks][kRows];
        for (int b = 0; b < kBlocks; ++b) {
            streams[b] = BlockStreams(weight, block + b, 0);
            for (int r = 0; r < kRows; ++r) results[b][r] = broadcast(0.0f);
        }
        for (int64_t group = 0; group < groups; ++group) {
            Direct sums;
            sums.clear();
            for (int64_t span = 0; span < spans; ++span) {
                for (int b = 0; b < kBlocks; ++b) streams[b].template ask_ahead<kBits>();
                sums.add_span(streams, digits, in);
                for (int b = 0; b < kBlocks; ++b) streams[b].next_span();
                digits += kSpanInputs;
            }
            for (int b = 0; b < kBlocks; ++b) {
                const GroupPart<kNibbles> part(parts, ((block + b) * groups + group) * kBlockRows);
                for (int r = 0; r < kRows; ++r) {
                    const int64_t index = (row + r) * groups + group;
                    results[b][r] = add_group<kNibbles>(results[b][r], part, parts, joined_total(sums.high[b][r]),
                                                        kNibbles == 2 ? joined_total(sums.low[b][r]) : Ints{},
                                                        x.step[index], x.total[index]);
                }
            }
        }
        for (int b = 0; b < kBlocks; ++b)
            for (int r = 0; r < kRows; ++r) out.store_block(row + r, block + b, results[b][r]);
    }

    static void run_all(const Weight& weight, const FloatParts& parts, const Activations& x, int64_t row, const Output& out,
                        int64_t block, int64_t last) {
        for (; block + kBlocks <= last; block += kBlocks) run(weight, parts, x, row, out, block);
        for (; block < last; ++block) Direct<kBits, 1, kRows>::run(weight, parts, x, row, out, block);
    }
};

// Codes of some blocks and of a panel of inputs, one a byte: [step][block][64 lanes], high nibbles, then low ones.
template <int kBits, int kPair>
static inline void decode_pair(const BlockStreams& streams, uint8_t* high, uint8_t* low, int64_t stride) {
    const Bytes high_codes = high_pair<kBits, kPair>(streams.chunks);
    store(high + 2 * kPair * stride, masked(high_codes, high_mask<kBits>()));
    store(high + (2 * kPair + 1) * stride, masked(shifted(high_codes, 4), high_mask<kBits>()));
    if constexpr (kBits > 4) {
        const Bytes low_codes = low_pair<kBits, kPair>(streams.chunks);
        store(low + 2 * kPair * stride, masked(low_codes, low_mask<kBits>()));
        store(low + (2 * kPair + 1) * stride, masked(shifted(low_codes, 4), low_mask<kBits>()));
    }
}

template <int kBits>
static void decode_panel(const Weight& weight, int64_t block, int64_t num_blocks, int64_t first_span, int64_t num_spans,
                         uint8_t* high, uint8_t* low) {
    const int64_t stride = num_blocks * kLanes;
    for (int64_t index = 0; index < num_blocks; ++index) {
        BlockStreams streams(weight, block + index, first_span);
        for (int64_t span = 0; span < num_spans; ++span) {
            const int64_t offset = span * kSpanSteps * stride + index * kLanes;
            decode_pair<kBits, 0>(streams, high + offset, low + offset, stride);
            decode_pair<kBits, 1>(streams, high + offset, low + offset, stride);
            decode_pair<kBits, 2>(streams, high + offset, low + offset, stride);
            decode_pair<kBits, 3>(streams, high + offset, low + offset, stride);
            streams.next_span();
        }
    }
}

// A panel's part in the results of kRows rows and kBlocks blocks.
template <int kBlocks, int kRows>
struct Tile {
    StepSums sums[kBlocks][kRows][kDigits];

    inline void add_group_codes(const uint8_t* codes, const int8_t* digits, int64_t in_features, int64_t spans) {
        for (int block = 0; block < kBlocks; ++block)
            for (int row = 0; row < kRows; ++row)
                for (int digit = 0; digit < kDigits; ++digit) sums[block][row][digit] = zero_step_sums();
        for (int64_t span = 0; span < spans; ++span) {
            for (int step = 0; step < kSpanSteps; ++step) {
                Bytes vectors[kBlocks];
                for (int block = 0; block < kBlocks; ++block) vectors[block] = load(codes + block * kLanes);
                for (int row = 0; row < kRows; ++row)
                    for (int digit = 0; digit < kDigits; ++digit) {
                        const Fours four = load_four(digits + (row * kDigits + digit) * in_features);
                        for (int block = 0; block < kBlocks; ++block)
                            dot_step(sums[block][row][digit], vectors[block], four);
                    }
                codes += kBlocks * kLanes;
                digits += 4;
            }
            for (int block = 0; block < kBlocks; ++block)
                for (int row = 0; row < kRows; ++row)
                    for (int digit = 0; digit < kDigits; ++digit) end_span(sums[block][row][digit]);
        }
    }
    inline Ints joined_total(int block, int row) const {
        return joined(total(sums[block][row][0]), total(sums[block][row][1]));
    }

    // `partial` [kBlocks][16] of each row, kRows rows: what earlier panels have summed up, and this one adds to.
    template <int kNibbles>
    static void run(const Weight& weight, const FloatParts& parts, const Activations& x, int64_t row, int64_t block,
                    int64_t first_group, int64_t last_group, const uint8_t* high, const uint8_t* low, float* partial) {
        const int64_t groups = weight.num_groups(), in = weight.in_features;
        const int64_t spans = weight.group_size / kSpanInputs, group_codes = weight.group_size / 4 * kBlocks * kLanes;
        Tile tile;
        for (int64_t group = first_group; group < last_group; ++group) {
            const int8_t* digits = x.digits + row * kDigits * in + group * weight.group_size;
            Ints high_sums[kBlocks][kRows];
            if constexpr (kNibbles == 2) {
                tile.add_group_codes(high + (group - first_group) * group_codes, digits, in, spans);
                for (int b = 0; b < kBlocks; ++b)
                    for (int r = 0; r < kRows; ++r) high_sums[b][r] = tile.joined_total(b, r);
                tile.add_group_codes(low + (group - first_group) * group_codes, digits, in, spans);
            } else {
                tile.add_group_codes(high + (group - first_group) * group_codes, digits, in, spans);
            }
            for (int b = 0; b < kBlocks; ++b) {
                const GroupPart<kNibbles> part(parts, ((block + b) * groups + group) * kBlockRows);
                for (int r = 0; r < kRows; ++r) {
                    const int64_t index = (row + r) * groups + group;
                    float* sum = partial + (r * kBlocks + b) * kBlockRows;
                    const Ints now = tile.joined_total(b, r);
                    store_floats(sum, add_group<kNibbles>(load_floats(sum), part, parts,
                                                          kNibbles == 2 ? high_sums[b][r] : now, now, x.step[index],
                                                          x.total[index]));
                }
            }
        }
    }
};

template <int kNibbles, int kBlocks, int kRows>
static inline void run_tiles(const Weight& weight, const FloatParts& parts, const Activations& x, int64_t& row,
                             int64_t last_row, int64_t first_row, int64_t block, int64_t first_group, int64_t last_group,
                             const uint8_t* high, const uint8_t* low, float* partials) {
    for (; row + kRows <= last_row; row += kRows)
        Tile<kBlocks, kRows>::template run<kNibbles>(weight, parts, x, row, block, first_group, last_group, high, low,
                                                     partials + (row - first_row) * kBlocks * kBlockRows);
    if constexpr (kRows > 1)
        run_tiles<kNibbles, kBlocks, kRows - 1>(weight, parts, x, row, last_row, first_row, block, first_group,
                                                         last_group, high, low, partials);
}

// Many rows: a panel's codes are decoded once for all of them.
template <int kBits, int kBlocks>
static void tiled_blocks(const Weight& weight, const FloatParts& parts, const Activations& x, const Segment& segment,
                         const Output& out, int64_t block, uint8_t* scratch) {
    constexpr int kNibbles = kBits > 4 ? 2 : 1;
    const int64_t groups = weight.num_groups(), panel_groups = kPanelInputs / weight.group_size;
    const int64_t spans_per_group = weight.group_size / kSpanInputs;
    uint8_t* high = scratch;
    uint8_t* low = high + kMaxTileBlocks * kBlockRows * kPanelInputs;
    float* partials = (float*)(low + kMaxTileBlocks * kBlockRows * kPanelInputs);
    const int64_t rows = segment.last - segment.first;
    for (int64_t index = 0; index < rows * kBlocks; ++index) store_floats(partials + index * kBlockRows, broadcast(0.0f));
    for (int64_t first = 0; first < groups; first += panel_groups) {
        const int64_t last = first + panel_groups < groups ? first + panel_groups : groups;
        decode_panel<kBits>(weight, block, kBlocks, first * spans_per_group, (last - first) * spans_per_group, high, low);
        int64_t row = segment.first;
        run_tiles<kNibbles, kBlocks, kTileRows>(weight, parts, x, row, segment.last, segment.first, block,
                                                                  first, last, high, low, partials);
    }
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t index = 0; index < kBlocks; ++index)
            out.store_block(segment.first + row, block + index, load_floats(partials + (row * kBlocks + index) * kBlockRows));
}

template <int kBits>
static void linear_segment(const Weight& weight, const Activations& x, const Segment& segment, const Output& out,
                           int64_t first, int64_t last, uint8_t* scratch) {
    const FloatParts parts(weight, kBits);
    const int64_t rows = segment.last - segment.first;
    int64_t block = first;
    if (rows == 1) {
        Direct<kBits, kBits == 2 ? kDirectBlocks : 1, 1>::run_all(weight, parts, x, segment.first, out, block, last);
    } else if (rows == 2 && kDirectRows >= 2) {
        Direct<kBits, 1, 2>::run_all(weight, parts, x, segment.first, out, block, last);
    } else {
        for (; block + kTileBlocks <= last; block += kTileBlocks)
            tiled_blocks<kBits, kTileBlocks>(weight, parts, x, segment, out, block, scratch);
        for (; block < last; ++block) tiled_blocks<kBits, 1>(weight, parts, x, segment, out, block, scratch);
    }
}

static void linear(const Weight& weight, const Activations& x, const Segment* segments, int64_t num_segments,
                   const float* bias, bool accumulate, float* y, int64_t first, int64_t last, uint8_t* scratch) {
    const Output out = {bias, accumulate, y, weight.out_features};
    // A few blocks at a time, so that streams that several widths share come from memory once.
    const int64_t stride = num_segments == 1 ? last - first : kTileBlocks;
    for (int64_t block = first; block < last; block += stride) {
        const int64_t end = block + stride < last ? block + stride : last;
        for (int64_t index = 0; index < num_segments; ++index) {
            const Segment& segment = segments[index];
            switch (segment.bit_width) {
                case 2: linear_segment<2>(weight, x, segment, out, block, end, scratch); break;
                case 3: linear_segment<3>(weight, x, segment, out, block, end, scratch); break;
                case 4: linear_segment<4>(weight, x, segment, out, block, end, scratch); break;
                case 6: linear_segment<6>(weight, x, segment, out, block, end, scratch); break;
                default: linear_segment<8>(weight, x, segment, out, block, end, scratch); break;
            }
        }
    }
}
