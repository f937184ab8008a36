// The kernels that the fake's own test launches.
#include "fake_kernel.h"

static void fill_u32(FakeDim, FakeDim, unsigned, void** args) {
    const auto n = fake_arg<uint32_t>(args, 1);
    uint32_t* values = fake_array<uint32_t>(fake_arg<CUdeviceptr>(args, 0), n);
    for (uint32_t i = 0; i < n; i++) values[i] = fake_arg<uint32_t>(args, 2) + i;
}
static const fake_kernel fill_u32_registered("selftest_fill_u32", fill_u32);

// Writes down the shape that it was launched with.
static void shape(FakeDim grid, FakeDim block, unsigned shared_bytes, void** args) {
    uint32_t* values = fake_array<uint32_t>(fake_arg<CUdeviceptr>(args, 0), 7);
    const uint32_t shape[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z, shared_bytes};
    std::memcpy(values, shape, sizeof shape);
}
static const fake_kernel shape_registered("selftest_shape", shape);
