// All kernels of one instruction set, and their table. Included by its source file, inside its namespace and after its
// vector type (linear_kernel.h says what that offers).

#include "linear_kernel.h"
#include "activations_kernel.h"
#include "exp_kernel.h"
#include "sealed_kernel.h"
#include "layer_kernel.h"
#include "attention_kernel.h"
#include "sealed_attention_kernel.h"
#include "attend_kernel.h"
#include "seal_kernel.h"
#include "choose_codes_kernel.h"

static inline Kernels table(const char* name) {
    return {name, quantize, linear, rms_norm, rotate_and_write, attend, merge_states, write_attended, gate, add_rows, greedy,
            choose_codes, seal};
}
