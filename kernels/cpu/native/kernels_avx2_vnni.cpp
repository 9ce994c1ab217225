// AVX2 with VNNI, as processors for laptops have it: four products and their sum in one instruction.

#include "model.h"

#if defined(__x86_64__) && ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#include <immintrin.h>
#include "target.h"

ANYBIT_TARGET_BEGIN("avx2,avxvnni,fma,f16c")
namespace anybit {
namespace {

#include "avx2_vectors.h"
#include "shuffled_levels.h"

struct StepSums { __m256i half[2]; };
inline StepSums zero_step_sums() { return StepSums{}; }
inline void dot_step(StepSums& sums, Bytes codes, Fours digits) {
    for (int h = 0; h < 2; ++h) sums.half[h] = _mm256_dpbusd_avx_epi32(sums.half[h], codes.half[h], digits);
}
inline void end_span(StepSums&) {}
inline Ints total(const StepSums& sums) { return {{sums.half[0], sums.half[1]}}; }

struct LevelSums { __m256i high[2], low[2]; };
inline LevelSums level_sums(int32_t start) {
    const __m256i zero = _mm256_setzero_si256(), first = _mm256_set1_epi32(start);
    return {{zero, zero}, {first, first}};
}
inline void dot_levels(LevelSums& sums, Bytes levels, const uint8_t* four) {
    for (int h = 0; h < 2; ++h) {
        sums.high[h] = _mm256_dpbusd_avx_epi32(sums.high[h], levels.half[h], load_four((const int8_t*)four));
        sums.low[h] = _mm256_dpbusd_avx_epi32(sums.low[h], levels.half[h], load_four((const int8_t*)four + 4));
    }
}
inline Ints total(const LevelSums& sums) { return joined({{sums.high[0], sums.high[1]}}, {{sums.low[0], sums.low[1]}}); }

#include "digit_fours.h"
#include "pairs_by_step.h"
#include "kernels_table.h"

}  // namespace

const Kernels* avx2_vnni_kernels() {
    static const Kernels kernels = table("avx2_vnni");
    return &kernels;
}

}  // namespace anybit
ANYBIT_TARGET_END

#else
namespace anybit {
const Kernels* avx2_vnni_kernels() { return nullptr; }
}  // namespace anybit
#endif
