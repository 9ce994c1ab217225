// Vector types of AVX-512; `dot` comes from the file that includes this, with or without byte dot products.

struct Bytes { __m512i v; };
struct Ints { __m512i v; };
struct Floats { __m512 v; };
constexpr int kRowTile = 8;

inline Bytes load(const uint8_t* from) { return {_mm512_loadu_si512(from)}; }
inline void store(uint8_t* to, Bytes v) { _mm512_storeu_si512(to, v.v); }
inline Bytes shifted(Bytes v, int n) {
    if (n == 0) return v;
    return {n > 0 ? _mm512_srli_epi16(v.v, n) : _mm512_slli_epi16(v.v, -n)};
}
inline Bytes masked(Bytes v, uint8_t mask) { return {_mm512_and_si512(v.v, _mm512_set1_epi8((char)mask))}; }
inline Bytes merge(Bytes v, uint8_t mask, Bytes w) {
    return {_mm512_ternarylogic_epi32(v.v, _mm512_set1_epi8((char)mask), w.v, 0xEA)};  // (a & b) | c
}
inline Ints zero_ints() { return {_mm512_setzero_si512()}; }
inline Ints add(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline __m512i broadcast_four(const int8_t* q) {
    int32_t four;
    __builtin_memcpy(&four, q, 4);
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
inline float sum_lanes(Floats v) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v.v), _mm512_extractf32x8_ps(v.v, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
inline Floats scaled_by_power(Floats v, Floats n) {
    const __m512i power = _mm512_slli_epi32(_mm512_cvtps_epi32(n.v), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(v.v), power))};
}
inline Floats load_bf16(const uint16_t* from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
