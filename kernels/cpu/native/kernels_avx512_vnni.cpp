// AVX-512 with VNNI: four products and their sum in one instruction.

#include "model.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include "target.h"

ANYBIT_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
namespace anybit {
namespace {

#include "avx512_vectors.h"

inline Ints dot(Ints sums, Bytes codes, const int8_t* q) {
    return {_mm512_dpbusd_epi32(sums.v, codes.v, broadcast_four(q))};
}

#include "linear_kernel.h"
#include "layer_kernel.h"

}  // namespace

const Kernels* avx512_vnni_kernels() {
    static const Kernels kernels = {"avx512_vnni", quantize, linear, rms_norm, rotate_and_write, attend,
                                    gate, add_rows};
    return &kernels;
}

}  // namespace anybit
ANYBIT_TARGET_END

#else
namespace anybit {
const Kernels* avx512_vnni_kernels() { return nullptr; }
}  // namespace anybit
#endif
