// What the kernels of nested weights share: where codes, scales and activations lie. `kernels/cuda/fragments.py` says how
// weights get into this order; one `-D` per constant says what a kernel is compiled for.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifndef BITS
#define BITS 4
#endif
#ifndef GROUP
#define GROUP 128
#endif
#ifndef PART  // number type of scales and zeros: 0 float32, 1 float16
#define PART 1
#endif
#ifndef VALUE  // number type of activations and results: 0 float32, 1 float16, 2 bfloat16
#define VALUE 0
#endif

namespace nested {

using u8 = unsigned char;
using u32 = unsigned int;

constexpr int kRows = 16;     // of a tile, one A fragment of an integer matrix instruction
constexpr int kColumns = 128;  // of a tile, four such fragments
constexpr int kSteps = kColumns / 32;
constexpr int kGroups = kColumns / GROUP;
constexpr int kStepsOfGroup = GROUP / 32;
constexpr int kTokens = 4;  // of an n-tile: two digits each make the eight columns of a B fragment
constexpr bool kHasLow = BITS > 4;
constexpr bool kHasC3 = BITS >= 3, kHasC4 = BITS >= 4, kHasC6 = BITS >= 6, kHasC8 = BITS == 8;

#if VALUE == 0
using Value = float;
__device__ inline float to_float(Value value) { return value; }
__device__ inline Value to_value(float value) { return value; }
#elif VALUE == 1
using Value = __half;
__device__ inline float to_float(Value value) { return __half2float(value); }
__device__ inline Value to_value(float value) { return __float2half_rn(value); }
#else
using Value = __nv_bfloat16;
__device__ inline float to_float(Value value) { return __bfloat162float(value); }
__device__ inline Value to_value(float value) { return __float2bfloat16_rn(value); }
#endif

// Scale and zero of one row in one group.
#if PART == 0
using Part = uint2;
__device__ inline float2 part_floats(Part part) { return make_float2(__uint_as_float(part.x), __uint_as_float(part.y)); }
#else
using Part = u32;
__device__ inline float2 part_floats(Part part) { return __half22float2(*reinterpret_cast<__half2*>(&part)); }
#endif

// Code streams, tile after tile: [row tiles][column tiles][32 lanes]. Parts: [row tiles][groups][16 rows]. Above 4 bits
// `high` is the 4-bit width's part, of which the scale counts, and `low` the width's own.
struct Streams {
    const uint4* c2;
    const uint2* c3;
    const uint2* c4;
    const uint4* c6;
    const uint4* c8;
};
struct Weight : Streams {
    const Part* high;
    const Part* low;
};
// The same at several widths; `parts` in the order of the widths 2, 3, 4, 6, 8.
struct MixedWeight : Streams {
    const Part* parts[5];
};

__device__ inline u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
__device__ inline u32 word(const uint2& v, int i) { return i == 0 ? v.x : v.y; }

// Start what follows in the stream early, and wait for what came before: without this pair a step of many small kernels
// spends most of its time between them. Earlier chips launch one after the other.
__device__ inline void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ inline void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace nested
