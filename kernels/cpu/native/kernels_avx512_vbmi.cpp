// AVX-512 with VNNI and VBMI: 128 bytes are looked up in one instruction.

#include "model.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include "target.h"

ANYBIT_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c")
namespace anybit {
namespace {

#include "avx512_vectors.h"
#include "avx512_vnni_sums.h"

constexpr uint8_t kCounted[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                  16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
// v[0], w[0], v[1], w[1] ...: both halves.
inline void zip_bytes(Bytes v, Bytes w, Bytes* out) {
    const __m512i lanes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)kCounted));
    const __m512i first = _mm512_or_si512(lanes, _mm512_slli_epi16(_mm512_add_epi8(lanes, _mm512_set1_epi16(64)), 8));
    const __m512i second = _mm512_add_epi8(first, _mm512_set1_epi8(32));
    out[0] = {_mm512_permutex2var_epi8(v.v, first, w.v)};
    out[1] = {_mm512_permutex2var_epi8(v.v, second, w.v)};
}

struct PairLevels { Bytes firsts, seconds; };

// As shuffled_levels.h says.
template <int kBits>
struct LevelTable {
    Bytes firsts, more_firsts, seconds, more_seconds;

    explicit LevelTable(const uint8_t* levels) {
        const uint8_t* second = levels + (1 << kBits);
        if (kBits == 4) {
            firsts = {_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)levels))}, seconds = {_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)second))};
        } else {
            firsts = load(levels), seconds = load(second);
            if (kBits == 8) more_firsts = load(levels + 64), more_seconds = load(second + 64);
        }
    }
    inline PairLevels look_up(Bytes codes) const {
        if (kBits == 4) return {{_mm512_shuffle_epi8(firsts.v, codes.v)}, {_mm512_shuffle_epi8(seconds.v, codes.v)}};
        if (kBits == 6) return {{_mm512_permutexvar_epi8(codes.v, firsts.v)}, {_mm512_permutexvar_epi8(codes.v, seconds.v)}};
        const __m512i first = _mm512_permutex2var_epi8(firsts.v, codes.v, more_firsts.v);
        const __m512i second = _mm512_permutex2var_epi8(seconds.v, codes.v, more_seconds.v);
        const __mmask64 exchanged = _mm512_movepi8_mask(codes.v);
        return {{_mm512_mask_blend_epi8(exchanged, first, second)}, {_mm512_mask_blend_epi8(exchanged, second, first)}};
    }
};

#include "kernels_table.h"

}  // namespace

const Kernels* avx512_vbmi_kernels() {
    static const Kernels kernels = table("avx512_vbmi");
    return &kernels;
}

}  // namespace anybit
ANYBIT_TARGET_END

#else
namespace anybit {
const Kernels* avx512_vbmi_kernels() { return nullptr; }
}  // namespace anybit
#endif
