// Device memory: addresses, what an allocation takes, and the bytes.
//
// A GPU's memory is a memfd that is not mapped, so that it is no part of the process' resident memory and no host pointer leads to
// it. An address is a base that no user address can equal, plus a place in that file. Places are never used twice: whoever comes
// too late finds nothing.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "control.h"
#include "world.h"

namespace fake {
namespace {

constexpr uint64_t FIRST_ADDRESS = 0x00d0'0000'0000'0000;
constexpr uint64_t ADDRESSES_OF_A_GPU = uint64_t(1) << 44;

constexpr uint64_t BLOCK_BYTES = 2 << 20;           // what the driver takes at once
constexpr uint64_t SMALLEST_OWN_BYTES = 1 << 20;    // allocations below share blocks
constexpr uint64_t SHARED_STEP_BYTES = 512;
constexpr uint64_t GAP_BYTES = 4096;                // between two allocations: no range runs from one into the next

uint64_t round_up(uint64_t value, uint64_t step) { return (value + step - 1) / step * step; }

uint64_t base_of(const Gpu& gpu) { return FIRST_ADDRESS + uint64_t(gpu.ordinal) * ADDRESSES_OF_A_GPU; }

[[noreturn]] void give_up(const char* what) {
    std::fprintf(stderr, "fake libcuda: %s: %s\n", what, std::strerror(errno));
    std::abort();
}

// The block that a small allocation lands in: the first with room, or a new one. What a new one takes is added to *taken_bytes.
uint64_t block_for(Gpu& gpu, uint64_t len_bytes, uint64_t* new_bytes) {
    *new_bytes = 0;
    for (const auto& it : gpu.shared_blocks)
        if (it.second + len_bytes <= BLOCK_BYTES) return it.first;
    *new_bytes = BLOCK_BYTES;
    return gpu.shared_blocks.empty() ? 1 : gpu.shared_blocks.rbegin()->first + 1;
}

}  // namespace

void open_memory(Gpu& gpu) {
    gpu.memory_file = memfd_create("fake-gpu", MFD_CLOEXEC);
    if (gpu.memory_file < 0) give_up("memfd_create");
    gpu.next_byte = BLOCK_BYTES;
}

uint64_t free_bytes(const Gpu& gpu) {
    const Settings& s = settings();
    const auto own = s.used_bytes_of.find(gpu.ordinal);
    const uint64_t used_by_others = own == s.used_bytes_of.end() ? s.used_bytes : own->second;
    const uint64_t used = used_by_others + gpu.context_bytes + gpu.taken_bytes;
    return used < gpu.total_bytes ? gpu.total_bytes - used : 0;
}

bool allocate(Gpu& gpu, uint64_t len_bytes, uint64_t* address) {
    if (len_bytes > gpu.total_bytes) return false;
    const bool is_shared = len_bytes < SMALLEST_OWN_BYTES;
    Allocation it;
    it.gpu = gpu.ordinal;
    uint64_t new_bytes = 0;
    if (is_shared) {
        it.shared_block = block_for(gpu, round_up(len_bytes, SHARED_STEP_BYTES), &new_bytes);
    } else {
        it.taken_bytes = new_bytes = round_up(len_bytes, BLOCK_BYTES);
    }
    if (new_bytes > free_bytes(gpu)) return false;
    if (is_shared) gpu.shared_blocks[it.shared_block] += round_up(len_bytes, SHARED_STEP_BYTES);
    const uint64_t place = round_up(gpu.next_byte, is_shared ? SHARED_STEP_BYTES : BLOCK_BYTES);
    gpu.next_byte = place + len_bytes + GAP_BYTES;
    if (ftruncate(gpu.memory_file, off_t(round_up(gpu.next_byte, BLOCK_BYTES))) != 0) give_up("ftruncate");
    it.range = {base_of(gpu) + place, len_bytes};
    gpu.asked_bytes += len_bytes;
    gpu.taken_bytes += new_bytes;
    gpu.peak_asked_bytes = std::max(gpu.peak_asked_bytes, gpu.asked_bytes);
    gpu.peak_taken_bytes = std::max(gpu.peak_taken_bytes, gpu.taken_bytes);
    *address = it.range.start;
    world().memory[*address] = it;
    return true;
}

void release(std::map<uint64_t, Allocation>::iterator found) {
    World& w = world();
    const Allocation it = found->second;
    Gpu& gpu = w.gpus[it.gpu];
    gpu.asked_bytes -= it.range.len_bytes;
    gpu.taken_bytes -= it.taken_bytes;
    if (it.shared_block) {
        uint64_t& used_bytes = gpu.shared_blocks[it.shared_block];
        used_bytes -= round_up(it.range.len_bytes, SHARED_STEP_BYTES);
        if (used_bytes == 0) {
            gpu.shared_blocks.erase(it.shared_block);
            gpu.taken_bytes -= BLOCK_BYTES;
        }
    }
    if (it.mapped) munmap(it.mapped, it.mapped_bytes);
    const off_t place = off_t(it.range.start - base_of(gpu));
    if (fallocate(gpu.memory_file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, place, off_t(it.range.len_bytes)) != 0) give_up("fallocate");
    w.freed[it.range.start] = it.range.len_bytes;
    w.memory.erase(found);
}

Allocation* allocation_of(uint64_t address, uint64_t len_bytes) {
    auto& memory = world().memory;
    auto it = memory.upper_bound(address);
    if (it == memory.begin()) return nullptr;
    --it;
    return it->second.range.holds(address, len_bytes) ? &it->second : nullptr;
}

std::string why_no_memory(uint64_t address, uint64_t len_bytes) {
    char text[200];
    const auto say = [&](const char* format, uint64_t start, uint64_t len) {
        std::snprintf(text, sizeof text, format, len_bytes, address, len, start);
        return std::string(text);
    };
    World& w = world();
    if (const Allocation* it = allocation_of(address, 0))
        return say("%" PRIu64 " bytes at %#" PRIx64 " run past the end of %" PRIu64 " bytes at %#" PRIx64, it->range.start, it->range.len_bytes);
    auto it = w.freed.upper_bound(address);
    if (it != w.freed.begin() && Range{(--it)->first, it->second}.holds(address, 0))
        return say("%" PRIu64 " bytes at %#" PRIx64 " lie in %" PRIu64 " bytes at %#" PRIx64 " that were freed", it->first, it->second);
    return say("%" PRIu64 " bytes at %#" PRIx64 " are no device memory", 0, 0);
}

bool device_write(const Gpu& gpu, uint64_t address, const void* source, uint64_t len_bytes) {
    const char* from = static_cast<const char*>(source);
    off_t place = off_t(address - base_of(gpu));
    while (len_bytes > 0) {
        const ssize_t n = pwrite(gpu.memory_file, from, std::min<uint64_t>(len_bytes, 1 << 30), place);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EFAULT) return false;
        if (n <= 0) give_up("pwrite");
        from += n, place += n, len_bytes -= uint64_t(n);
    }
    return true;
}

bool device_read(const Gpu& gpu, uint64_t address, void* target, uint64_t len_bytes) {
    char* to = static_cast<char*>(target);
    off_t place = off_t(address - base_of(gpu));
    while (len_bytes > 0) {
        const ssize_t n = pread(gpu.memory_file, to, std::min<uint64_t>(len_bytes, 1 << 30), place);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EFAULT) return false;
        if (n <= 0) give_up("pread");
        to += n, place += n, len_bytes -= uint64_t(n);
    }
    return true;
}

void device_fill(const Gpu& gpu, uint64_t address, unsigned char byte, uint64_t len_bytes) {
    const std::vector<unsigned char> piece(std::min<uint64_t>(len_bytes, 1 << 20), byte);
    for (uint64_t at = 0; at < len_bytes; at += piece.size())
        device_write(gpu, address + at, piece.data(), std::min<uint64_t>(piece.size(), len_bytes - at));
}

// The host's view of a range for a kernel, see fake_kernel.h. The caller checked the range.
char* host_view(Allocation& it, uint64_t address) {
    if (!it.mapped) {
        const Gpu& gpu = world().gpus[it.gpu];
        const uint64_t place = it.range.start - base_of(gpu);
        it.mapped_skip = place % uint64_t(sysconf(_SC_PAGESIZE));
        it.mapped_bytes = it.range.len_bytes + it.mapped_skip;
        void* at = mmap(nullptr, it.mapped_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, gpu.memory_file, off_t(place - it.mapped_skip));
        if (at == MAP_FAILED) give_up("mmap");
        it.mapped = static_cast<char*>(at);
    }
    return it.mapped + it.mapped_skip + (address - it.range.start);
}

}  // namespace fake
