// Bytes of AVX-512 across the lanes of 16 that its older byte instructions keep to. Included after avx512_vectors.h.

// v[0], w[0], v[1], w[1] ...: both halves.
inline void zip_bytes(Bytes v, Bytes w, Bytes* out) {
    const __m512i low = _mm512_unpacklo_epi8(v.v, w.v), high = _mm512_unpackhi_epi8(v.v, w.v);
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    out[0] = {_mm512_permutex2var_epi64(low, first, high)};
    out[1] = {_mm512_permutex2var_epi64(low, second, high)};
}
// Tables of 16 bytes, as shuffled_levels.h wants them.
inline Bytes sixteen(const uint8_t* from) { return {_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)from))}; }
inline Bytes looked_up(Bytes table, Bytes index) { return {_mm512_shuffle_epi8(table.v, index.v)}; }
inline Bytes out_of_range(Bytes v, uint8_t first) {
    const __m512i index = _mm512_xor_si512(v.v, _mm512_set1_epi8((char)first));
    return {_mm512_adds_epu8(index, _mm512_set1_epi8(0x70))};
}
inline Bytes either(Bytes v, Bytes w) { return {_mm512_or_si512(v.v, w.v)}; }
inline Bytes if_highest(Bytes mask, Bytes v, Bytes w) {
    return {_mm512_mask_blend_epi8(_mm512_movepi8_mask(mask.v), w.v, v.v)};
}
