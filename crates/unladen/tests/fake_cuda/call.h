// What every driver function does first and last: count the call, fail when told to, look for cuInit and a current context, and
// bring the report up to date.
#pragma once

#include "world.h"

namespace fake {

enum class Needs { nothing, init, context };

// Returns an error when the call ends here. *gpu: the current context's GPU, where one is needed.
CUresult begin_call(const char* name, Needs needs, Gpu** gpu);
void end_call(const char* name);
// In a child of fork() that did not exec, the driver is of no use: no lock may be taken there.
bool is_forked_child();

// What violations of this thread are said to come from; a stream's thread names the call that queued the work.
void name_call(const char* name);
// True inside a call of the program's; a stream's thread is in none between its pieces of work.
bool is_in_call();
// Writes down what a right program would never do.
void violation(const char* format, ...) __attribute__((format(printf, 1, 2)));
// The same, for a call that fails for it.
CUresult misuse(CUresult error, const char* format, ...) __attribute__((format(printf, 2, 3)));

template <class Body>
CUresult with_nothing(const char* name, Body body) {
    if (is_forked_child()) return CUDA_ERROR_NOT_INITIALIZED;
    Lock lock(world().lock);
    CUresult result = begin_call(name, Needs::nothing, nullptr);
    if (result == CUDA_SUCCESS) result = body(lock);
    end_call(name);
    return result;
}

template <class Body>
CUresult with_init(const char* name, Body body) {
    if (is_forked_child()) return CUDA_ERROR_NOT_INITIALIZED;
    Lock lock(world().lock);
    CUresult result = begin_call(name, Needs::init, nullptr);
    if (result == CUDA_SUCCESS) result = body(lock);
    end_call(name);
    return result;
}

template <class Body>
CUresult with_context(const char* name, Body body) {
    if (is_forked_child()) return CUDA_ERROR_NOT_INITIALIZED;
    Lock lock(world().lock);
    Gpu* gpu = nullptr;
    CUresult result = begin_call(name, Needs::context, &gpu);
    if (result == CUDA_SUCCESS) result = body(lock, *gpu);
    end_call(name);
    return result;
}

}  // namespace fake
