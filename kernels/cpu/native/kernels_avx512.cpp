// AVX-512 without byte dot products: two instructions for one.

#include "model.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include "target.h"

ANYBIT_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
namespace anybit {
namespace {

#include "avx512_vectors.h"

inline Ints dot(Ints sums, Bytes codes, const int8_t* q) {
    // Codes are at most 15, so a pair of products stays far below the limits of int16.
    const __m512i pairs = _mm512_maddubs_epi16(codes.v, broadcast_four(q));
    return {_mm512_add_epi32(sums.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
}

#include "linear_kernel.h"
#include "layer_kernel.h"

}  // namespace

const Kernels* avx512_kernels() {
    static const Kernels kernels = {"avx512", quantize, linear, rms_norm, rotate_and_write, attend,
                                    gate, add_rows};
    return &kernels;
}

}  // namespace anybit
ANYBIT_TARGET_END

#else
namespace anybit {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace anybit
#endif
