// Casts to wider floats, for bytes that have crossed the bus as they stand in the file. `scripts/ptx` makes cast.ptx of
// this file; run it after every change.
//
// The tests compile this file for the host, too, and run it there: it includes nothing, and uses only what their
// emulation of a GPU knows (crates/unladen/tests/fake_cuda/emulate.h).
//
// A thread takes every n-th element, whatever the number of threads. Source and target must not overlap: nothing orders
// the threads.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct Half {
    u16 bits;
};
struct Brain {
    u16 bits;
};

__device__ inline float widen(float value) { return value; }

__device__ inline float widen(Brain value) { return __uint_as_float((u32)value.bits << 16); }

__device__ inline float widen(Half value) {
    u32 magnitude = (u32)(value.bits & 0x7fff) << 13;
    // The two types count exponents from numbers that are 112 apart. The product is exact, that of subnormals, too.
    u32 bits = __float_as_uint(__uint_as_float(magnitude) * 5192296858534827628530496329220096.0f);
    bool is_special = magnitude >= 0x7c00u << 13; // infinite, or no number
    return __uint_as_float(bits | (is_special ? 0x7f800000u : 0) | (u32)(value.bits & 0x8000) << 16);
}

#define CAST(name, Target, Source)                                                                                     \
    extern "C" __global__ void name(Target *target, const Source *source, u64 n_elems) {                               \
        u64 step = (u64)gridDim.x * blockDim.x;                                                                        \
        for (u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x; at < n_elems; at += step) {                          \
            target[at] = widen(source[at]);                                                                            \
        }                                                                                                              \
    }

CAST(cast_f16_to_f32, float, Half)
CAST(cast_bf16_to_f32, float, Brain)
CAST(cast_f16_to_f64, double, Half)
CAST(cast_bf16_to_f64, double, Brain)
CAST(cast_f32_to_f64, double, float)
