// AVX2: products of bytes are summed in 16 bits over a span, then in 32.

#include "model.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include "target.h"

ANYBIT_TARGET_BEGIN("avx2,fma,f16c")
namespace anybit {
namespace {

#include "avx2_vectors.h"
#include "shuffled_levels.h"

// Codes are at most 15 and digits at most 127: the pairs of products of a span's eight steps stay below 2^15.
struct StepSums { __m256i narrow[2], wide[2]; };
inline StepSums zero_step_sums() { return StepSums{}; }
inline void dot_step(StepSums& sums, Bytes codes, Fours digits) {
    for (int h = 0; h < 2; ++h)
        sums.narrow[h] = _mm256_add_epi16(sums.narrow[h], _mm256_maddubs_epi16(codes.half[h], digits));
}
inline void end_span(StepSums& sums) {
    for (int h = 0; h < 2; ++h) {
        sums.wide[h] = _mm256_add_epi32(sums.wide[h], _mm256_madd_epi16(sums.narrow[h], _mm256_set1_epi16(1)));
        sums.narrow[h] = _mm256_setzero_si256();
    }
}
inline Ints total(const StepSums& sums) { return {{sums.wide[0], sums.wide[1]}}; }

struct LevelSums { __m256i half[2]; };
inline LevelSums level_sums(int32_t start) { return {{_mm256_set1_epi32(start), _mm256_set1_epi32(start)}}; }
inline void dot_levels(LevelSums& sums, Bytes levels, const uint8_t* four) {
    for (int h = 0; h < 2; ++h) {
        const __m256i even = _mm256_and_si256(levels.half[h], _mm256_set1_epi16(0xFF));
        const __m256i odd = _mm256_srli_epi16(levels.half[h], 8);
        sums.half[h] = _mm256_add_epi32(sums.half[h], _mm256_madd_epi16(even, load_four((const int8_t*)four)));
        sums.half[h] = _mm256_add_epi32(sums.half[h], _mm256_madd_epi16(odd, load_four((const int8_t*)four + 4)));
    }
}
inline Ints total(const LevelSums& sums) { return {{sums.half[0], sums.half[1]}}; }

#include "joined_fours.h"
#include "pairs_by_step.h"
#include "kernels_table.h"

}  // namespace

const Kernels* avx2_kernels() {
    static const Kernels kernels = table("avx2");
    return &kernels;
}

}  // namespace anybit
ANYBIT_TARGET_END

#else
namespace anybit {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace anybit
#endif
