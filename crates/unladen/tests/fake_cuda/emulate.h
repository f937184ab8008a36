// Runs the source of CUDA kernels on the host: include this, then the source, and have what is registered as a `fake_kernel`
// call `emulate`, with arrays that are `Guarded`.
//
// Every thread of a block is a fiber, and blocks run one after the other. A warp runs until all of its threads wait for the
// block (`__syncthreads`) or have ended, then the next one does, from the first to the last in one block and from the last
// to the first in the next: a kernel that leaves out a wait gives other numbers. One in which some threads wait for what
// others never reach ends the process with a message.
#pragma once

#undef _FORTIFY_SOURCE // it takes a jump to another stack for a mistake

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "fake_kernel.h"

#define __global__
#define __device__
#define __launch_bounds__(n_threads)
#define __shared__ static thread_local

// What kernels read. A fiber's own `threadIdx` is set whenever its turn comes.
inline thread_local FakeDim threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) float4 {
    float x, y, z, w;
};

namespace emulated {

enum { LANES = 32, STACK_BYTES = 32 << 10 };

enum class State { READY, AT_WARP, AT_BLOCK, DONE };

// A thread of a block, and then the thread of that number in the next.
struct Fiber {
    std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
    bool is_started = false;
    jmp_buf place; // where it waits
    State state = State::READY;
    FakeDim index;
    unsigned number = 0;
    unsigned n_shuffles = 0;
};

struct Block {
    std::vector<std::unique_ptr<Fiber>> fibers; // kept from block to block
    unsigned n_threads = 0;
    jmp_buf scheduler;
    Fiber *running = nullptr;
    // What a lane gives in a shuffle. Two, in turn: a lane may give again before all have taken.
    std::vector<uint32_t> given[2];
    void (*body)(void *) = nullptr;
    void *argument = nullptr;
};

inline thread_local Block block;

inline void wait(State state) {
    Fiber *self = block.running;
    self->state = state;
    if (_setjmp(self->place) == 0) _longjmp(block.scheduler, 1);
}

[[noreturn]] inline void fiber_main() {
    for (;;) {
        block.body(block.argument);
        wait(State::DONE);
    }
}

// Runs a fiber until it waits. Jumps, because `swapcontext` asks the kernel for signal masks every time.
__attribute__((noinline)) inline void resume(Fiber *fiber) {
    threadIdx = fiber->index;
    block.running = fiber;
    if (_setjmp(block.scheduler) != 0) return;
    if (fiber->is_started) _longjmp(fiber->place, 1);
    fiber->is_started = true;
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = fiber->stack.get();
    start.uc_stack.ss_size = STACK_BYTES;
    start.uc_link = nullptr;
    makecontext(&start, fiber_main, 0);
    setcontext(&start);
}

// Runs the threads of a warp until they have ended or wait for the block. False if there was nothing to do.
inline bool run_warp(unsigned first) {
    unsigned end = first + LANES < block.n_threads ? first + LANES : block.n_threads;
    for (bool is_any = false;; is_any = true) {
        unsigned n_run = 0, n_at_warp = 0, n_done = 0;
        for (unsigned it = first; it < end; it++) {
            if (block.fibers[it]->state != State::READY) continue;
            resume(block.fibers[it].get());
            n_run += 1;
        }
        for (unsigned it = first; it < end; it++) {
            n_at_warp += block.fibers[it]->state == State::AT_WARP;
            n_done += block.fibers[it]->state == State::DONE;
        }
        // All have come to the shuffle who are still there.
        bool is_met = n_at_warp > 0 && n_at_warp + n_done == end - first;
        for (unsigned it = first; is_met && it < end; it++) {
            if (block.fibers[it]->state == State::AT_WARP) block.fibers[it]->state = State::READY;
        }
        if (n_run == 0 && !is_met) return is_any;
    }
}

inline void run_block(unsigned number_of_block) {
    unsigned n = block.n_threads;
    while (block.fibers.size() < n) block.fibers.emplace_back(new Fiber);
    for (auto &given : block.given) given.assign(n, 0);
    for (unsigned number = 0; number < n; number++) {
        Fiber &fiber = *block.fibers[number];
        fiber.state = State::READY;
        fiber.number = number;
        fiber.n_shuffles = 0;
        fiber.index.x = number % blockDim.x;
        fiber.index.y = number / blockDim.x % blockDim.y;
        fiber.index.z = number / blockDim.x / blockDim.y;
    }
    unsigned n_warps = (n + LANES - 1) / LANES;
    for (;;) {
        bool is_any = false;
        for (unsigned it = 0; it < n_warps; it++) {
            is_any |= run_warp((number_of_block % 2 ? n_warps - 1 - it : it) * LANES);
        }
        unsigned n_at_block = 0, n_done = 0;
        for (unsigned it = 0; it < n; it++) {
            n_at_block += block.fibers[it]->state == State::AT_BLOCK;
            n_done += block.fibers[it]->state == State::DONE;
        }
        if (n_done == n) return;
        if (!is_any || n_at_block + n_done != n) {
            fprintf(stderr, "emulated kernel: some threads wait for others that never come\n");
            abort();
        }
        for (unsigned it = 0; it < n; it++) {
            if (block.fibers[it]->state == State::AT_BLOCK) block.fibers[it]->state = State::READY;
        }
    }
}

inline uint32_t exchange(uint32_t mine, unsigned partner) {
    Fiber *self = block.running;
    auto &given = block.given[self->n_shuffles++ % 2];
    given[self->number] = mine;
    wait(State::AT_WARP);
    return partner < block.n_threads ? given[partner] : mine;
}

} // namespace emulated

// Runs `kernel()` once for every thread of every block.
template <typename Kernel> void emulate(FakeDim grid, FakeDim block_size, Kernel kernel) {
    using emulated::block;
    gridDim = {grid.x, grid.y, grid.z};
    blockDim = {block_size.x, block_size.y, block_size.z};
    block.n_threads = block_size.x * block_size.y * block_size.z;
    block.argument = &kernel;
    block.body = [](void *argument) { (*static_cast<Kernel *>(argument))(); };
    for (unsigned z = 0; z < grid.z; z++) {
        for (unsigned y = 0; y < grid.y; y++) {
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx.x = x, blockIdx.y = y, blockIdx.z = z;
                emulated::run_block(x + y + z);
            }
        }
    }
}

// An array of a kernel: a copy with a page behind it that nobody may touch, so that a kernel that goes too far crashes. What
// was written comes to stand in the original when this goes. Long arrays are not copied: who measures a process over the fake
// driver does not want to find them in it.
template <typename T> class Guarded {
  public:
    Guarded(T *original, size_t n_elems) : original(original), len_bytes(n_elems * sizeof(T)) {
        copy = original;
        if (original == nullptr || len_bytes > MAX_BYTES) return;
        mapped_bytes = (len_bytes + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES + PAGE_BYTES;
        mapped = static_cast<char *>(
            mmap(nullptr, mapped_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        char *end = mapped + mapped_bytes - PAGE_BYTES;
        if (mapped == MAP_FAILED || mprotect(end, PAGE_BYTES, PROT_NONE) != 0) abort();
        copy = reinterpret_cast<T *>(end - len_bytes);
        memcpy(end - len_bytes, original, len_bytes);
    }
    ~Guarded() {
        if (mapped == nullptr) return;
        if constexpr (!std::is_const_v<T>) memcpy(original, copy, len_bytes);
        munmap(mapped, mapped_bytes);
    }
    Guarded(const Guarded &) = delete;
    operator T *() const { return copy; }

  private:
    static constexpr size_t PAGE_BYTES = 4096, MAX_BYTES = 1 << 20;
    T *original, *copy;
    size_t len_bytes, mapped_bytes = 0;
    char *mapped = nullptr;
};

inline void __syncthreads() { emulated::wait(emulated::State::AT_BLOCK); }

inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float __uint_as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline double __longlong_as_double(long long bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// The lanes of a warp swap values, each with the one whose number differs in the bits of `lanes`. All lanes take part.
inline float __shfl_xor_sync(unsigned, float mine, unsigned lanes) {
    unsigned partner = emulated::block.running->number ^ lanes;
    return __uint_as_float(emulated::exchange(__float_as_uint(mine), partner));
}

// The lanes of a warp take the value of the lane that many numbers above; the last ones keep theirs.
inline float __shfl_down_sync(unsigned, float mine, unsigned lanes) {
    unsigned number = emulated::block.running->number;
    bool is_inside = number % emulated::LANES + lanes < emulated::LANES;
    return __uint_as_float(emulated::exchange(__float_as_uint(mine), is_inside ? number + lanes : number));
}
