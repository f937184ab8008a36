// Casts to wider floats, for bytes that have crossed the bus as they stand in the file. `scripts/ptx` makes cast.ptx of
// this file; run it after every change.
//
// The tests compile this file for the host, too, and run it there: it includes nothing of CUDA's, and uses only what their
// emulation of a GPU knows (crates/unladen/tests/fake_cuda/emulate.h).
//
// A thread takes every n-th element, whatever the number of threads. Source and target must not overlap: nothing orders
// the threads.

#include "widen.h"

__device__ inline void put(float *target, float value) { *target = value; }

// What a GPU's own conversion leaves of a NaN, nobody says.
__device__ inline void put(double *target, float value) {
    u32 bits = __float_as_uint(value);
    u64 no_number = (u64)(bits & 0x80000000u) << 32 | 0x7ff8000000000000u | (u64)(bits & 0x007fffffu) << 29;
    *target = (bits & 0x7fffffffu) > 0x7f800000u ? __longlong_as_double((long long)no_number) : (double)value;
}

#define CAST(name, Target, Source)                                                                                     \
    extern "C" __global__ void name(Target *target, const Source *source, u64 n_elems) {                               \
        u64 step = (u64)gridDim.x * blockDim.x;                                                                        \
        for (u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x; at < n_elems; at += step) {                          \
            put(target + at, widen(source[at]));                                                                       \
        }                                                                                                              \
    }

CAST(cast_f16_to_f32, float, Half)
CAST(cast_bf16_to_f32, float, Brain)
CAST(cast_f16_to_f64, double, Half)
CAST(cast_bf16_to_f64, double, Brain)
CAST(cast_f32_to_f64, double, float)
