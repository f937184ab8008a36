// Everything the fake driver knows, in one struct behind one lock: GPUs with their primary contexts, memory, pinned host memory,
// streams, events, modules, what is pending, and what was counted.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "api.h"

namespace fake {

using Lock = std::unique_lock<std::mutex>;

// Memory that was not written yet, and host memory that a copy will fill: NaN in every float format, -1 in every integer.
constexpr unsigned char POISON = 0xff;

struct Range {
    uint64_t start = 0;
    uint64_t len_bytes = 0;

    uint64_t end() const { return start + len_bytes; }
    // `len_bytes` of `start` may be anything a caller came up with: no sum may wrap.
    bool holds(uint64_t from, uint64_t n_bytes) const {
        return from >= start && from - start <= len_bytes && n_bytes <= len_bytes - (from - start);
    }
    bool meets(uint64_t from, uint64_t n_bytes) const { return n_bytes > 0 && from < end() && (from >= start || start - from < n_bytes); }
};

// One piece of work on a stream. It stays in `World::pending` until it is done.
struct Op {
    uint64_t id = 0;
    int gpu = 0;
    const char* call = "";
    // Work is delayed and held, and can be told to fail; a mark (an event's record, a wait) only keeps its place.
    bool is_work = false;
    uint64_t copy_bytes = 0;
    std::vector<uint64_t> after;  // the ops that must be done first, besides those before it in its stream
    std::vector<Range> device;    // the device memory that it touches
    Range host;                   // the pinned host memory that it touches
    uint64_t module = 0;          // the module whose kernel it runs
    // Called with the lock held; lets go of it while bytes move. An error breaks the context.
    std::function<CUresult(Lock&)> run;
};

struct Stream {
    uint64_t handle = 0;  // 0: a GPU's null stream
    int gpu = 0;
    bool waits_for_null_stream = true;  // what CU_STREAM_NON_BLOCKING switches off
    bool is_closing = false;            // destroyed: its thread ends when the queue is empty
    uint64_t last_op = 0;
    std::deque<std::shared_ptr<Op>> queue;
};

struct Gpu {
    int ordinal = 0;
    uint64_t total_bytes = 0;
    int memory_file = -1;    // a memfd: an address is this GPU's base plus a place in it
    uint64_t next_byte = 0;  // addresses are given out once and never again

    uint64_t asked_bytes = 0, peak_asked_bytes = 0;
    uint64_t taken_bytes = 0, peak_taken_bytes = 0;
    std::map<uint64_t, uint64_t> shared_blocks;  // id -> bytes used, of the 2 MiB blocks that small allocations share

    // The primary context.
    unsigned n_retained = 0;
    uint64_t context_bytes = 0;
    CUresult broken = CUDA_SUCCESS;                // what an asynchronous failure left: every later call gives it
    std::shared_ptr<Stream> null_stream;           // made when first used
    std::vector<std::shared_ptr<Stream>> streams;  // all whose thread runs, the null stream included
    uint64_t barrier_op = 0;                       // a peer copy, which all later work of the context waits for
};

struct Allocation {
    int gpu = 0;
    Range range;
    uint64_t taken_bytes = 0;   // of its own; 0 when it shares a block
    uint64_t shared_block = 0;  // the id of that block
    char* mapped = nullptr;     // for kernels: the host's view, page by page, made when first asked for
    size_t mapped_bytes = 0, mapped_skip = 0;
};

// Host memory that the driver pinned: registered by its owner, or allocated by the driver.
struct Pinned {
    int gpu = 0;
    Range range;
    bool is_allocated = false;
};

struct Event {
    int gpu = 0;
    uint64_t op = 0;  // the record that counts; 0: never recorded
};

struct Kernel {
    std::string name;
    std::vector<uint32_t> param_bytes;
    uint64_t most_threads = 1024;  // of a block: `.maxntid`, what __launch_bounds__ becomes
};

struct Module {
    int gpu = 0;
    std::map<std::string, Kernel> kernels;
};

struct Function {
    uint64_t module = 0;
    Kernel kernel;
};

struct Tally {
    uint64_t n = 0, bytes = 0;
    void add(uint64_t more_bytes) { n += 1, bytes += more_bytes; }
};

// What no object shows any more, for the report.
struct Counts {
    std::map<std::string, uint64_t> calls;
    std::map<std::string, uint64_t> told_to_fail;
    Tally h2d, d2h, d2d, between_gpus, fills;
    Tally async_pinned, async_pageable;  // of h2d and d2h
    uint64_t n_launches = 0;
    uint64_t n_waiting = 0;  // calls that have not returned because they wait for work
    uint64_t pinned_bytes = 0, peak_pinned_bytes = 0;
    uint64_t in_flight_copies = 0, peak_in_flight_copies = 0;
    uint64_t in_flight_bytes = 0, peak_in_flight_bytes = 0;
    uint64_t frees_that_waited = 0;  // cuMemFree of memory that pending work still touched
    std::map<std::string, uint64_t> left_in_contexts;  // what was alive when its context went, by kind
    std::vector<std::string> violations;
};

struct World {
    std::mutex lock;
    std::condition_variable changed;  // an op was queued or done, a stream closed
    bool is_initialised = false;
    std::vector<Gpu> gpus;
    std::map<uint64_t, Allocation> memory;  // by address
    std::map<uint64_t, uint64_t> freed;     // address -> length of what was memory once
    std::map<uint64_t, Pinned> pinned;      // by address
    std::map<uint64_t, std::shared_ptr<Stream>> streams;
    std::map<uint64_t, Event> events;
    std::map<uint64_t, Module> modules;
    std::map<uint64_t, Function> functions;
    std::map<uint64_t, const char*> gone;  // handles of what was destroyed -> its kind
    uint64_t last_handle = 0;
    uint64_t last_op = 0;
    std::map<uint64_t, std::shared_ptr<Op>> pending;  // every op that is not done
    Counts counts;
};

// The one world of this process. Never destroyed: stream threads outlive `main`.
World& world();

// ---- objects.cpp: handles and contexts

void* new_handle();
inline uint64_t number(const void* handle) { return reinterpret_cast<uint64_t>(handle); }
inline void* pointer(uint64_t number) { return reinterpret_cast<void*>(number); }
// "stream 0x.. (destroyed)" and the like, for a violation.
std::string describe(const char* kind, const void* handle);

CUcontext context_handle(const Gpu& gpu);
// The GPU whose primary context has this handle, alive or not.
Gpu* gpu_of_context(CUcontext handle);
// The context that is current to this thread, alive or not.
Gpu* current_gpu();
// The stream of a handle: the current context's null stream for 0. Null, with *error set, when there is none.
Stream* stream_of(CUstream handle, Gpu& current, CUresult* error);
// Forgets all that lives in a context; whatever was left is counted and a violation.
void reset_context(Lock& lock, Gpu& gpu);

// ---- device_memory.cpp: bytes at device addresses

// The allocation that holds this whole range, or null.
Allocation* allocation_of(uint64_t address, uint64_t len_bytes);
// Why a range is no device memory, in words.
std::string why_no_memory(uint64_t address, uint64_t len_bytes);
void open_memory(Gpu& gpu);
// Reserves an address range and accounts for it; false when the GPU is full.
bool allocate(Gpu& gpu, uint64_t len_bytes, uint64_t* address);
void release(std::map<uint64_t, Allocation>::iterator it);
uint64_t free_bytes(const Gpu& gpu);

// These move bytes, and need no lock. False: the host's memory cannot be read or written.
bool device_write(const Gpu& gpu, uint64_t address, const void* source, uint64_t len_bytes);
bool device_read(const Gpu& gpu, uint64_t address, void* target, uint64_t len_bytes);
void device_fill(const Gpu& gpu, uint64_t address, unsigned char byte, uint64_t len_bytes);

// ---- host_memory.cpp: memory of the process

// Copies out of and into addresses that may not be mapped at all.
bool host_read(void* target, uint64_t source, uint64_t len_bytes);
bool host_write(uint64_t target, const void* source, uint64_t len_bytes);

enum class HostKind { pageable, pinned, straddling };
// Whether a range is pinned as a whole, not at all, or in part, which no copy accepts.
HostKind host_kind(uint64_t address, uint64_t len_bytes);

// ---- streams.cpp: work

std::shared_ptr<Stream> start_stream(Gpu& gpu, uint64_t handle, bool waits_for_null_stream);
Stream& null_stream(Gpu& gpu);
// Queues an op behind all that its stream has to wait for, and returns its id.
uint64_t submit(Stream& stream, Op op);
void wait_for_op(Lock& lock, uint64_t op);
// Waits for all that is pending in a context now.
void wait_for_context(Lock& lock, const Gpu& gpu);
bool is_pending(uint64_t op);

}  // namespace fake
