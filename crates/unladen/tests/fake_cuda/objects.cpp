// Handles, contexts, and the stack of current contexts that each thread has.
#include <cinttypes>
#include <cstdio>

#include "call.h"
#include "control.h"

namespace fake {
namespace {

// No user address has these bits, on any machine with 48 bits or fewer of them; a handle is never followed by the fake itself.
constexpr uint64_t FIRST_HANDLE = 0x00e0'0000'0000'0000;
constexpr uint64_t FIRST_CONTEXT = 0x00c0'0000'0000'0000;

// Ordinals of GPUs, the current one last.
thread_local std::vector<int> current;

}  // namespace

void* new_handle() {
    World& w = world();
    w.last_handle += 1;
    return pointer(FIRST_HANDLE + 16 * w.last_handle);
}

std::string describe(const char* kind, const void* handle) {
    const auto gone = world().gone.find(number(handle));
    char text[96];
    if (gone != world().gone.end())
        std::snprintf(text, sizeof text, "%s %p is a %s that was destroyed", kind, handle, gone->second);
    else
        std::snprintf(text, sizeof text, "%s %p is none of ours", kind, handle);
    return text;
}

CUcontext context_handle(const Gpu& gpu) { return pointer(FIRST_CONTEXT + 16 * (uint64_t(gpu.ordinal) + 1)); }

Gpu* gpu_of_context(CUcontext handle) {
    for (Gpu& gpu : world().gpus)
        if (context_handle(gpu) == handle) return &gpu;
    return nullptr;
}

Gpu* current_gpu() { return current.empty() ? nullptr : &world().gpus[current.back()]; }

Stream* stream_of(CUstream handle, Gpu& current_context, CUresult* error) {
    // 1 is CU_STREAM_LEGACY, the null stream by another name; 2 is CU_STREAM_PER_THREAD.
    if (number(handle) <= 1) return &null_stream(current_context);
    if (number(handle) == 2) {
        *error = misuse(CUDA_ERROR_NOT_SUPPORTED, "the fake has no per-thread default stream");
        return nullptr;
    }
    const auto it = world().streams.find(number(handle));
    if (it != world().streams.end()) {
        *error = world().gpus[it->second->gpu].broken;
        return *error == CUDA_SUCCESS ? it->second.get() : nullptr;
    }
    *error = misuse(CUDA_ERROR_INVALID_HANDLE, "%s", describe("stream", handle).c_str());
    return nullptr;
}

namespace {

// Removes from a table what belongs to a GPU, and counts it.
template <class Table, class IsOurs>
void sweep(Table& table, const char* kind, IsOurs is_ours, std::string* left) {
    World& w = world();
    uint64_t n = 0;
    for (auto it = table.begin(); it != table.end();) {
        if (!is_ours(it->second)) {
            ++it;
            continue;
        }
        w.gone[it->first] = kind;
        it = table.erase(it);
        n += 1;
    }
    if (n == 0) return;
    w.counts.left_in_contexts[kind] += n;
    *left += (left->empty() ? "" : ", ") + std::to_string(n) + " of kind " + kind;
}

}  // namespace

void reset_context(Lock& lock, Gpu& gpu) {
    World& w = world();
    wait_for_context(lock, gpu);
    const int ordinal = gpu.ordinal;
    std::string left;
    uint64_t n_memory = 0;
    for (auto it = w.memory.begin(); it != w.memory.end();) {
        auto here = it++;
        if (here->second.gpu != ordinal) continue;
        release(here);
        n_memory += 1;
    }
    if (n_memory > 0) {
        w.counts.left_in_contexts["memory"] += n_memory;
        left = std::to_string(n_memory) + " of kind memory";
    }
    for (auto& it : w.streams)
        if (it.second->gpu == ordinal) it.second->is_closing = true;
    sweep(w.streams, "stream", [&](const std::shared_ptr<Stream>& it) { return it->gpu == ordinal; }, &left);
    sweep(w.events, "event", [&](const Event& it) { return it.gpu == ordinal; }, &left);
    for (auto it = w.functions.begin(); it != w.functions.end();)
        it = w.modules.at(it->second.module).gpu == ordinal ? w.functions.erase(it) : std::next(it);
    sweep(w.modules, "module", [&](const Module& it) { return it.gpu == ordinal; }, &left);
    for (const auto& it : w.pinned)
        if (it.second.gpu == ordinal) w.counts.pinned_bytes -= it.second.range.len_bytes;
    sweep(w.pinned, "pinned host memory", [&](const Pinned& it) { return it.gpu == ordinal; }, &left);
    if (gpu.null_stream) gpu.null_stream->is_closing = true;
    gpu.null_stream = nullptr;
    gpu.broken = CUDA_SUCCESS;
    gpu.context_bytes = 0;
    w.changed.notify_all();
    if (!left.empty()) violation("the context of GPU %d was released while it held %s", ordinal, left.c_str());
}

namespace {

// The GPU whose live context has this handle, or null with the error set.
Gpu* live_context(CUcontext handle, CUresult* error) {
    Gpu* gpu = gpu_of_context(handle);
    if (gpu && gpu->n_retained > 0) return gpu;
    if (gpu)
        *error = misuse(CUDA_ERROR_INVALID_CONTEXT, "the context of GPU %d is not retained", gpu->ordinal);
    else
        *error = misuse(CUDA_ERROR_INVALID_CONTEXT, "context %p is none of ours", handle);
    return nullptr;
}

}  // namespace
}  // namespace fake

using namespace fake;

CUDA_API CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    return with_init(__func__, [&](Lock&) -> CUresult {
        if (!context) return misuse(CUDA_ERROR_INVALID_VALUE, "nowhere to put the context");
        if (device < 0 || size_t(device) >= world().gpus.size()) return CUDA_ERROR_INVALID_DEVICE;
        Gpu& gpu = world().gpus[device];
        if (gpu.n_retained == 0) {
            if (free_bytes(gpu) < settings().context_bytes) return CUDA_ERROR_OUT_OF_MEMORY;
            gpu.context_bytes = settings().context_bytes;
        }
        gpu.n_retained += 1;
        *context = context_handle(gpu);
        return CUDA_SUCCESS;
    });
}

CUDA_API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    return with_init(__func__, [&](Lock& lock) -> CUresult {
        if (device < 0 || size_t(device) >= world().gpus.size()) return CUDA_ERROR_INVALID_DEVICE;
        Gpu& gpu = world().gpus[device];
        if (gpu.n_retained == 0) return misuse(CUDA_ERROR_INVALID_CONTEXT, "the context of GPU %d is not retained", device);
        gpu.n_retained -= 1;
        if (gpu.n_retained == 0) reset_context(lock, gpu);
        return CUDA_SUCCESS;
    });
}

CUDA_API CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* is_active) {
    return with_init(__func__, [&](Lock&) -> CUresult {
        if (!flags || !is_active) return misuse(CUDA_ERROR_INVALID_VALUE, "nowhere to put the state");
        if (device < 0 || size_t(device) >= world().gpus.size()) return CUDA_ERROR_INVALID_DEVICE;
        *flags = 0;
        *is_active = world().gpus[device].n_retained > 0;
        return CUDA_SUCCESS;
    });
}

CUDA_API CUresult cuCtxPushCurrent_v2(CUcontext context) {
    return with_init(__func__, [&](Lock&) -> CUresult {
        CUresult error = CUDA_SUCCESS;
        if (const Gpu* gpu = live_context(context, &error)) current.push_back(gpu->ordinal);
        return error;
    });
}

CUDA_API CUresult cuCtxPopCurrent_v2(CUcontext* context) {
    return with_init(__func__, [&](Lock&) -> CUresult {
        const Gpu* gpu = current_gpu();
        if (!gpu) return misuse(CUDA_ERROR_INVALID_CONTEXT, "no context is current to this thread");
        if (context) *context = context_handle(*gpu);
        current.pop_back();
        return CUDA_SUCCESS;
    });
}

CUDA_API CUresult cuCtxGetCurrent(CUcontext* context) {
    return with_init(__func__, [&](Lock&) -> CUresult {
        if (!context) return misuse(CUDA_ERROR_INVALID_VALUE, "nowhere to put the context");
        const Gpu* gpu = current_gpu();
        *context = gpu ? context_handle(*gpu) : nullptr;
        return CUDA_SUCCESS;
    });
}

CUDA_API CUresult cuCtxSetCurrent(CUcontext context) {
    return with_init(__func__, [&](Lock&) -> CUresult {
        CUresult error = CUDA_SUCCESS;
        const Gpu* gpu = context ? live_context(context, &error) : nullptr;
        if (error != CUDA_SUCCESS) return error;
        // It replaces the top of the stack, and null takes the top away.
        if (!current.empty()) current.pop_back();
        if (gpu) current.push_back(gpu->ordinal);
        return CUDA_SUCCESS;
    });
}

CUDA_API CUresult cuCtxGetDevice(CUdevice* device) {
    return with_context(__func__, [&](Lock&, Gpu& gpu) -> CUresult {
        if (!device) return misuse(CUDA_ERROR_INVALID_VALUE, "nowhere to put the device");
        *device = gpu.ordinal;
        return CUDA_SUCCESS;
    });
}

CUDA_API CUresult cuCtxSynchronize() {
    return with_context(__func__, [&](Lock& lock, Gpu& gpu) -> CUresult {
        wait_for_context(lock, gpu);
        return gpu.broken;
    });
}
