// The casts for the fake driver: the source that the GPU's PTX is made of, run on the host.
#include "emulate.h"

#include "../../src/cuda/kernels/cast.cu"

namespace {

template <typename Target, typename Source, void (*kernel)(Target *, const Source *, u64)>
void run_cast(FakeDim grid, FakeDim block, unsigned, void **args) {
    const u64 n_elems = fake_arg<u64>(args, 2);
    const Guarded<Target> target(fake_array<Target>(fake_arg<CUdeviceptr>(args, 0), n_elems), n_elems);
    const Guarded<const Source> source(fake_array<Source>(fake_arg<CUdeviceptr>(args, 1), n_elems), n_elems);
    emulate(grid, block, [&] { kernel(target, source, n_elems); });
}
const fake_kernel f16_to_f32_registered("cast_f16_to_f32", run_cast<float, Half, cast_f16_to_f32>);
const fake_kernel bf16_to_f32_registered("cast_bf16_to_f32", run_cast<float, Brain, cast_bf16_to_f32>);
const fake_kernel f16_to_f64_registered("cast_f16_to_f64", run_cast<double, Half, cast_f16_to_f64>);
const fake_kernel bf16_to_f64_registered("cast_bf16_to_f64", run_cast<double, Brain, cast_bf16_to_f64>);
const fake_kernel f32_to_f64_registered("cast_f32_to_f64", run_cast<double, float, cast_f32_to_f64>);

} // namespace
