// AVX-512 with VNNI.

#include "model.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include "target.h"

ANYBIT_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
namespace anybit {
namespace {

#include "avx512_vectors.h"
#include "avx512_lanes.h"
#include "shuffled_levels.h"
#include "avx512_vnni_sums.h"
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
