// Sums of products of AVX-512 with VNNI: four products and their sum in one instruction. Included after avx512_vectors.h.

// The upper nibbles stay where they are, as codes 16 times too large with sums of their own.
struct Halves { __m512i lower, upper; };
inline Halves split(Bytes v, uint8_t mask) { return {masked(v, mask).v, masked(v, (uint8_t)(mask << 4)).v}; }

struct PairSums { __m512i lower, upper; };
inline PairSums zero_pair_sums() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
inline void dot_pair(PairSums& sums, const Halves& codes, const int8_t* digits) {
    sums.lower = _mm512_dpbusd_epi32(sums.lower, codes.lower, load_four(digits));
    sums.upper = _mm512_dpbusd_epi32(sums.upper, codes.upper, load_four(digits + 4));
}
inline void end_span(PairSums&) {}
inline Ints total(const PairSums& sums) { return {_mm512_add_epi32(sums.lower, _mm512_srai_epi32(sums.upper, 4))}; }

struct StepSums { __m512i v; };
inline StepSums zero_step_sums() { return {_mm512_setzero_si512()}; }
inline void dot_step(StepSums& sums, Bytes codes, Fours digits) { sums.v = _mm512_dpbusd_epi32(sums.v, codes.v, digits); }
inline void end_span(StepSums&) {}
inline Ints total(const StepSums& sums) { return {sums.v}; }

struct LevelSums { __m512i high, low; };
inline LevelSums level_sums(int32_t start) { return {_mm512_setzero_si512(), _mm512_set1_epi32(start)}; }
inline void dot_levels(LevelSums& sums, Bytes levels, const uint8_t* four) {
    sums.high = _mm512_dpbusd_epi32(sums.high, levels.v, load_four((const int8_t*)four));
    sums.low = _mm512_dpbusd_epi32(sums.low, levels.v, load_four((const int8_t*)four + 4));
}
inline Ints total(const LevelSums& sums) { return joined({sums.high}, {sums.low}); }

#include "digit_fours.h"
