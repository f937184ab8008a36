// GPT-2's forward pass in a handful of kernels. `scripts/ptx` makes gpt2.ptx of this file; run it after every change.
//
// The tests compile this file for the host, too, and run it there: it includes nothing of CUDA's, and uses only what their
// emulation of a GPU knows (crates/unladen/tests/fake_cuda/emulate.h).
//
// Activations stand in groups of 8 tokens, (groups, features, 8): a product takes a feature of 8 tokens by two loads of
// 16 bytes, and reads each weight once for all 8. Places of the last group that have no token hold numbers that mix with
// no other token's. All sums are in 32 bits; a weight is widened when it is read.

#include "widen.h" // of crates/unladen/src/cuda/kernels

enum { TOKENS = 8 }; // of a group
enum { LANES = 32 }; // of a warp

// So many rounds of the loop that follows become one, all without a number. For GPUs alone.
#ifdef __CUDACC__
#define UNROLL(...) AS_PRAGMA(unroll __VA_ARGS__)
#define AS_PRAGMA(...) _Pragma(#__VA_ARGS__)
#else
#define UNROLL(...)
#endif

#define EVERY_LANE 0xffffffffu
#define MINUS_INFINITY __uint_as_float(0xff800000u)

// The types of weights. `NONE`: there is no such tensor, it counts as zeros.
enum Dtype { NONE = 0, F32 = 1, F16 = 2, BF16 = 3 };

// What becomes of a product: it replaces what stands there, GELU of it does, or it is added.
enum Then { REPLACE = 0, GELU = 1, ADD = 2 };

// An element of a tensor whose type is known when it runs: for what is read once.
__device__ inline float element(const void *elements, u32 dtype, u64 at) {
    switch (dtype) {
    case F32: return widen(((const float *)elements)[at]);
    case F16: return widen(((const Half *)elements)[at]);
    case BF16: return widen(((const Brain *)elements)[at]);
    default: return 0.0f;
    }
}

// In its tanh form: x/2 · (1 + tanh u) is x / (1 + e^(-2u)).
__device__ inline float gelu(float x) {
    float u = 0.7978846f * (x + 0.044715f * x * x * x);
    return x / (1.0f + expf(-2.0f * u));
}

__device__ inline void put(float *y, float value, u32 then) {
    if (then == ADD) {
        *y += value;
    } else {
        *y = then == GELU ? gelu(value) : value;
    }
}

// The sum of a token's embedding and its position's. A thread per element of `x`, (groups, emb, 8); zeros where there is
// no token.
extern "C" __global__ void embed(float *x, const u32 *ids, const void *token_embedding, u32 token_dtype,
                                 const void *position_embedding, u32 position_dtype, u32 n_features, u32 n_tokens) {
    u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    u64 n_groups = (n_tokens + TOKENS - 1) / TOKENS;
    if (at >= n_groups * n_features * TOKENS) return;
    u64 feature = at / TOKENS % n_features;
    u64 token = at / TOKENS / n_features * TOKENS + at % TOKENS;
    float sum = 0.0f;
    if (token < n_tokens) {
        sum = element(token_embedding, token_dtype, (u64)ids[token] * n_features + feature) +
              element(position_embedding, position_dtype, token * n_features + feature);
    }
    x[at] = sum;
}

enum { NORM_THREADS = 1024 };

// The sum over all threads of a block that work on the same token of a group: those whose numbers are 8 apart.
__device__ inline float sum_of_token(float mine) {
    __shared__ float partial[NORM_THREADS / LANES][TOKENS];
    u32 lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    mine += __shfl_xor_sync(EVERY_LANE, mine, 8);
    mine += __shfl_xor_sync(EVERY_LANE, mine, 16);
    if (lane < TOKENS) partial[warp][lane] = mine;
    __syncthreads();
    float sum = 0.0f;
    UNROLL(4)
    for (u32 it = 0; it < NORM_THREADS / LANES; it++) sum += partial[it][lane % TOKENS];
    __syncthreads(); // the next call writes to `partial`
    return sum;
}

// Normalises each token over its features, to mean 0 and variance 1, then scales and shifts. A block per group.
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
    layer_norm(float *normed, const float *x, const void *scale, u32 scale_dtype, const void *shift, u32 shift_dtype,
               u32 n_features) {
    // A thread stays with its token: the number of threads is a multiple of 8.
    u32 n_elems = n_features * TOKENS; // of a group
    x += (u64)blockIdx.x * n_elems;
    normed += (u64)blockIdx.x * n_elems;
    float sum = 0.0f;
    UNROLL(4)
    for (u32 at = threadIdx.x; at < n_elems; at += NORM_THREADS) sum += x[at];
    float mean = sum_of_token(sum) / n_features;
    float squares = 0.0f;
    UNROLL(4)
    for (u32 at = threadIdx.x; at < n_elems; at += NORM_THREADS) {
        float distance = x[at] - mean;
        squares += distance * distance;
    }
    float factor = 1.0f / sqrtf(sum_of_token(squares) / n_features + 1e-5f);
    UNROLL(1)
    for (u32 at = threadIdx.x; at < n_elems; at += NORM_THREADS) {
        u32 feature = at / TOKENS;
        normed[at] = (x[at] - mean) * factor * element(scale, scale_dtype, feature) +
                     element(shift, shift_dtype, feature);
    }
}

// Products: y = then(weight · x + bias). `x` is (groups, n_in, 8); `y` has `n_out` features of each group, and the groups
// are `y_group_elems` apart: it may be a part of a wider one. What is multiplied by what is up to the functions below.
struct Product {
    float *y;
    u64 y_group_elems;
    const float *x;
    const void *bias;
    u32 bias_dtype, n_in, n_out, n_groups, then;
};

__device__ inline void add_products(float *sums, float weight, float4 low, float4 high) {
    sums[0] += weight * low.x;
    sums[1] += weight * low.y;
    sums[2] += weight * low.z;
    sums[3] += weight * low.w;
    sums[4] += weight * high.x;
    sums[5] += weight * high.y;
    sums[6] += weight * high.z;
    sums[7] += weight * high.w;
}

// Each lane gives half of its sums to another lane, and adds those that it gets to the other half.
template <u32 half> __device__ inline void halve(float *sums, u32 lane) {
    bool is_upper = lane & half;
    UNROLL()
    for (u32 sum = 0; sum < half; sum++) {
        float kept = is_upper ? sums[sum + half] : sums[sum];
        float given = is_upper ? sums[sum] : sums[sum + half];
        sums[sum] = kept + __shfl_xor_sync(EVERY_LANE, given, half);
    }
}

enum { ROWS = 4, ROW_SLICES = 4 };

// A weight of (out, in), as PyTorch's Linear has it. A block computes 4 outputs of a group, 32 sums; all of its threads go
// along the inputs side by side.
template <typename T> __device__ inline void multiply_rows(const Product &it, const T *weight) {
    __shared__ float partial[ROW_SLICES][LANES];
    u32 lane = threadIdx.x % LANES, slice = threadIdx.x / LANES;
    u32 group = blockIdx.x % it.n_groups; // the blocks that read the same weights run at the same time
    u32 first = blockIdx.x / it.n_groups * ROWS;
    const float4 *x = (const float4 *)(it.x + (u64)group * it.n_in * TOKENS);
    const T *rows[ROWS];
    UNROLL()
    for (u32 row = 0; row < ROWS; row++) {
        // After the last row the last row once more, for sums that nobody writes.
        u64 one = first + row < it.n_out ? first + row : it.n_out - 1;
        rows[row] = weight + one * it.n_in;
    }
    float sums[ROWS * TOKENS];
    UNROLL()
    for (u32 sum = 0; sum < ROWS * TOKENS; sum++) sums[sum] = 0.0f;
    UNROLL(2)
    for (u32 in = threadIdx.x; in < it.n_in; in += ROW_SLICES * LANES) {
        float4 low = x[2 * (u64)in], high = x[2 * (u64)in + 1];
        UNROLL()
        for (u32 row = 0; row < ROWS; row++) {
            add_products(sums + row * TOKENS, widen(rows[row][in]), low, high);
        }
    }
    // Each lane has 32 sums, and there are 32 lanes: in the end lane i has the sum i of all lanes.
    halve<16>(sums, lane);
    halve<8>(sums, lane);
    halve<4>(sums, lane);
    halve<2>(sums, lane);
    halve<1>(sums, lane);
    partial[slice][lane] = sums[0];
    __syncthreads();
    u32 row = first + lane / TOKENS, token = lane % TOKENS;
    if (slice == 0 && row < it.n_out) {
        float sum = element(it.bias, it.bias_dtype, row);
        UNROLL()
        for (u32 other = 0; other < ROW_SLICES; other++) sum += partial[other][lane];
        put(it.y + group * it.y_group_elems + (u64)row * TOKENS + token, sum, it.then);
    }
}

enum { COL_SLICES = 32 };

// A weight of (in, out), as Hugging Face's Conv1D has it. A block computes 32 outputs of a group; a lane of each warp has
// one of them, and each warp every 32nd input.
template <typename T> __device__ inline void multiply_cols(const Product &it, const T *weight) {
    __shared__ float partial[COL_SLICES][TOKENS][LANES];
    u32 lane = threadIdx.x % LANES, slice = threadIdx.x / LANES;
    u32 group = blockIdx.x % it.n_groups;
    u32 first = blockIdx.x / it.n_groups * LANES;
    const float4 *x = (const float4 *)(it.x + (u64)group * it.n_in * TOKENS);
    // After the last column the last column once more, for sums that nobody writes.
    const T *column = weight + (first + lane < it.n_out ? first + lane : it.n_out - 1);
    float sums[TOKENS];
    UNROLL()
    for (u32 token = 0; token < TOKENS; token++) sums[token] = 0.0f;
    UNROLL(4)
    for (u32 in = slice; in < it.n_in; in += COL_SLICES) {
        add_products(sums, widen(column[(u64)in * it.n_out]), x[2 * (u64)in], x[2 * (u64)in + 1]);
    }
    UNROLL()
    for (u32 token = 0; token < TOKENS; token++) partial[slice][token][lane] = sums[token];
    __syncthreads();
    u32 col = first + lane, token = slice;
    if (token < TOKENS && col < it.n_out) {
        float sum = element(it.bias, it.bias_dtype, col);
        UNROLL(4)
        for (u32 other = 0; other < COL_SLICES; other++) sum += partial[other][token][lane];
        put(it.y + group * it.y_group_elems + (u64)col * TOKENS + token, sum, it.then);
    }
}

#define PRODUCT(name, n_threads, multiply, T)                                                                          \
    extern "C" __global__ void __launch_bounds__(n_threads)                                                            \
        name(float *y, u64 y_group_elems, const float *x, const T *weight, const void *bias, u32 bias_dtype, u32 n_in, \
             u32 n_out, u32 n_groups, u32 then) {                                                                      \
        Product it = {y, y_group_elems, x, bias, bias_dtype, n_in, n_out, n_groups, then};                             \
        multiply<T>(it, weight);                                                                                       \
    }

PRODUCT(multiply_rows_f32, ROW_SLICES *LANES, multiply_rows, float)
PRODUCT(multiply_rows_f16, ROW_SLICES *LANES, multiply_rows, Half)
PRODUCT(multiply_rows_bf16, ROW_SLICES *LANES, multiply_rows, Brain)
PRODUCT(multiply_cols_f32, COL_SLICES *LANES, multiply_cols, float)
PRODUCT(multiply_cols_f16, COL_SLICES *LANES, multiply_cols, Half)
PRODUCT(multiply_cols_bf16, COL_SLICES *LANES, multiply_cols, Brain)

enum { KEYS = 64 }; // that a block looks at together, one for each thread

// True if a mask hides a key: where its element, of `mask_elem_bytes`, is not zero. A float may be a negative zero.
__device__ inline bool is_hidden(const void *mask, u32 mask_elem_bytes, u64 at) {
    switch (mask_elem_bytes) {
    case 1: return ((const unsigned char *)mask)[at] != 0;
    case 2: return (((const u16 *)mask)[at] & 0x7fff) != 0;
    default: return (((const u32 *)mask)[at] & 0x7fffffff) != 0;
    }
}

// Self-attention: `qkv` is (groups, 3 · emb, 8), queries, keys and values; `mixed` is (groups, emb, 8), with zeros where
// there is no token. `mask` is (context, context), queries by keys; without one (`mask_elem_bytes` is 0) a query sees the
// keys up to itself. A block per head and query. It takes the keys a few at a time, and corrects what it has when it
// meets a higher score.
extern "C" __global__ void __launch_bounds__(KEYS)
    attention(float *mixed, const float *qkv, const void *mask, u32 mask_elem_bytes, u32 context_length, u32 n_heads,
              u32 head_dim, u32 n_tokens) {
    __shared__ float shared[KEYS];
    u64 emb_dim = (u64)n_heads * head_dim;
    u32 query = blockIdx.x / n_heads;
    u64 first_feature = (u64)(blockIdx.x % n_heads) * head_dim;
    float *target = mixed + (query / TOKENS * emb_dim + first_feature) * TOKENS + query % TOKENS;
    for (u32 it = threadIdx.x; it < head_dim; it += KEYS) target[(u64)it * TOKENS] = 0.0f;
    if (query >= n_tokens) return;

    u64 group_elems = 3 * emb_dim * TOKENS;
    const float *head = qkv + first_feature * TOKENS; // this head's features in the first group
    const float *queries = head + query / TOKENS * group_elems + query % TOKENS;
    const float *keys = head + emb_dim * TOKENS, *values = head + 2 * emb_dim * TOKENS;
    float factor = 1.0f / sqrtf((float)head_dim);
    u32 n_keys = mask_elem_bytes ? n_tokens : query + 1;
    float highest = MINUS_INFINITY, total = 0.0f;
    for (u32 first = 0; first < n_keys; first += KEYS) {
        u32 key = first + threadIdx.x;
        float score = MINUS_INFINITY;
        bool is_seen = key < n_keys;
        if (is_seen && mask_elem_bytes) {
            is_seen = !is_hidden(mask, mask_elem_bytes, (u64)query * context_length + key);
        }
        if (is_seen) {
            const float *its = keys + key / TOKENS * group_elems + key % TOKENS;
            score = 0.0f;
            UNROLL(4)
            for (u32 it = 0; it < head_dim; it++) score += queries[(u64)it * TOKENS] * its[(u64)it * TOKENS];
            score *= factor;
        }
        shared[threadIdx.x] = score;
        __syncthreads();
        float higher = highest;
        UNROLL(4)
        for (u32 it = 0; it < KEYS; it++) higher = shared[it] > higher ? shared[it] : higher;
        __syncthreads(); // all have read the scores
        shared[threadIdx.x] = is_seen ? expf(score - higher) : 0.0f;
        __syncthreads();
        float correction = higher == highest ? 1.0f : expf(highest - higher);
        float sum = 0.0f;
        UNROLL(4)
        for (u32 it = 0; it < KEYS; it++) sum += shared[it];
        total = total * correction + sum;
        u32 n_here = n_keys - first < KEYS ? n_keys - first : (u32)KEYS;
        UNROLL(1)
        for (u32 it = threadIdx.x; it < head_dim; it += KEYS) {
            float value = target[(u64)it * TOKENS] * correction;
            UNROLL(4)
            for (u32 other = 0; other < n_here; other++) {
                u64 group = (first + other) / TOKENS, token = (first + other) % TOKENS;
                value += shared[other] * values[group * group_elems + (u64)it * TOKENS + token];
            }
            target[(u64)it * TOKENS] = value;
        }
        highest = higher;
        __syncthreads(); // the next keys' scores go where the weights stand
    }
    // If every key is hidden this is 0 / 0, no number, as softmax has it.
    for (u32 it = threadIdx.x; it < head_dim; it += KEYS) target[(u64)it * TOKENS] /= total;
}
