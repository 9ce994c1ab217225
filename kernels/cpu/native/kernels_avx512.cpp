// AVX-512 without byte dot products: products of bytes are summed in 16 bits over a span, then in 32.

#include "model.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include "target.h"

ANYBIT_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
namespace anybit {
namespace {

#include "avx512_vectors.h"
#include "avx512_lanes.h"
#include "shuffled_levels.h"

// Codes are at most 15 and digits at most 127: the pairs of products of a span's eight steps stay below 2^15.
struct StepSums { __m512i narrow, wide; };
inline StepSums zero_step_sums() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
inline void dot_step(StepSums& sums, Bytes codes, Fours digits) {
    sums.narrow = _mm512_add_epi16(sums.narrow, _mm512_maddubs_epi16(codes.v, digits));
}
inline void end_span(StepSums& sums) {
    sums.wide = _mm512_add_epi32(sums.wide, _mm512_madd_epi16(sums.narrow, _mm512_set1_epi16(1)));
    sums.narrow = _mm512_setzero_si512();
}
inline Ints total(const StepSums& sums) { return {sums.wide}; }

struct LevelSums { __m512i v; };
inline LevelSums level_sums(int32_t start) { return {_mm512_set1_epi32(start)}; }
inline void dot_levels(LevelSums& sums, Bytes levels, const uint8_t* four) {
    const __m512i even = _mm512_and_si512(levels.v, _mm512_set1_epi16(0xFF)), odd = _mm512_srli_epi16(levels.v, 8);
    sums.v = _mm512_add_epi32(sums.v, _mm512_madd_epi16(even, load_four((const int8_t*)four)));
    sums.v = _mm512_add_epi32(sums.v, _mm512_madd_epi16(odd, load_four((const int8_t*)four + 4)));
}
inline Ints total(const LevelSums& sums) { return {sums.v}; }

#include "joined_fours.h"
#include "pairs_by_step.h"
#include "kernels_table.h"

}  // namespace

const Kernels* avx512_kernels() {
    static const Kernels kernels = table("avx512");
    return &kernels;
}

}  // namespace anybit
ANYBIT_TARGET_END

#else
namespace anybit {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace anybit
#endif
