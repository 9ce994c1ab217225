#include "packing.h"

#include <cmath>
#include <cstring>

namespace anybit {
namespace {

// Where a field of a stream is: the byte of its lane in its span, and how far the field is from bit 0.
struct Field {
    int64_t byte;
    int shift;

    Field(int chunk, int64_t row_in_block, int64_t input) {
        const int64_t span = input / kSpanInputs, step = input % kSpanInputs / 4;
        const Place place = kPlaces[chunk][step / 2];
        byte = (span * kChunkBits[chunk] + place.vector) * kLanes + 4 * row_in_block + input % 4;
        shift = kLowestBit[chunk] + place.shift + (step % 2 == 0 ? 0 : 4);
    }
};

float load_number(const void* part, int64_t float_bytes, int64_t index) {
    if (float_bytes == 4) return ((const float*)part)[index];
    const uint16_t half = ((const uint16_t*)part)[index];
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    float magnitude;
    if (exponent == 31)
        magnitude = fraction == 0 ? INFINITY : NAN;
    else if (exponent == 0)
        magnitude = std::ldexp((float)fraction, -24);
    else
        magnitude = std::ldexp((float)(fraction + 1024), exponent - 25);
    return half & 0x8000 ? -magnitude : magnitude;
}

}  // namespace

void pack_chunk(const uint8_t* canonical, int64_t stored_rows, int64_t in_features, int chunk, uint8_t* packed,
                int64_t first, int64_t last) {
    const int bits = kChunkBits[chunk], rows_per_byte = 8 / bits, mask = (1 << bits) - 1;
    const int64_t block_bytes = in_features / kSpanInputs * bits * kLanes;
    for (int64_t block = first; block < last; ++block) {
        uint8_t* out = packed + block * block_bytes;
        std::memset(out, 0, (size_t)block_bytes);
        for (int64_t row = 0; row < kBlockRows && block * kBlockRows + row < stored_rows; ++row) {
            const int64_t stored = block * kBlockRows + row;
            const uint8_t* fields = canonical + stored / rows_per_byte * in_features;
            const int from = 8 - bits * (int)(stored % rows_per_byte + 1);
            for (int64_t input = 0; input < in_features; ++input) {
                const Field field(chunk, row, input);
                out[field.byte] |= (uint8_t)((fields[input] >> from & mask) << field.shift);
            }
        }
    }
}

void pack_part(const uint8_t* canonical, int64_t stored_rows, int64_t groups, int64_t float_bytes, uint8_t* packed,
               int64_t blocks) {
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * kBlockRows;
        const int64_t rows = stored_rows - first < kBlockRows ? stored_rows - first : kBlockRows;
        for (int64_t group = 0; group < groups; ++group) {
            uint8_t* out = packed + (block * groups + group) * kBlockRows * float_bytes;
            std::memset(out, 0, (size_t)(kBlockRows * float_bytes));
            std::memcpy(out, canonical + (group * stored_rows + first) * float_bytes, (size_t)(rows * float_bytes));
        }
    }
}

void decode_row(const Weight& weight, int64_t bit_width, int64_t row, float* out) {
    const int64_t block = row / kBlockRows, in_block = row % kBlockRows, groups = weight.num_groups();
    int own = 0;
    while (kWidths[own] != bit_width) ++own;
    const FloatPart& nibble = weight.parts[bit_width > 4 ? 2 : own];
    const FloatPart& part = weight.parts[own];
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t index = (block * groups + group) * kBlockRows + in_block;
        const float high_scale = load_number(nibble.scale, weight.float_bytes, index);
        const float low_scale = bit_width > 4 ? load_number(part.scale, weight.float_bytes, index) : 0.0f;
        const float zero = load_number(part.zero, weight.float_bytes, index);
        for (int64_t input = group * weight.group_size; input < (group + 1) * weight.group_size; ++input) {
            int high = 0, low = 0;
            for (int chunk = 0; chunk <= own; ++chunk) {
                const int bits = kChunkBits[chunk];
                const Field field(chunk, in_block, input);
                const uint8_t byte = weight.chunks[chunk][block * weight.num_spans() * bits * kLanes + field.byte];
                int& code = chunk < 3 ? high : low;
                code = code << bits | (byte >> field.shift & ((1 << bits) - 1));
            }
            float value = (float)high * high_scale;
            if (bit_width > 4) value += (float)low * low_scale;
            out[input] = value + zero;
        }
    }
}

}  // namespace anybit
