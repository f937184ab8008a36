// The calls for device memory: allocate, free, ask, fill.
#include <algorithm>
#include <cinttypes>
#include <cstring>

#include "call.h"
#include "control.h"
#include "report.h"

namespace fake {
namespace {

bool touches(const Op& op, const Range& range) {
    return std::any_of(op.device.begin(), op.device.end(), [&](const Range& it) { return range.meets(it.start, it.len_bytes); });
}

CUresult fill(Lock&, Stream& stream, const char* call, CUdeviceptr target, unsigned char byte, size_t len_bytes) {
    if (len_bytes == 0) return CUDA_SUCCESS;
    const Allocation* memory = allocation_of(target, len_bytes);
    if (!memory) return misuse(CUDA_ERROR_INVALID_VALUE, "%s", why_no_memory(target, len_bytes).c_str());
    Op op;
    op.call = call;
    op.is_work = true;
    op.device = {{target, len_bytes}};
    const int gpu = memory->gpu;
    op.run = [=](Lock& lock) {
        lock.unlock();
        device_fill(world().gpus[gpu], target, byte, len_bytes);
        lock.lock();
        return CUDA_SUCCESS;
    };
    world().counts.fills.add(len_bytes);
    submit(stream, std::move(op));
    return CUDA_SUCCESS;
}

}  // namespace
}  // namespace fake

using namespace fake;

CUDA_API CUresult cuMemGetInfo_v2(size_t* free, size_t* total) {
    return with_context(__func__, [&](Lock&, Gpu& gpu) -> CUresult {
        if (!free || !total) return misuse(CUDA_ERROR_INVALID_VALUE, "nowhere to put the figures");
        *free = free_bytes(gpu);
        *total = gpu.total_bytes;
        return CUDA_SUCCESS;
    });
}

CUDA_API CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t len_bytes) {
    return with_context(__func__, [&](Lock& lock, Gpu& gpu) -> CUresult {
        if (!address) return misuse(CUDA_ERROR_INVALID_VALUE, "nowhere to put the address");
        if (len_bytes == 0) return misuse(CUDA_ERROR_INVALID_VALUE, "an allocation of 0 bytes");
        uint64_t found = 0;
        if (!allocate(gpu, len_bytes, &found)) return CUDA_ERROR_OUT_OF_MEMORY;
        if (settings().poisons) {
            // Nobody knows the address yet, and gigabytes take a while.
            lock.unlock();
            device_fill(gpu, found, POISON, len_bytes);
            lock.lock();
        }
        *address = found;
        return CUDA_SUCCESS;
    });
}

CUDA_API CUresult cuMemFree_v2(CUdeviceptr address) {
    return with_context(__func__, [&](Lock& lock, Gpu&) -> CUresult {
        World& w = world();
        const auto it = w.memory.find(address);
        if (it == w.memory.end()) {
            const char* why = w.freed.count(address) ? "was freed before" : allocation_of(address, 0) ? "lies in an allocation" : "is no device memory";
            return misuse(CUDA_ERROR_INVALID_VALUE, "no allocation begins at %#" PRIx64 ", which %s", address, why);
        }
        const Range range = it->second.range;
        const int gpu = it->second.gpu;
        bool has_waited = false;
        for (const auto& op : w.pending) has_waited |= touches(*op.second, range);
        w.counts.frees_that_waited += has_waited;
        if (has_waited) write_report();  // the count, before anything is waited for
        // The driver waits for its own context, and knows nothing of the others.
        wait_for_context(lock, w.gpus[gpu]);
        std::vector<uint64_t> strays;
        for (const auto& op : w.pending)
            if (touches(*op.second, range)) strays.push_back(op.first);
        if (!strays.empty()) violation("memory of GPU %d was freed while %zu copies of another context used it", gpu, strays.size());
        for (uint64_t op : strays) wait_for_op(lock, op);
        const auto still = w.memory.find(address);
        if (still == w.memory.end()) return misuse(CUDA_ERROR_INVALID_VALUE, "two threads freed the same memory at once");
        release(still);
        return CUDA_SUCCESS;
    });
}

// Filling returns before it is done, like the driver's.
CUDA_API CUresult cuMemsetD8_v2(CUdeviceptr target, unsigned char byte, size_t len_bytes) {
    const char* const name = __func__;
    return with_context(name, [&](Lock& lock, Gpu& gpu) -> CUresult { return fill(lock, null_stream(gpu), name, target, byte, len_bytes); });
}

CUDA_API CUresult cuMemsetD8Async(CUdeviceptr target, unsigned char byte, size_t len_bytes, CUstream handle) {
    const char* const name = __func__;
    return with_context(name, [&](Lock& lock, Gpu& gpu) -> CUresult {
        CUresult error = CUDA_SUCCESS;
        Stream* stream = stream_of(handle, gpu, &error);
        return stream ? fill(lock, *stream, name, target, byte, len_bytes) : error;
    });
}

// A pointer that is no memory of the driver's is a question with the answer "invalid", and no violation.
CUDA_API CUresult cuPointerGetAttribute(void* data, int which, CUdeviceptr address) {
    return with_init(__func__, [&](Lock&) -> CUresult {
        if (!data) return misuse(CUDA_ERROR_INVALID_VALUE, "nowhere to put the attribute");
        World& w = world();
        const Allocation* memory = allocation_of(address, 1);
        const Pinned* pinned = nullptr;
        for (const auto& it : w.pinned)
            if (it.second.range.holds(address, 1)) pinned = &it.second;
        if (!memory && !pinned) return CUDA_ERROR_INVALID_VALUE;
        const int gpu = memory ? memory->gpu : pinned->gpu;
        const Range range = memory ? memory->range : pinned->range;
        const auto put = [&](auto value) {
            std::memcpy(data, &value, sizeof value);
            return CUDA_SUCCESS;
        };
        switch (which) {
            case 1: return put(context_handle(w.gpus[gpu]));            // CONTEXT
            case 2: return put(memory ? 2u : 1u);                       // MEMORY_TYPE: device or host
            case 3: return put(address);                                // DEVICE_POINTER
            case 4: return memory ? CUDA_ERROR_INVALID_VALUE : put(address);  // HOST_POINTER
            case 8: return put(false);                                  // IS_MANAGED
            case 9: return put(gpu);                                    // DEVICE_ORDINAL
            case 11: return put(range.start);                           // RANGE_START_ADDR
            case 12: return put(size_t(range.len_bytes));               // RANGE_SIZE
            case 13: return put(true);                                  // MAPPED
            default: return misuse(CUDA_ERROR_INVALID_VALUE, "the fake has no pointer attribute %d", which);
        }
    });
}
