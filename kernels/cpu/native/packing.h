// From the canonical order of checkpoints (kernels/layout.py) to vector order, and single rows back.

#pragma once

#include "nested.h"

namespace anybit {

// One chunk stream of `bits` bits: canonical is [stored_rows * bits / 8, in] bytes, stored_rows a multiple of 8; packed is
// [blocks][spans][bits * 64] bytes for blocks first .. last-1.
void pack_chunk(const uint8_t* canonical, int64_t stored_rows, int64_t in_features, int chunk, uint8_t* packed,
                int64_t first, int64_t last);

// One part of a float part: canonical is [groups, stored_rows] numbers of float_bytes; packed is [blocks][groups][16].
void pack_part(const uint8_t* canonical, int64_t stored_rows, int64_t groups, int64_t float_bytes, uint8_t* packed,
               int64_t blocks);

// One row of the weight as floats [in].
void decode_row(const Weight& weight, int64_t bit_width, int64_t row, float* out);

}  // namespace anybit
