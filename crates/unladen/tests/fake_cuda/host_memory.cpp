// Pinned host memory, and copies out of host memory that may not be there.
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstring>

#include "call.h"
#include "control.h"

namespace fake {
namespace {

// One direction of process_vm_readv/writev on this process: a copy that comes back with an error where a plain one would crash.
template <class Syscall>
bool careful_copy(Syscall syscall, void* own, uint64_t other, uint64_t len_bytes, bool* is_forbidden) {
    char* at = static_cast<char*>(own);
    while (len_bytes > 0) {
        iovec local = {at, size_t(len_bytes)}, remote = {pointer(other), size_t(len_bytes)};
        const ssize_t n = syscall(getpid(), &local, 1, &remote, 1, 0);
        if (n < 0 && errno == EINTR) continue;
        // Some sandboxes forbid the call altogether.
        *is_forbidden = n < 0 && errno != EFAULT;
        if (n <= 0) return false;
        at += n, other += uint64_t(n), len_bytes -= uint64_t(n);
    }
    return true;
}

// mincore() fails where nothing is mapped.
bool is_mapped(uint64_t address, uint64_t len_bytes) {
    constexpr uint64_t PIECE_PAGES = 4096;
    const uint64_t page_bytes = uint64_t(sysconf(_SC_PAGESIZE));
    if (len_bytes > UINT64_MAX - address) return false;
    std::vector<unsigned char> answers(PIECE_PAGES);
    for (uint64_t at = address / page_bytes * page_bytes; at < address + len_bytes; at += PIECE_PAGES * page_bytes)
        if (mincore(pointer(at), size_t(std::min(address + len_bytes - at, PIECE_PAGES * page_bytes)), answers.data()) != 0) return false;
    return true;
}

CUresult pin(uint64_t address, uint64_t len_bytes, const Gpu& gpu, bool is_allocated) {
    World& w = world();
    Counts& counts = w.counts;
    if (len_bytes > settings().pinnable_bytes || counts.pinned_bytes > settings().pinnable_bytes - len_bytes) return CUDA_ERROR_OUT_OF_MEMORY;
    w.pinned[address] = {gpu.ordinal, {address, len_bytes}, is_allocated};
    counts.pinned_bytes += len_bytes;
    counts.peak_pinned_bytes = std::max(counts.peak_pinned_bytes, counts.pinned_bytes);
    return CUDA_SUCCESS;
}

std::vector<uint64_t> ops_on_host_range(const Range& range) {
    std::vector<uint64_t> found;
    for (const auto& it : world().pending)
        if (range.meets(it.second->host.start, it.second->host.len_bytes)) found.push_back(it.first);
    return found;
}

void unpin(std::map<uint64_t, Pinned>::iterator it) {
    world().counts.pinned_bytes -= it->second.range.len_bytes;
    world().pinned.erase(it);
}

}  // namespace

bool host_read(void* target, uint64_t source, uint64_t len_bytes) {
    bool is_forbidden = false;
    if (careful_copy(process_vm_readv, target, source, len_bytes, &is_forbidden)) return true;
    if (is_forbidden) std::memcpy(target, pointer(source), len_bytes);
    return is_forbidden;
}

bool host_write(uint64_t target, const void* source, uint64_t len_bytes) {
    bool is_forbidden = false;
    if (careful_copy(process_vm_writev, const_cast<void*>(source), target, len_bytes, &is_forbidden)) return true;
    if (is_forbidden) std::memcpy(pointer(target), source, len_bytes);
    return is_forbidden;
}

HostKind host_kind(uint64_t address, uint64_t len_bytes) {
    bool meets = false;
    for (const auto& it : world().pinned) {
        if (it.second.range.holds(address, len_bytes)) return HostKind::pinned;
        meets |= it.second.range.meets(address, len_bytes);
    }
    return meets ? HostKind::straddling : HostKind::pageable;
}

}  // namespace fake

using namespace fake;

// With unified addressing, what one context pinned is pinned for all of them, whatever the flags say.
CUDA_API CUresult cuMemHostRegister_v2(void* start, size_t len_bytes, unsigned flags) {
    return with_context(__func__, [&](Lock&, Gpu& gpu) -> CUresult {
        if (!start || len_bytes == 0) return misuse(CUDA_ERROR_INVALID_VALUE, "%zu bytes at %p", len_bytes, start);
        if (flags & ~0xfu) return misuse(CUDA_ERROR_INVALID_VALUE, "unknown flags in %#x", flags);
        if (flags & 8) return CUDA_ERROR_NOT_SUPPORTED;  // CU_MEMHOSTREGISTER_READ_ONLY; attribute 113 says so
        if (!is_mapped(number(start), len_bytes)) return misuse(CUDA_ERROR_INVALID_VALUE, "%zu bytes at %p are not all mapped", len_bytes, start);
        if (host_kind(number(start), len_bytes) != HostKind::pageable)
            return misuse(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "%zu bytes at %p, or some of them, are pinned already", len_bytes, start);
        return pin(number(start), len_bytes, gpu, false);
    });
}

CUDA_API CUresult cuMemHostUnregister(void* start) {
    return with_context(__func__, [&](Lock&, Gpu&) -> CUresult {
        if (!start) return misuse(CUDA_ERROR_INVALID_VALUE, "no address");
        const auto it = world().pinned.find(number(start));
        if (it == world().pinned.end() || it->second.is_allocated)
            return misuse(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "no registration begins at %p", start);
        // Not refused: the copies that still want the memory find it gone, which breaks their context.
        const size_t n = ops_on_host_range(it->second.range).size();
        if (n > 0) violation("%" PRIu64 " bytes at %p were unregistered while %zu copies used them", it->second.range.len_bytes, start, n);
        unpin(it);
        return CUDA_SUCCESS;
    });
}

CUDA_API CUresult cuMemHostAlloc(void** start, size_t len_bytes, unsigned flags) {
    return with_context(__func__, [&](Lock&, Gpu& gpu) -> CUresult {
        if (!start) return misuse(CUDA_ERROR_INVALID_VALUE, "nowhere to put the address");
        if (len_bytes == 0) return misuse(CUDA_ERROR_INVALID_VALUE, "an allocation of 0 bytes");
        if (flags & ~0x7u) return misuse(CUDA_ERROR_INVALID_VALUE, "unknown flags in %#x", flags);
        void* at = mmap(nullptr, len_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
        const CUresult result = pin(number(at), len_bytes, gpu, true);
        if (result != CUDA_SUCCESS) {
            munmap(at, len_bytes);
            return result;
        }
        std::memset(at, POISON, len_bytes);
        *start = at;
        return CUDA_SUCCESS;
    });
}

CUDA_API CUresult cuMemFreeHost(void* start) {
    return with_context(__func__, [&](Lock& lock, Gpu&) -> CUresult {
        World& w = world();
        const auto it = w.pinned.find(number(start));
        if (it == w.pinned.end() || !it->second.is_allocated)
            return misuse(CUDA_ERROR_INVALID_VALUE, "no memory of cuMemHostAlloc begins at %p", start);
        const Range range = it->second.range;
        const std::vector<uint64_t> users = ops_on_host_range(range);
        if (!users.empty()) violation("%" PRIu64 " bytes at %p were freed while %zu copies used them", range.len_bytes, start, users.size());
        for (uint64_t op : users) wait_for_op(lock, op);
        const auto still = w.pinned.find(number(start));
        if (still == w.pinned.end()) return misuse(CUDA_ERROR_INVALID_VALUE, "two threads freed the same memory at once");
        unpin(still);
        munmap(start, range.len_bytes);
        return CUDA_SUCCESS;
    });
}
