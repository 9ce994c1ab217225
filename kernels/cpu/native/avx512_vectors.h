// Vector types of AVX-512; sums of products come from the file that includes this, with or without byte dot products.

struct Bytes { __m512i v; };
struct Ints { __m512i v; };
struct Floats { __m512 v; };
constexpr int kDirectBlocks = 2, kDirectRows = 2, kTileRows = 4, kTileBlocks = 2;
constexpr int kLevelBlocks = 2, kLevelQueries = 4;

inline Bytes load(const uint8_t* from) { return {_mm512_loadu_si512(from)}; }
inline void store(uint8_t* to, Bytes v) { _mm512_storeu_si512(to, v.v); }
inline Bytes shifted(Bytes v, int n) {
    if (n == 0) return v;
    return {n > 0 ? _mm512_srli_epi16(v.v, n) : _mm512_slli_epi16(v.v, -n)};
}
inline Bytes masked(Bytes v, uint8_t mask) { return {_mm512_and_si512(v.v, _mm512_set1_epi8((char)mask))}; }
inline Bytes select(uint8_t mask, Bytes v, Bytes w) {
    return {_mm512_ternarylogic_epi32(_mm512_set1_epi8((char)mask), v.v, w.v, 0xCA)};  // a ? b : c
}
// The joined sums of two digits, the first 128 times the second.
inline Ints joined(Ints high, Ints low) { return {_mm512_add_epi32(_mm512_slli_epi32(high.v, 7), low.v)}; }
// Four digits, for all 16 rows of a step.
using Fours = __m512i;
inline Fours load_four(const int8_t* digits) {
    int32_t four;
    __builtin_memcpy(&four, digits, 4);
    return _mm512_set1_epi32(four);
}
inline Floats from(Ints v) { return {_mm512_cvtepi32_ps(v.v)}; }
inline Floats broadcast(float value) { return {_mm512_set1_ps(value)}; }
inline Floats load_floats(const float* from) { return {_mm512_loadu_ps(from)}; }
inline void store_floats(float* to, Floats v) { _mm512_storeu_ps(to, v.v); }
inline Floats load_part(const void* part, int64_t float_bytes, int64_t index) {
    if (float_bytes == 4) return load_floats((const float*)part + index);
    return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)((const uint16_t*)part + index)))};
}
inline Floats mul(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats div(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
// v where x >= limit, else 0.
inline Floats zero_below(Floats x, float limit, Floats v) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(limit), _CMP_GE_OQ), v.v)};
}
// v where a < b, else w.
inline Floats if_less(Floats a, Floats b, Floats v, Floats w) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), w.v, v.v)};
}
inline float first_lane(Floats v) { return _mm512_cvtss_f32(v.v); }
inline float max_lanes(Floats v) { return _mm512_reduce_max_ps(v.v); }
inline float sum_lanes(Floats v) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v.v), _mm512_extractf32x8_ps(v.v, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
// Lane i is sum_lanes(v[i]): the same additions, all vectors at once.
inline Floats sum_lanes_of_each(const Floats* v) {
    __m512 eight[8], four[4], two[2];
    for (int i = 0; i < 8; ++i)
        eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i].v, v[i + 8].v, 0x44), _mm512_shuffle_f32x4(v[i].v, v[i + 8].v, 0xEE));
    for (int i = 0; i < 4; ++i)
        four[i] = _mm512_add_ps(_mm512_shuffle_f32x4(eight[i], eight[i + 4], 0x88),
                                _mm512_shuffle_f32x4(eight[i], eight[i + 4], 0xDD));
    for (int i = 0; i < 2; ++i)
        two[i] = _mm512_add_ps(_mm512_shuffle_ps(four[i], four[i + 2], 0x44), _mm512_shuffle_ps(four[i], four[i + 2], 0xEE));
    const __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(two[0], two[1], 0x88), _mm512_shuffle_ps(two[0], two[1], 0xDD));
    // Now quarters hold vectors 0.., 8.., 4.., 12.., each in the order 0, 2, 1, 3.
    const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    return {_mm512_permutexvar_ps(order, sums)};
}
inline Floats scaled_by_power(Floats v, Floats n) {
    const __m512i power = _mm512_slli_epi32(_mm512_cvtps_epi32(n.v), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(v.v), power))};
}
inline Floats load_bf16(const uint16_t* from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
// Every second four of bytes of two vectors, from the first or from the second on.
inline Bytes even_fours(Bytes v, Bytes w) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return {_mm512_permutex2var_epi32(v.v, even, w.v)};
}
inline Bytes odd_fours(Bytes v, Bytes w) {
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return {_mm512_permutex2var_epi32(v.v, odd, w.v)};
}
// v[0], w[0], v[1], w[1] ...: both halves.
inline void zip_floats(Floats v, Floats w, Floats* out) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    out[0] = {_mm512_permutex2var_ps(v.v, first, w.v)};
    out[1] = {_mm512_permutex2var_ps(v.v, second, w.v)};
}
// Fields of 4 bits and of 2, the lowest of a byte first, one a byte.
inline Bytes nibbles(const uint8_t* from) {
    const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
    return masked({_mm512_or_si512(wide, _mm512_slli_epi16(wide, 4))}, 15);
}
inline Bytes nibble_halves(const uint8_t* from) {
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
    const __m512i two = _mm512_or_si512(wide, _mm512_slli_epi32(wide, 6));
    return masked({_mm512_or_si512(two, _mm512_slli_epi32(two, 12))}, 3);
}
