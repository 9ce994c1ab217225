// Plain C++: right everywhere, the reference for the others.

#include <cmath>

#include "model.h"

namespace anybit {
namespace {

struct Bytes { uint8_t lanes[kLanes]; };
struct Ints { int32_t lanes[kBlockRows]; };
struct Floats { float lanes[kBlockRows]; };
constexpr int kDirectBlocks = 1, kDirectRows = 1, kTileRows = 2, kTileBlocks = 1;
constexpr int kLevelBlocks = 1, kLevelQueries = 2;

inline Bytes load(const uint8_t* from) {
    Bytes v;
    __builtin_memcpy(v.lanes, from, kLanes);
    return v;
}
inline void store(uint8_t* to, Bytes v) { __builtin_memcpy(to, v.lanes, kLanes); }
inline Bytes shifted(Bytes v, int n) {
    for (uint8_t& lane : v.lanes) lane = (uint8_t)(n >= 0 ? lane >> n : lane << -n);
    return v;
}
inline Bytes masked(Bytes v, uint8_t mask) {
    for (uint8_t& lane : v.lanes) lane &= mask;
    return v;
}
inline Bytes select(uint8_t mask, Bytes v, Bytes w) {
    for (int l = 0; l < kLanes; ++l) w.lanes[l] = (uint8_t)((mask & v.lanes[l]) | (~mask & w.lanes[l]));
    return w;
}
inline Ints joined(Ints high, Ints low) {
    for (int r = 0; r < kBlockRows; ++r) low.lanes[r] += high.lanes[r] * 128;
    return low;
}
using Fours = const int8_t*;
inline Fours load_four(const int8_t* digits) { return digits; }
using StepSums = Ints;
inline StepSums zero_step_sums() { return Ints{}; }
inline void dot_step(StepSums& sums, Bytes codes, Fours digits) {
    for (int l = 0; l < kLanes; ++l) sums.lanes[l / 4] += codes.lanes[l] * digits[l % 4];
}
inline void end_span(StepSums&) {}
inline Ints total(const StepSums& sums) { return sums; }

inline Floats from(Ints v) {
    Floats out;
    for (int r = 0; r < kBlockRows; ++r) out.lanes[r] = (float)v.lanes[r];
    return out;
}
inline Floats broadcast(float value) {
    Floats out;
    for (float& lane : out.lanes) lane = value;
    return out;
}
inline Floats load_floats(const float* from) {
    Floats out;
    __builtin_memcpy(out.lanes, from, sizeof out.lanes);
    return out;
}
inline void store_floats(float* to, Floats v) { __builtin_memcpy(to, v.lanes, sizeof v.lanes); }
inline float float_from_half(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = (half >> 10) & 31, fraction = half & 1023;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp((float)fraction, -24);
    const uint32_t bits = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | fraction << 13;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}
inline Floats load_part(const void* part, int64_t float_bytes, int64_t index) {
    if (float_bytes == 4) return load_floats((const float*)part + index);
    Floats out;
    for (int r = 0; r < kBlockRows; ++r) out.lanes[r] = float_from_half(((const uint16_t*)part)[index + r]);
    return out;
}
inline Floats mul(Floats a, Floats b) {
    for (int r = 0; r < kBlockRows; ++r) a.lanes[r] *= b.lanes[r];
    return a;
}
inline Floats add(Floats a, Floats b) {
    for (int r = 0; r < kBlockRows; ++r) a.lanes[r] += b.lanes[r];
    return a;
}
inline Floats fma(Floats a, Floats b, Floats c) {
    for (int r = 0; r < kBlockRows; ++r) c.lanes[r] = std::fma(a.lanes[r], b.lanes[r], c.lanes[r]);
    return c;
}

inline Floats div(Floats a, Floats b) {
    for (int r = 0; r < kBlockRows; ++r) a.lanes[r] /= b.lanes[r];
    return a;
}
inline Floats max(Floats a, Floats b) {
    for (int r = 0; r < kBlockRows; ++r) a.lanes[r] = a.lanes[r] > b.lanes[r] ? a.lanes[r] : b.lanes[r];
    return a;
}
inline Floats min(Floats a, Floats b) {
    for (int r = 0; r < kBlockRows; ++r) a.lanes[r] = a.lanes[r] < b.lanes[r] ? a.lanes[r] : b.lanes[r];
    return a;
}
// v where x >= limit, else 0.
inline Floats zero_below(Floats x, float limit, Floats v) {
    for (int r = 0; r < kBlockRows; ++r) v.lanes[r] = x.lanes[r] >= limit ? v.lanes[r] : 0.0f;
    return v;
}
// v where a < b, else w.
inline Floats if_less(Floats a, Floats b, Floats v, Floats w) {
    for (int r = 0; r < kBlockRows; ++r) w.lanes[r] = a.lanes[r] < b.lanes[r] ? v.lanes[r] : w.lanes[r];
    return w;
}
inline float first_lane(Floats v) { return v.lanes[0]; }
inline float max_lanes(Floats v) {
    float largest = v.lanes[0];
    for (float lane : v.lanes) largest = lane > largest ? lane : largest;
    return largest;
}
inline float sum_lanes(Floats v) {
    for (int half = kBlockRows / 2; half > 0; half /= 2)
        for (int r = 0; r < half; ++r) v.lanes[r] += v.lanes[r + half];
    return v.lanes[0];
}
inline Floats sum_lanes_of_each(const Floats* v) {
    Floats out;
    for (int i = 0; i < kBlockRows; ++i) out.lanes[i] = sum_lanes(v[i]);
    return out;
}
// v * 2^n for whole numbers n that keep the result normal.
inline Floats scaled_by_power(Floats v, Floats n) {
    for (int r = 0; r < kBlockRows; ++r) {
        int32_t bits;
        __builtin_memcpy(&bits, &v.lanes[r], 4);
        bits += (int32_t)n.lanes[r] << 23;
        __builtin_memcpy(&v.lanes[r], &bits, 4);
    }
    return v;
}
inline Floats load_bf16(const uint16_t* from) {
    Floats out;
    for (int r = 0; r < kBlockRows; ++r) {
        const uint32_t bits = (uint32_t)from[r] << 16;
        __builtin_memcpy(&out.lanes[r], &bits, 4);
    }
    return out;
}

inline Bytes every_second_four(Bytes v, Bytes w, int first) {
    Bytes out;
    for (int l = 0; l < kLanes; ++l) {
        const int from = l / 4 * 8 + first * 4 + l % 4;
        out.lanes[l] = from < kLanes ? v.lanes[from] : w.lanes[from - kLanes];
    }
    return out;
}
inline Bytes even_fours(Bytes v, Bytes w) { return every_second_four(v, w, 0); }
inline Bytes odd_fours(Bytes v, Bytes w) { return every_second_four(v, w, 1); }
// v[0], w[0], v[1], w[1] ...: both halves.
inline void zip_bytes(Bytes v, Bytes w, Bytes* out) {
    for (int l = 0; l < 2 * kLanes; ++l) out[l / kLanes].lanes[l % kLanes] = (l % 2 == 0 ? v : w).lanes[l / 2];
}
inline void zip_floats(Floats v, Floats w, Floats* out) {
    for (int r = 0; r < 2 * kBlockRows; ++r) out[r / kBlockRows].lanes[r % kBlockRows] = (r % 2 == 0 ? v : w).lanes[r / 2];
}

// Fields of 4 bits and of 2, the lowest of a byte first, one a byte.
inline Bytes nibbles(const uint8_t* from) {
    Bytes out;
    for (int l = 0; l < kLanes; ++l) out.lanes[l] = from[l / 2] >> l % 2 * 4 & 15;
    return out;
}
inline Bytes nibble_halves(const uint8_t* from) {
    Bytes out;
    for (int l = 0; l < kLanes; ++l) out.lanes[l] = from[l / 4] >> l % 4 * 2 & 3;
    return out;
}

struct PairLevels { Bytes firsts, seconds; };

// As shuffled_levels.h says.
template <int kBits>
struct LevelTable {
    const uint8_t* levels;

    inline PairLevels look_up(Bytes codes) const {
        PairLevels found;
        for (int l = 0; l < kLanes; ++l) {
            found.firsts.lanes[l] = levels[codes.lanes[l]];
            found.seconds.lanes[l] = levels[(1 << kBits) + codes.lanes[l]];
        }
        return found;
    }
};

struct LevelSums { Ints sums; };
inline LevelSums level_sums(int32_t start) {
    LevelSums made;
    for (int32_t& lane : made.sums.lanes) lane = start;
    return made;
}
inline void dot_levels(LevelSums& sums, Bytes levels, const uint8_t* four) {
    const int8_t* digits = (const int8_t*)four;
    for (int l = 0; l < kLanes; ++l) sums.sums.lanes[l / 4] += levels.lanes[l] * (digits[l % 4] * 128 + digits[4 + l % 4]);
}
inline Ints total(const LevelSums& sums) { return sums.sums; }

#include "digit_fours.h"
#include "pairs_by_step.h"
#include "kernels_table.h"

}  // namespace

const Kernels* scalar_kernels() {
    static const Kernels kernels = table("scalar");
    return &kernels;
}

}  // namespace anybit
