// GPT-2's kernels for the fake driver: the source that the GPU's PTX is made of, run on the host.
//
// How far a kernel reaches in each array is worked out here from its sizes, apart from what the launching side does: a launch
// whose arrays are shorter ends in the fake driver as one on a GPU might, and a kernel that reaches further crashes.
#include "emulate.h"

#include "../../src/gpu/kernels/gpt2.cu"

#include <algorithm>

namespace {

// The arguments of a launch, one after the other.
struct Arguments {
    void **values;
    int next = 0;

    template <typename T> T number() { return fake_arg<T>(values, next++); }
    CUdeviceptr address() { return fake_arg<CUdeviceptr>(values, next++); }
};

template <typename T> Guarded<T> array(CUdeviceptr address, u64 n_elems) {
    return Guarded<T>(fake_array<T>(address, n_elems), n_elems);
}

// Elements whose type is told by a number; null without one.
Guarded<const char> elements(CUdeviceptr address, u32 dtype, u64 n_elems) {
    switch (dtype) {
    case NONE: return Guarded<const char>(nullptr, 0);
    case F32: return Guarded<const char>((const char *)fake_array<float>(address, n_elems), n_elems * 4);
    case F16: return Guarded<const char>((const char *)fake_array<Half>(address, n_elems), n_elems * 2);
    case BF16: return Guarded<const char>((const char *)fake_array<Brain>(address, n_elems), n_elems * 2);
    default: fake_fault(CUDA_ERROR_INVALID_VALUE);
    }
}

u64 groups_of(u64 n_tokens) { return (n_tokens + TOKENS - 1) / TOKENS; }

void run_embed(FakeDim grid, FakeDim block, unsigned, void **values) {
    Arguments args{values};
    const auto x_at = args.address(), ids_at = args.address(), tokens_at = args.address();
    const u32 token_dtype = args.number<u32>();
    const auto positions_at = args.address();
    const u32 position_dtype = args.number<u32>(), n_features = args.number<u32>(), n_tokens = args.number<u32>();
    const auto x = array<float>(x_at, groups_of(n_tokens) * n_features * TOKENS);
    const auto ids = array<const u32>(ids_at, n_tokens);
    const u64 n_rows = 1 + u64(*std::max_element((const u32 *)ids, ids + n_tokens));
    const auto tokens = elements(tokens_at, token_dtype, n_rows * n_features);
    const auto positions = elements(positions_at, position_dtype, u64(n_tokens) * n_features);
    emulate(grid, block, [&] { embed(x, ids, tokens, token_dtype, positions, position_dtype, n_features, n_tokens); });
}
const fake_kernel embed_registered("embed", run_embed);

void run_layer_norm(FakeDim grid, FakeDim block, unsigned, void **values) {
    Arguments args{values};
    const auto normed_at = args.address(), x_at = args.address(), scale_at = args.address();
    const u32 scale_dtype = args.number<u32>();
    const auto shift_at = args.address();
    const u32 shift_dtype = args.number<u32>(), n_features = args.number<u32>();
    const auto normed = array<float>(normed_at, u64(grid.x) * n_features * TOKENS);
    const auto x = array<const float>(x_at, u64(grid.x) * n_features * TOKENS);
    const auto scale = elements(scale_at, scale_dtype, n_features);
    const auto shift = elements(shift_at, shift_dtype, n_features);
    emulate(grid, block, [&] { layer_norm(normed, x, scale, scale_dtype, shift, shift_dtype, n_features); });
}
const fake_kernel layer_norm_registered("layer_norm", run_layer_norm);

template <typename T>
using MultiplyKernel = void(float *, u64, const float *, const T *, const void *, u32, u32, u32, u32, u32);

template <typename T, MultiplyKernel<T> *kernel> void run_multiply(FakeDim grid, FakeDim block, unsigned, void **values) {
    Arguments args{values};
    const auto y_at = args.address();
    const u64 y_group_elems = args.number<u64>();
    const auto x_at = args.address(), weight_at = args.address(), bias_at = args.address();
    const u32 bias_dtype = args.number<u32>(), n_in = args.number<u32>(), n_out = args.number<u32>();
    const u32 n_groups = args.number<u32>(), then = args.number<u32>();
    // Read by 16 bytes.
    const auto x = array<const float4>(x_at, u64(n_groups) * n_in * TOKENS / 4);
    const auto y = array<float>(y_at, (n_groups - 1) * y_group_elems + u64(n_out) * TOKENS);
    const auto weight = array<const T>(weight_at, u64(n_in) * n_out);
    const auto bias = elements(bias_at, bias_dtype, n_out);
    emulate(grid, block, [&] {
        kernel(y, y_group_elems, &((const float4 *)x)->x, weight, bias, bias_dtype, n_in, n_out, n_groups, then);
    });
}
const fake_kernel rows_f32_registered("multiply_rows_f32", run_multiply<float, multiply_rows_f32>);
const fake_kernel rows_f16_registered("multiply_rows_f16", run_multiply<Half, multiply_rows_f16>);
const fake_kernel rows_bf16_registered("multiply_rows_bf16", run_multiply<Brain, multiply_rows_bf16>);
const fake_kernel cols_f32_registered("multiply_cols_f32", run_multiply<float, multiply_cols_f32>);
const fake_kernel cols_f16_registered("multiply_cols_f16", run_multiply<Half, multiply_cols_f16>);
const fake_kernel cols_bf16_registered("multiply_cols_bf16", run_multiply<Brain, multiply_cols_bf16>);

void run_attention(FakeDim grid, FakeDim block, unsigned, void **values) {
    Arguments args{values};
    const auto mixed_at = args.address(), qkv_at = args.address(), mask_at = args.address();
    const u32 mask_elem_bytes = args.number<u32>(), context_length = args.number<u32>();
    const u32 n_heads = args.number<u32>(), head_dim = args.number<u32>(), n_tokens = args.number<u32>();
    const u64 n_elems = groups_of(n_tokens) * TOKENS * n_heads * head_dim;
    const auto mixed = array<float>(mixed_at, n_elems);
    const auto qkv = array<const float>(qkv_at, 3 * n_elems);
    if (mask_elem_bytes && mask_at % mask_elem_bytes != 0) fake_fault(CUDA_ERROR_MISALIGNED_ADDRESS);
    // Up to the last key of the last query.
    const u64 mask_bytes = (u64(n_tokens - 1) * context_length + n_tokens) * mask_elem_bytes;
    const Guarded<const char> mask(mask_bytes ? fake_array<const char>(mask_at, mask_bytes) : nullptr, mask_bytes);
    emulate(grid, block, [&] {
        attention(mixed, qkv, mask, mask_elem_bytes, context_length, n_heads, head_dim, n_tokens);
    });
}
const fake_kernel attention_registered("attention", run_attention);

} // namespace
