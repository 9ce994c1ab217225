// AVX-512 with VNNI: four products and their sum in one instruction.

#include "model.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include "target.h"

ANYBIT_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
namespace anybit {
namespace {

#include "avx512_vectors.h"

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

#include "kernels_table.h"

}  // namespace

const Kernels* avx512_vnni_kernels() {
    static const Kernels kernels = table("avx512_vnni");
    return &kernels;
}

}  // namespace anybit
ANYBIT_TARGET_END

#else
namespace anybit {
const Kernels* avx512_vnni_kernels() { return nullptr; }
}  // namespace anybit
#endif
