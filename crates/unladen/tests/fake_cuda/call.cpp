// The beginning and the end of every call, and the list of violations.
#include "call.h"

#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "control.h"
#include "errors.h"
#include "report.h"

namespace fake {
namespace {

constexpr size_t MOST_VIOLATIONS = 1000;

thread_local const char* this_call = nullptr;

const pid_t process_at_load = getpid();

// Calls made so often that a report after each would be all that the process does; the next other call brings it up to date.
const char* const UNREPORTED[] = {
    "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", "cuCtxGetCurrent",      "cuCtxSetCurrent", "cuCtxGetDevice",
    "cuEventQuery",        "cuStreamQuery",      "cuDeviceGetAttribute", "cuPointerGetAttribute",
};

bool is_unreported(const char* name) {
    for (const char* it : UNREPORTED)
        if (std::strcmp(it, name) == 0) return true;
    return false;
}

void note(const char* result, const char* format, va_list words) {
    char text[512];
    std::vsnprintf(text, sizeof text, format, words);
    auto& violations = world().counts.violations;
    if (violations.size() >= MOST_VIOLATIONS) return;
    std::string line = this_call ? std::string(this_call) + ": " : std::string();
    if (result) line += std::string(result) + ": ";
    violations.push_back(line + text);
    write_report();
}

}  // namespace

World& world() {
    static World* const the_world = new World;
    return *the_world;
}

bool is_forked_child() { return getpid() != process_at_load; }

CUresult begin_call(const char* name, Needs needs, Gpu** gpu) {
    this_call = name;
    World& w = world();
    w.counts.calls[name] += 1;
    refresh_settings();
    CUresult error = CUDA_SUCCESS;
    if (is_told_to_fail(name, &error)) {
        w.counts.told_to_fail[name] += 1;
        return error;
    }
    if (needs == Needs::nothing) return CUDA_SUCCESS;
    if (!w.is_initialised) return misuse(CUDA_ERROR_NOT_INITIALIZED, "cuInit was not called");
    if (needs == Needs::init) return CUDA_SUCCESS;
    *gpu = current_gpu();
    if (!*gpu) return misuse(CUDA_ERROR_INVALID_CONTEXT, "no context is current to this thread");
    if ((*gpu)->n_retained == 0)
        return misuse(CUDA_ERROR_CONTEXT_IS_DESTROYED, "the context of GPU %d is current to this thread, but it was released", (*gpu)->ordinal);
    return (*gpu)->broken;
}

void end_call(const char* name) {
    if (!is_unreported(name)) write_report();
    this_call = nullptr;
}

void name_call(const char* name) { this_call = name; }

bool is_in_call() { return this_call != nullptr; }

void violation(const char* format, ...) {
    va_list words;
    va_start(words, format);
    note(nullptr, format, words);
    va_end(words);
}

CUresult misuse(CUresult error, const char* format, ...) {
    va_list words;
    va_start(words, format);
    note(error_name(error), format, words);
    va_end(words);
    return error;
}

}  // namespace fake
