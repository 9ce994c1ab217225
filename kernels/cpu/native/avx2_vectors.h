// Vector types of AVX2: a vector of 64 bytes is two registers; sums of products come from the file that includes this.

struct Bytes { __m256i half[2]; };
struct Ints { __m256i half[2]; };
struct Floats { __m256 half[2]; };
constexpr int kDirectBlocks = 1, kDirectRows = 1, kTileRows = 2, kTileBlocks = 1;
constexpr int kLevelBlocks = 1, kLevelQueries = 2;

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
inline Bytes select(uint8_t mask, Bytes v, Bytes w) {
    const __m256i m = _mm256_set1_epi8((char)mask);
    for (int h = 0; h < 2; ++h)
        v.half[h] = _mm256_or_si256(_mm256_and_si256(m, v.half[h]), _mm256_andnot_si256(m, w.half[h]));
    return v;
}
// The joined sums of two digits, the first 128 times the second.
inline Ints joined(Ints high, Ints low) {
    for (int h = 0; h < 2; ++h) low.half[h] = _mm256_add_epi32(_mm256_slli_epi32(high.half[h], 7), low.half[h]);
    return low;
}
// Four digits, for all rows of half a step.
using Fours = __m256i;
inline Fours load_four(const int8_t* digits) {
    int32_t four;
    __builtin_memcpy(&four, digits, 4);
    return _mm256_set1_epi32(four);
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
// v where x >= limit, else 0.
inline Floats zero_below(Floats x, float limit, Floats v) {
    for (int h = 0; h < 2; ++h)
        v.half[h] = _mm256_and_ps(v.half[h], _mm256_cmp_ps(x.half[h], _mm256_set1_ps(limit), _CMP_GE_OQ));
    return v;
}
// v where a < b, else w.
inline Floats if_less(Floats a, Floats b, Floats v, Floats w) {
    for (int h = 0; h < 2; ++h)
        w.half[h] = _mm256_blendv_ps(w.half[h], v.half[h], _mm256_cmp_ps(a.half[h], b.half[h], _CMP_LT_OQ));
    return w;
}
inline float first_lane(Floats v) { return _mm256_cvtss_f32(v.half[0]); }
inline float max_lanes(Floats v) {
    const __m256 eight = _mm256_max_ps(v.half[0], v.half[1]);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}
inline float sum_lanes(Floats v) {
    const __m256 eight = _mm256_add_ps(v.half[0], v.half[1]);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
// Sums of eight halves, each already the sum of a vector's two: lane i is that of v[i].
inline __m256 sum_each_half(const __m256* v) {
    __m256 four[4], two[2];
    for (int i = 0; i < 4; ++i)
        four[i] = _mm256_add_ps(_mm256_permute2f128_ps(v[i], v[i + 4], 0x20), _mm256_permute2f128_ps(v[i], v[i + 4], 0x31));
    for (int i = 0; i < 2; ++i)
        two[i] = _mm256_add_ps(_mm256_shuffle_ps(four[i], four[i + 2], 0x44), _mm256_shuffle_ps(four[i], four[i + 2], 0xEE));
    const __m256 sums = _mm256_add_ps(_mm256_shuffle_ps(two[0], two[1], 0x88), _mm256_shuffle_ps(two[0], two[1], 0xDD));
    return _mm256_permute_ps(sums, 0xD8);
}
// Lane i is sum_lanes(v[i]): the same additions, all vectors at once.
inline Floats sum_lanes_of_each(const Floats* v) {
    __m256 eight[16];
    for (int i = 0; i < 16; ++i) eight[i] = _mm256_add_ps(v[i].half[0], v[i].half[1]);
    return {{sum_each_half(eight), sum_each_half(eight + 8)}};
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
// Every second four of bytes of two vectors, from the first or from the second on.
template <int kOrder>
inline __m256i every_second(Bytes v) {
    const __m256 fours = _mm256_shuffle_ps(_mm256_castsi256_ps(v.half[0]), _mm256_castsi256_ps(v.half[1]), kOrder);
    return _mm256_permute4x64_epi64(_mm256_castps_si256(fours), 0xD8);
}
inline Bytes even_fours(Bytes v, Bytes w) { return {{every_second<0x88>(v), every_second<0x88>(w)}}; }
inline Bytes odd_fours(Bytes v, Bytes w) { return {{every_second<0xDD>(v), every_second<0xDD>(w)}}; }
// v[0], w[0], v[1], w[1] ...: both halves.
inline void zip_floats(Floats v, Floats w, Floats* out) {
    for (int h = 0; h < 2; ++h) {
        const __m256 low = _mm256_unpacklo_ps(v.half[h], w.half[h]), high = _mm256_unpackhi_ps(v.half[h], w.half[h]);
        out[h] = {{_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)}};
    }
}
inline void zip_bytes(Bytes v, Bytes w, Bytes* out) {
    for (int h = 0; h < 2; ++h) {
        const __m256i low = _mm256_unpacklo_epi8(v.half[h], w.half[h]), high = _mm256_unpackhi_epi8(v.half[h], w.half[h]);
        out[h] = {{_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31)}};
    }
}
// Tables of 16 bytes, as shuffled_levels.h wants them.
inline Bytes sixteen(const uint8_t* from) {
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)from));
    return {{table, table}};
}
inline Bytes looked_up(Bytes table, Bytes index) {
    return {{_mm256_shuffle_epi8(table.half[0], index.half[0]), _mm256_shuffle_epi8(table.half[1], index.half[1])}};
}
inline Bytes out_of_range(Bytes v, uint8_t first) {
    const __m256i f = _mm256_set1_epi8((char)first), limit = _mm256_set1_epi8(0x70);
    for (int h = 0; h < 2; ++h) v.half[h] = _mm256_adds_epu8(_mm256_xor_si256(v.half[h], f), limit);
    return v;
}
inline Bytes either(Bytes v, Bytes w) {
    return {{_mm256_or_si256(v.half[0], w.half[0]), _mm256_or_si256(v.half[1], w.half[1])}};
}
inline Bytes if_highest(Bytes mask, Bytes v, Bytes w) {
    for (int h = 0; h < 2; ++h) v.half[h] = _mm256_blendv_epi8(w.half[h], v.half[h], mask.half[h]);
    return v;
}
// Fields of 4 bits and of 2, the lowest of a byte first, one a byte.
inline Bytes nibbles(const uint8_t* from) {
    Bytes out;
    for (int h = 0; h < 2; ++h) {
        const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(from + 16 * h)));
        out.half[h] = _mm256_or_si256(wide, _mm256_slli_epi16(wide, 4));
    }
    return masked(out, 15);
}
inline Bytes nibble_halves(const uint8_t* from) {
    Bytes out;
    for (int h = 0; h < 2; ++h) {
        const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(from + 8 * h)));
        const __m256i two = _mm256_or_si256(wide, _mm256_slli_epi32(wide, 6));
        out.half[h] = _mm256_or_si256(two, _mm256_slli_epi32(two, 12));
    }
    return masked(out, 3);
}
