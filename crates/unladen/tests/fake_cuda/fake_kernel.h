// What the host's implementation of a kernel is written with. Put it into a file `kernels_NAME.cpp` in a folder
// `crates/*/tests/fake_cuda`: scripts/fake-cuda takes it from there.
//
//     static void scale(FakeDim grid, FakeDim block, unsigned shared_bytes, void** args) {
//         const auto address = fake_arg<CUdeviceptr>(args, 0);
//         const auto n = fake_arg<uint32_t>(args, 1);
//         const auto factor = fake_arg<float>(args, 2);
//         float* values = fake_array<float>(address, n);
//         for (uint32_t i = 0; i < n; i++) values[i] *= factor;
//     }
//     static const fake_kernel registered("scale", scale);
//
// It does the work of the whole grid, in one call, on the thread of the launch's stream. The PTX says how many arguments there are
// and how long each is; their values were taken at the launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "api.h"

struct FakeDim {
    unsigned x, y, z;
};

using FakeKernel = void (*)(FakeDim grid, FakeDim block, unsigned shared_bytes, void** args);

struct fake_kernel {
    fake_kernel(const char* name, FakeKernel kernel);
};

// The host's view of a range of device memory, valid until the kernel returns. A range that is no memory of the launch's GPU ends
// the kernel there and breaks its context, as an access to it would: this returns no null.
void* fake_host(CUdeviceptr address, size_t len_bytes);

// Ends the kernel in the same way with another error, such as CUDA_ERROR_MISALIGNED_ADDRESS.
[[noreturn]] void fake_fault(CUresult error);

template <class T>
T* fake_array(CUdeviceptr address, size_t n_elems) {
    if (address % alignof(T) != 0) fake_fault(CUDA_ERROR_MISALIGNED_ADDRESS);
    return static_cast<T*>(fake_host(address, n_elems * sizeof(T)));
}

template <class T>
T fake_arg(void** args, int position) {
    T value;
    std::memcpy(&value, args[position], sizeof value);
    return value;
}
