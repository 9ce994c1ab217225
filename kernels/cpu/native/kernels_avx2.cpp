// AVX2: a vector of 64 bytes is two registers.

#include "model.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include "target.h"

ANYBIT_TARGET_BEGIN("avx2,fma,f16c")
namespace anybit {
namespace {

struct Bytes { __m256i half[2]; };
struct Ints { __m256i half[2]; };
struct Floats { __m256 half[2]; };
constexpr int kRowTile = 2;

inline Bytes load(const uint8_t* from) {
    return {{_mm256_loadu_si256((const __m256i*)from), _mm256_loadu_si256((const __m256i*)(from + 32))}};
}
inline void store(uint8_t* to, Bytes v) {
    _mm256_storeu_si256((__m256i*)to, v.half[0]);
    _mm256_storeu_si256((__m256i*)(to + 32), v.half[1]);
}
inline Bytes shifted(Bytes v, int n) {
    if (n == 0) return v;
    if (n > 0) return {{_mm256_srli_epi16(v.half[0], n), _mm256_srli_epi16(v.half[1], n)}};
    return {{_mm256_slli_epi16(v.half[0], -n), _mm256_slli_epi16(v.half[1], -n)}};
}
inline Bytes masked(Bytes v, uint8_t mask) {
    const __m256i m = _mm256_set1_epi8((char)mask);
    return {{_mm256_and_si256(v.half[0], m), _mm256_and_si256(v.half[1], m)}};
}
inline Bytes merge(Bytes v, uint8_t mask, Bytes w) {
    v = masked(v, mask);
    return {{_mm256_or_si256(v.half[0], w.half[0]), _mm256_or_si256(v.half[1], w.half[1])}};
}
inline Ints zero_ints() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
inline Ints add(Ints a, Ints b) {
    return {{_mm256_add_epi32(a.half[0], b.half[0]), _mm256_add_epi32(a.half[1], b.half[1])}};
}
inline Ints dot(Ints sums, Bytes codes, const int8_t* q) {
    int32_t four;
    __builtin_memcpy(&four, q, 4);
    const __m256i x = _mm256_set1_epi32(four), ones = _mm256_set1_epi16(1);
    // Codes are at most 15, so a pair of products stays far below the limits of int16.
    for (int h = 0; h < 2; ++h)
        sums.half[h] = _mm256_add_epi32(sums.half[h], _mm256_madd_epi16(_mm256_maddubs_epi16(codes.half[h], x), ones));
    return sums;
}
inline Floats from(Ints v) { return {{_mm256_cvtepi32_ps(v.half[0]), _mm256_cvtepi32_ps(v.half[1])}}; }
inline Floats broadcast(float value) { return {{_mm256_set1_ps(value), _mm256_set1_ps(value)}}; }
inline Floats load_floats(const float* from) { return {{_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}}; }
inline void store_floats(float* to, Floats v) {
    _mm256_storeu_ps(to, v.half[0]);
    _mm256_storeu_ps(to + 8, v.half[1]);
}
inline Floats load_part(const void* part, int64_t float_bytes, int64_t index) {
    if (float_bytes == 4) return load_floats((const float*)part + index);
    const __m128i* halves = (const __m128i*)((const uint16_t*)part + index);
    return {{_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))}};
}
inline Floats mul(Floats a, Floats b) {
    return {{_mm256_mul_ps(a.half[0], b.half[0]), _mm256_mul_ps(a.half[1], b.half[1])}};
}
inline Floats add(Floats a, Floats b) {
    return {{_mm256_add_ps(a.half[0], b.half[0]), _mm256_add_ps(a.half[1], b.half[1])}};
}
inline Floats fma(Floats a, Floats b, Floats c) {
    return {{_mm256_fmadd_ps(a.half[0], b.half[0], c.half[0]), _mm256_fmadd_ps(a.half[1], b.half[1], c.half[1])}};
}

inline Floats div(Floats a, Floats b) {
    return {{_mm256_div_ps(a.half[0], b.half[0]), _mm256_div_ps(a.half[1], b.half[1])}};
}
inline Floats max(Floats a, Floats b) {
    return {{_mm256_max_ps(a.half[0], b.half[0]), _mm256_max_ps(a.half[1], b.half[1])}};
}
inline Floats min(Floats a, Floats b) {
    return {{_mm256_min_ps(a.half[0], b.half[0]), _mm256_min_ps(a.half[1], b.half[1])}};
}
inline float sum_lanes(Floats v) {
    const __m256 eight = _mm256_add_ps(v.half[0], v.half[1]);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
inline Floats scaled_by_power(Floats v, Floats n) {
    for (int h = 0; h < 2; ++h) {
        const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n.half[h]), 23);
        v.half[h] = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v.half[h]), power));
    }
    return v;
}
inline Floats load_bf16(const uint16_t* from) {
    Floats out;
    for (int h = 0; h < 2; ++h) {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(from + 8 * h)));
        out.half[h] = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    return out;
}

#include "linear_kernel.h"
#include "layer_kernel.h"

}  // namespace

const Kernels* avx2_kernels() {
    static const Kernels kernels = {"avx2", quantize, linear, rms_norm, rotate_and_write, attend,
                                    gate, add_rows};
    return &kernels;
}

}  // namespace anybit
ANYBIT_TARGET_END

#else
namespace anybit {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace anybit
#endif
