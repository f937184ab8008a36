// Runs the source of CUDA kernels on the host: include this, then the source, and have what is
// registered as a `fake_kernel` call `emulate`.
//
// Every thread of a block is a fiber, and blocks run one after the other. A fiber runs until it waits for its block
// (`__syncthreads`) or its warp (a shuffle), and goes on when all others have come there. A kernel in which some threads
// wait for what others never reach ends the process with a message. Fibers take turns from the first to the last and back:
// a kernel that leaves out a wait gives other numbers.
#pragma once

#undef _FORTIFY_SOURCE // it takes a jump to another stack for a mistake

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
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

enum { LANES = 32, STACK_BYTES = 64 << 10 };

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

// Lets those go on who wait for their warp or their block, where everyone has come who is still there.
inline bool release() {
    bool is_any = false;
    auto release_range = [&](unsigned first, unsigned end, State state) {
        unsigned n_waiting = 0, n_done = 0;
        for (unsigned it = first; it < end; it++) {
            n_waiting += block.fibers[it]->state == state;
            n_done += block.fibers[it]->state == State::DONE;
        }
        if (n_waiting == 0 || n_waiting + n_done < end - first) return;
        is_any = true;
        for (unsigned it = first; it < end; it++) {
            if (block.fibers[it]->state == state) block.fibers[it]->state = State::READY;
        }
    };
    for (unsigned first = 0; first < block.n_threads; first += LANES) {
        unsigned end = first + LANES < block.n_threads ? first + LANES : block.n_threads;
        release_range(first, end, State::AT_WARP);
    }
    release_range(0, block.n_threads, State::AT_BLOCK);
    return is_any;
}

inline void run_block() {
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
    for (unsigned turn = 0;; turn++) {
        for (unsigned it = 0; it < n; it++) {
            Fiber &fiber = *block.fibers[turn % 2 ? n - 1 - it : it];
            if (fiber.state == State::READY) resume(&fiber);
        }
        bool is_all_done = true;
        for (unsigned it = 0; it < n; it++) is_all_done &= block.fibers[it]->state == State::DONE;
        if (is_all_done) return;
        if (!release()) {
            fprintf(stderr, "emulated kernel: some threads wait for others that never come\n");
            abort();
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
                emulated::run_block();
            }
        }
    }
}

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
