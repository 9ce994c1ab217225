// The table of one instruction set, from the functions that its file has compiled.

static inline Kernels table(const char* name) {
    return {name, quantize, linear, rms_norm, rotate_and_write, attend, merge_states, write_attended, gate, add_rows, greedy};
}
