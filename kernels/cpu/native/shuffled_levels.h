// The table of sealed pages' levels where bytes are looked up in tables of 16 alone. The vector type offers sixteen(from),
// a table; looked_up(table, index), zero where the index has its highest bit; out_of_range(v, first), an index that has it
// but for v in first .. first + 15; either, bits of both; if_highest(mask, v, w), v where the mask's highest bit is set.

struct PairLevels { Bytes firsts, seconds; };

// `levels` [2, 2^kBits] of PairCode (model.h); codes lie one a byte.
template <int kBits>
struct LevelTable {
    static constexpr int kTables = kBits == 8 ? 8 : (1 << kBits) / 16;  // of 8 bits, the lower half

    Bytes firsts[kTables], seconds[kTables];

    explicit LevelTable(const uint8_t* levels) {
        for (int t = 0; t < kTables; ++t) {
            firsts[t] = sixteen(levels + 16 * t);
            seconds[t] = sixteen(levels + (1 << kBits) + 16 * t);
        }
    }
    inline PairLevels look_up(Bytes codes) const {
        if (kTables == 1) return {looked_up(firsts[0], codes), looked_up(seconds[0], codes)};
        const Bytes places = kBits == 8 ? masked(codes, 0x7F) : codes;
        PairLevels found = {masked(codes, 0), masked(codes, 0)};
        for (int t = 0; t < kTables; ++t) {
            const Bytes index = out_of_range(places, (uint8_t)(16 * t));
            found = {either(found.firsts, looked_up(firsts[t], index)), either(found.seconds, looked_up(seconds[t], index))};
        }
        if (kBits < 8) return found;
        return {if_highest(codes, found.seconds, found.firsts), if_highest(codes, found.firsts, found.seconds)};
    }
};
