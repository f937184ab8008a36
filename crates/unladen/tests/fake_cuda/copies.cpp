// Copies, each with the timing that the driver documents for it.
//
//   host to device, from pinned memory     reads its source when it runs; the plain call waits for it
//   host to device, from pageable memory   a small one takes the bytes at once and runs later, also for the plain call; a large
//                                          one is done on return
//   device to host                         the plain call waits; the asynchronous one waits if the target is pageable
//   device to device                       runs later, also for the plain call
//
// A source that changes between the call and the copy is a violation, and the copy takes what is there then.
#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <memory>

#include "call.h"
#include "control.h"

namespace fake {
namespace {

constexpr uint64_t PIECE_BYTES = 256 << 10;
constexpr uint64_t MAX_PITCH_BYTES = INT32_MAX;
constexpr uint64_t MOST_STAGED_BYTES = 1 << 20;  // pageable memory that is taken at once

// A sum over bytes by eight; every piece but the last has a length of eights.
struct Sum {
    uint64_t value = 0x9e3779b97f4a7c15;

    void add(const char* bytes, uint64_t len_bytes) {
        for (uint64_t at = 0; at < len_bytes; at += 8) {
            uint64_t word = 0;
            std::memcpy(&word, bytes + at, std::min<uint64_t>(8, len_bytes - at));
            value = (value ^ word) * 0xff51afd7ed558ccd;
            value ^= value >> 29;
        }
    }
};

bool sum_of(uint64_t source, uint64_t len_bytes, uint64_t* sum) {
    std::vector<char> piece(std::min(len_bytes, PIECE_BYTES));
    Sum all;
    for (uint64_t at = 0; at < len_bytes; at += piece.size()) {
        const uint64_t n = std::min<uint64_t>(piece.size(), len_bytes - at);
        if (!host_read(piece.data(), source + at, n)) return false;
        all.add(piece.data(), n);
    }
    *sum = all.value;
    return true;
}

// Fills host memory that a copy is going to write.
bool poison_host(uint64_t target, uint64_t len_bytes) {
    const std::vector<unsigned char> piece(std::min(len_bytes, PIECE_BYTES), POISON);
    for (uint64_t at = 0; at < len_bytes; at += piece.size())
        if (!host_write(target + at, piece.data(), std::min<uint64_t>(piece.size(), len_bytes - at))) return false;
    return true;
}

CUresult memory_went(const char* which) {
    violation("the %s was gone when the copy ran", which);
    return CUDA_ERROR_ILLEGAL_ADDRESS;
}

// Reads the host's memory when the copy runs, and looks whether it is still what it was.
CUresult run_h2d(Lock& lock, uint64_t target, uint64_t source, uint64_t len_bytes, bool is_pinned, uint64_t sum_before) {
    const Allocation* memory = allocation_of(target, len_bytes);
    if (!memory) return memory_went("target");
    if (is_pinned && host_kind(source, len_bytes) != HostKind::pinned) return memory_went("registration of the source");
    const Gpu& gpu = world().gpus[memory->gpu];
    lock.unlock();
    std::vector<char> piece(std::min(len_bytes, PIECE_BYTES));
    Sum sum;
    bool is_readable = true;
    for (uint64_t at = 0; at < len_bytes && is_readable; at += piece.size()) {
        const uint64_t n = std::min<uint64_t>(piece.size(), len_bytes - at);
        is_readable = host_read(piece.data(), source + at, n);
        if (is_readable) device_write(gpu, target + at, piece.data(), n);
        sum.add(piece.data(), n);
    }
    lock.lock();
    if (!is_readable) return memory_went("source");
    if (sum.value != sum_before) violation("%" PRIu64 " bytes at %#" PRIx64 " changed between the call and the copy", len_bytes, source);
    return CUDA_SUCCESS;
}

CUresult run_staged(Lock& lock, uint64_t target, const std::vector<char>& bytes) {
    const Allocation* memory = allocation_of(target, bytes.size());
    if (!memory) return memory_went("target");
    const Gpu& gpu = world().gpus[memory->gpu];
    lock.unlock();
    device_write(gpu, target, bytes.data(), bytes.size());
    lock.lock();
    return CUDA_SUCCESS;
}

CUresult run_d2h(Lock& lock, uint64_t target, uint64_t source, uint64_t len_bytes, bool is_pinned) {
    const Allocation* memory = allocation_of(source, len_bytes);
    if (!memory) return memory_went("source");
    if (is_pinned && host_kind(target, len_bytes) != HostKind::pinned) return memory_went("registration of the target");
    const Gpu& gpu = world().gpus[memory->gpu];
    lock.unlock();
    const bool is_writable = device_read(gpu, source, pointer(target), len_bytes);
    lock.lock();
    return is_writable ? CUDA_SUCCESS : memory_went("target");
}

CUresult run_d2d(Lock& lock, uint64_t target, uint64_t source, uint64_t len_bytes) {
    const Allocation* to = allocation_of(target, len_bytes);
    const Allocation* from = allocation_of(source, len_bytes);
    if (!to || !from) return memory_went(to ? "source" : "target");
    const Gpu &target_gpu = world().gpus[to->gpu], &source_gpu = world().gpus[from->gpu];
    lock.unlock();
    std::vector<char> piece(std::min(len_bytes, PIECE_BYTES));
    for (uint64_t at = 0; at < len_bytes; at += piece.size()) {
        const uint64_t n = std::min<uint64_t>(piece.size(), len_bytes - at);
        device_read(source_gpu, source + at, piece.data(), n);
        device_write(target_gpu, target + at, piece.data(), n);
    }
    lock.lock();
    return CUDA_SUCCESS;
}

CUresult wait(Lock& lock, const Stream& stream, uint64_t op) {
    const Gpu& gpu = world().gpus[stream.gpu];
    wait_for_op(lock, op);
    return gpu.broken;
}

CUresult unreadable(uint64_t address, uint64_t len_bytes) {
    return misuse(CUDA_ERROR_INVALID_VALUE, "%" PRIu64 " bytes at %#" PRIx64 " are not all memory of this process", len_bytes, address);
}

CUresult straddles(uint64_t address, uint64_t len_bytes) {
    return misuse(CUDA_ERROR_INVALID_VALUE, "%" PRIu64 " bytes at %#" PRIx64 " are pinned in part", len_bytes, address);
}

CUresult no_memory(uint64_t address, uint64_t len_bytes) {
    return misuse(CUDA_ERROR_INVALID_VALUE, "%s", why_no_memory(address, len_bytes).c_str());
}

CUresult h2d(Lock& lock, Stream& stream, const char* call, uint64_t target, uint64_t source, uint64_t len_bytes, bool is_async) {
    if (len_bytes == 0) return CUDA_SUCCESS;
    if (!allocation_of(target, len_bytes)) return no_memory(target, len_bytes);
    const HostKind kind = host_kind(source, len_bytes);
    if (kind == HostKind::straddling) return straddles(source, len_bytes);
    const bool is_pinned = kind == HostKind::pinned;
    Counts& counts = world().counts;
    Op op;
    op.call = call;
    op.is_work = true;
    op.copy_bytes = len_bytes;
    op.device = {{target, len_bytes}};
    bool waits = !is_async;
    if (!is_pinned && len_bytes <= MOST_STAGED_BYTES) {
        const auto bytes = std::make_shared<std::vector<char>>(len_bytes);
        if (!host_read(bytes->data(), source, len_bytes)) return unreadable(source, len_bytes);
        op.run = [=](Lock& held) { return run_staged(held, target, *bytes); };
        waits = false;
    } else {
        uint64_t sum = 0;
        if (!sum_of(source, len_bytes, &sum)) return unreadable(source, len_bytes);
        op.run = [=](Lock& held) { return run_h2d(held, target, source, len_bytes, is_pinned, sum); };
        if (is_pinned)
            op.host = {source, len_bytes};
        else
            waits = true;
    }
    counts.h2d.add(len_bytes);
    if (is_async) (is_pinned ? counts.async_pinned : counts.async_pageable).add(len_bytes);
    const uint64_t id = submit(stream, std::move(op));
    return waits ? wait(lock, stream, id) : CUDA_SUCCESS;
}

// Lines of the host's memory, at equal distances there and on the GPU.
struct Lines {
    uint64_t target, target_step_bytes, source, source_step_bytes, line_bytes, n_lines;

    uint64_t source_line(uint64_t line) const { return source + line * source_step_bytes; }
    uint64_t target_line(uint64_t line) const { return target + line * target_step_bytes; }
    uint64_t source_span_bytes() const { return (n_lines - 1) * source_step_bytes + line_bytes; }
    uint64_t target_span_bytes() const { return (n_lines - 1) * target_step_bytes + line_bytes; }
};

bool read_lines(const Lines& lines, std::vector<char>* bytes) {
    bytes->resize(lines.n_lines * lines.line_bytes);
    for (uint64_t line = 0; line < lines.n_lines; ++line)
        if (!host_read(bytes->data() + line * lines.line_bytes, lines.source_line(line), lines.line_bytes)) return false;
    return true;
}

// Takes the host's bytes when the copy runs, unless they were taken at the call.
CUresult run_lines(Lock& lock, const Lines& lines, bool is_pinned, std::vector<char> bytes) {
    const Allocation* memory = allocation_of(lines.target, lines.target_span_bytes());
    if (!memory) return memory_went("target");
    if (is_pinned && host_kind(lines.source, lines.source_span_bytes()) != HostKind::pinned) return memory_went("registration of the source");
    const Gpu& gpu = world().gpus[memory->gpu];
    lock.unlock();
    std::vector<char> now;
    const bool is_readable = !is_pinned || read_lines(lines, &now);
    if (is_readable)
        for (uint64_t line = 0; line < lines.n_lines; ++line)
            device_write(gpu, lines.target_line(line), (is_pinned ? now : bytes).data() + line * lines.line_bytes, lines.line_bytes);
    lock.lock();
    if (!is_readable) return memory_went("source");
    if (is_pinned && now != bytes) violation("lines at %#" PRIx64 " changed between the call and the copy", lines.source);
    return CUDA_SUCCESS;
}

// A copy of lines does not care for the bytes between them, but they are memory too.
CUresult h2d_lines(Stream& stream, const char* call, const Lines& lines) {
    if (lines.n_lines == 0 || lines.line_bytes == 0) return CUDA_SUCCESS;
    if (lines.source_step_bytes < lines.line_bytes || lines.target_step_bytes < lines.line_bytes)
        return misuse(CUDA_ERROR_INVALID_VALUE, "lines of %" PRIu64 " bytes overlap", lines.line_bytes);
    if (lines.source_step_bytes > MAX_PITCH_BYTES || lines.target_step_bytes > MAX_PITCH_BYTES)
        return misuse(CUDA_ERROR_INVALID_VALUE, "lines are further apart than %" PRIu64 " bytes", MAX_PITCH_BYTES);
    if (!allocation_of(lines.target, lines.target_span_bytes())) return no_memory(lines.target, lines.target_span_bytes());
    const HostKind kind = host_kind(lines.source, lines.source_span_bytes());
    if (kind == HostKind::straddling) return straddles(lines.source, lines.source_span_bytes());
    const bool is_pinned = kind == HostKind::pinned;
    std::vector<char> bytes;
    if (!read_lines(lines, &bytes)) return unreadable(lines.source, lines.source_span_bytes());
    Counts& counts = world().counts;
    counts.h2d.add(bytes.size());
    (is_pinned ? counts.async_pinned : counts.async_pageable).add(bytes.size());
    Op op;
    op.call = call;
    op.is_work = true;
    op.copy_bytes = bytes.size();
    op.device = {{lines.target, lines.target_span_bytes()}};
    if (is_pinned) op.host = {lines.source, lines.source_span_bytes()};
    op.run = [lines, is_pinned, bytes = std::move(bytes)](Lock& held) { return run_lines(held, lines, is_pinned, bytes); };
    submit(stream, std::move(op));
    return CUDA_SUCCESS;
}

CUresult d2h(Lock& lock, Stream& stream, const char* call, uint64_t target, uint64_t source, uint64_t len_bytes, bool is_async) {
    if (len_bytes == 0) return CUDA_SUCCESS;
    if (!allocation_of(source, len_bytes)) return no_memory(source, len_bytes);
    const HostKind kind = host_kind(target, len_bytes);
    if (kind == HostKind::straddling) return straddles(target, len_bytes);
    const bool is_pinned = kind == HostKind::pinned;
    // Whoever looks too early sees nothing that he could take for the right bytes.
    if (!poison_host(target, len_bytes)) return unreadable(target, len_bytes);
    Counts& counts = world().counts;
    Op op;
    op.call = call;
    op.is_work = true;
    op.copy_bytes = len_bytes;
    op.device = {{source, len_bytes}};
    if (is_pinned) op.host = {target, len_bytes};
    op.run = [=](Lock& held) { return run_d2h(held, target, source, len_bytes, is_pinned); };
    counts.d2h.add(len_bytes);
    if (is_async) (is_pinned ? counts.async_pinned : counts.async_pageable).add(len_bytes);
    const uint64_t id = submit(stream, std::move(op));
    return is_async && is_pinned ? CUDA_SUCCESS : wait(lock, stream, id);
}

// Memory of two GPUs is fine: addresses are unified.
CUresult d2d(Stream& stream, const char* call, uint64_t target, uint64_t source, uint64_t len_bytes, std::vector<uint64_t> after, uint64_t* id) {
    if (len_bytes == 0) return CUDA_SUCCESS;
    const Allocation* to = allocation_of(target, len_bytes);
    if (!to) return no_memory(target, len_bytes);
    const Allocation* from = allocation_of(source, len_bytes);
    if (!from) return no_memory(source, len_bytes);
    if (Range{target, len_bytes}.meets(source, len_bytes))
        return misuse(CUDA_ERROR_INVALID_VALUE, "%" PRIu64 " bytes overlap, at %#" PRIx64 " and %#" PRIx64, len_bytes, source, target);
    Op op;
    op.call = call;
    op.is_work = true;
    op.copy_bytes = len_bytes;
    op.after = std::move(after);
    op.device = {{target, len_bytes}, {source, len_bytes}};
    op.run = [=](Lock& held) { return run_d2d(held, target, source, len_bytes); };
    (to->gpu == from->gpu ? world().counts.d2d : world().counts.between_gpus).add(len_bytes);
    *id = submit(stream, std::move(op));
    return CUDA_SUCCESS;
}

// Whether a range, if it is memory at all, is memory of the context that a peer copy names.
CUresult check_owner(CUcontext context, uint64_t address, uint64_t len_bytes) {
    const Gpu* gpu = gpu_of_context(context);
    if (!gpu || gpu->n_retained == 0) return misuse(CUDA_ERROR_INVALID_CONTEXT, "context %p is none of ours, or released", context);
    const Allocation* memory = allocation_of(address, len_bytes);
    if (memory && memory->gpu != gpu->ordinal)
        return misuse(CUDA_ERROR_INVALID_VALUE, "%#" PRIx64 " is memory of GPU %d, the context of GPU %d", address, memory->gpu, gpu->ordinal);
    return CUDA_SUCCESS;
}

CUresult check_owners(CUdeviceptr target, CUcontext target_context, CUdeviceptr source, CUcontext source_context, size_t len_bytes) {
    const CUresult result = check_owner(target_context, target, len_bytes);
    return result == CUDA_SUCCESS ? check_owner(source_context, source, len_bytes) : result;
}

}  // namespace
}  // namespace fake

using namespace fake;

// A copy may go by a stream of another context than the current one; a kernel may not.

CUDA_API CUresult cuMemcpyHtoD_v2(CUdeviceptr target, const void* source, size_t len_bytes) {
    const char* const name = __func__;
    return with_context(name, [&](Lock& lock, Gpu& gpu) { return h2d(lock, null_stream(gpu), name, target, number(source), len_bytes, false); });
}

CUDA_API CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr target, const void* source, size_t len_bytes, CUstream handle) {
    const char* const name = __func__;
    return with_context(name, [&](Lock& lock, Gpu& gpu) {
        CUresult error = CUDA_SUCCESS;
        Stream* stream = stream_of(handle, gpu, &error);
        return stream ? h2d(lock, *stream, name, target, number(source), len_bytes, true) : error;
    });
}

// From the host to a GPU only.
CUDA_API CUresult cuMemcpy2DAsync_v2(const CUDA_MEMCPY2D* copy, CUstream handle) {
    const char* const name = __func__;
    return with_context(name, [&](Lock&, Gpu& gpu) -> CUresult {
        if (!copy || copy->srcMemoryType != CU_MEMORYTYPE_HOST || copy->dstMemoryType != CU_MEMORYTYPE_DEVICE)
            return misuse(CUDA_ERROR_INVALID_VALUE, "lines are copied from the host to a GPU here");
        const Lines lines{
            copy->dstDevice + copy->dstY * copy->dstPitch + copy->dstXInBytes, copy->dstPitch,
            number(copy->srcHost) + copy->srcY * copy->srcPitch + copy->srcXInBytes, copy->srcPitch,
            copy->WidthInBytes, copy->Height,
        };
        CUresult error = CUDA_SUCCESS;
        Stream* stream = stream_of(handle, gpu, &error);
        return stream ? h2d_lines(*stream, name, lines) : error;
    });
}

CUDA_API CUresult cuMemcpyDtoH_v2(void* target, CUdeviceptr source, size_t len_bytes) {
    const char* const name = __func__;
    return with_context(name, [&](Lock& lock, Gpu& gpu) { return d2h(lock, null_stream(gpu), name, number(target), source, len_bytes, false); });
}

CUDA_API CUresult cuMemcpyDtoHAsync_v2(void* target, CUdeviceptr source, size_t len_bytes, CUstream handle) {
    const char* const name = __func__;
    return with_context(name, [&](Lock& lock, Gpu& gpu) {
        CUresult error = CUDA_SUCCESS;
        Stream* stream = stream_of(handle, gpu, &error);
        return stream ? d2h(lock, *stream, name, number(target), source, len_bytes, true) : error;
    });
}

CUDA_API CUresult cuMemcpyDtoD_v2(CUdeviceptr target, CUdeviceptr source, size_t len_bytes) {
    const char* const name = __func__;
    return with_context(name, [&](Lock&, Gpu& gpu) {
        uint64_t id = 0;
        return d2d(null_stream(gpu), name, target, source, len_bytes, {}, &id);
    });
}

CUDA_API CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr target, CUdeviceptr source, size_t len_bytes, CUstream handle) {
    const char* const name = __func__;
    return with_context(name, [&](Lock&, Gpu& gpu) {
        CUresult error = CUDA_SUCCESS;
        uint64_t id = 0;
        Stream* stream = stream_of(handle, gpu, &error);
        return stream ? d2d(*stream, name, target, source, len_bytes, {}, &id) : error;
    });
}

// Runs later, between all that its three contexts were given before and all that they are given afterwards.
CUDA_API CUresult cuMemcpyPeer(CUdeviceptr target, CUcontext target_context, CUdeviceptr source, CUcontext source_context, size_t len_bytes) {
    const char* const name = __func__;
    return with_context(name, [&](Lock&, Gpu& gpu) -> CUresult {
        const CUresult result = check_owners(target, target_context, source, source_context, len_bytes);
        if (result != CUDA_SUCCESS) return result;
        Gpu* const gpus[] = {&gpu, gpu_of_context(target_context), gpu_of_context(source_context)};
        std::vector<uint64_t> after;
        for (const Gpu* it : gpus)
            for (const auto& stream : it->streams) after.push_back(stream->last_op);
        uint64_t id = 0;
        const CUresult copied = d2d(null_stream(gpu), name, target, source, len_bytes, after, &id);
        if (id != 0)
            for (Gpu* it : gpus) it->barrier_op = id;
        return copied;
    });
}

CUDA_API CUresult cuMemcpyPeerAsync(CUdeviceptr target, CUcontext target_context, CUdeviceptr source, CUcontext source_context, size_t len_bytes,
                                    CUstream handle) {
    const char* const name = __func__;
    return with_context(name, [&](Lock&, Gpu& gpu) -> CUresult {
        const CUresult result = check_owners(target, target_context, source, source_context, len_bytes);
        if (result != CUDA_SUCCESS) return result;
        CUresult error = CUDA_SUCCESS;
        uint64_t id = 0;
        Stream* stream = stream_of(handle, gpu, &error);
        return stream ? d2d(*stream, name, target, source, len_bytes, {}, &id) : error;
    });
}
