// The types of numbers that weights come in, and how they become wider. For every kernel that reads weights: scripts/ptx and
// scripts/fake-cuda look for it here.
//
// Whatever is no number becomes, bit for bit, what the host's casts make of it: sign and payload are kept, and it is quiet,
// as processors leave it. Of a brain float, whose bits are the upper half of a float's, nothing changes.
#pragma once

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
    if (magnitude >= 0x7c00u << 13) bits |= 0x7f800000u; // infinite, or no number
    if (magnitude > 0x7c00u << 13) bits |= 0x00400000u;  // no number: quiet
    return __uint_as_float(bits | (u32)(value.bits & 0x8000) << 16);
}
