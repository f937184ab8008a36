// Streams and events: a thread for each stream, which runs its work in order.
//
// The null stream is the old one: its work waits for what the context's other streams were given before, and their later work
// waits for it, unless they were created with CU_STREAM_NON_BLOCKING.
#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "call.h"
#include "control.h"
#include "report.h"

namespace fake {
namespace {

// The delay of a piece of work, and the time that the control file holds it.
void linger(Lock& lock) {
    refresh_settings();
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(settings().delay_us);
    while (settings().is_held) {
        lock.unlock();
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        lock.lock();
        refresh_settings();
    }
    lock.unlock();
    std::this_thread::sleep_until(until);
    lock.lock();
}

void run(Op& op, Lock& lock) {
    Gpu& gpu = world().gpus[op.gpu];
    if (op.is_work) linger(lock);
    // After a failure nothing of the context runs any more.
    if (gpu.broken != CUDA_SUCCESS) return;
    CUresult error = CUDA_SUCCESS;
    name_call(op.call);
    if (!(op.is_work && work_is_told_to_fail(&error)) && op.run) error = op.run(lock);
    name_call(nullptr);
    if (error == CUDA_SUCCESS) return;
    gpu.broken = error;
    write_report();
}

void work(std::shared_ptr<Stream> stream) {
    World& w = world();
    Lock lock(w.lock);
    for (;;) {
        w.changed.wait(lock, [&] { return !stream->queue.empty() || stream->is_closing; });
        if (stream->queue.empty()) break;
        const std::shared_ptr<Op> op = stream->queue.front();
        for (uint64_t before : op->after) wait_for_op(lock, before);
        run(*op, lock);
        stream->queue.pop_front();
        w.pending.erase(op->id);
        if (op->copy_bytes > 0) {
            w.counts.in_flight_copies -= 1;
            w.counts.in_flight_bytes -= op->copy_bytes;
        }
        w.changed.notify_all();
    }
    auto& streams = w.gpus[stream->gpu].streams;
    streams.erase(std::find(streams.begin(), streams.end(), stream));
}

}  // namespace

std::shared_ptr<Stream> start_stream(Gpu& gpu, uint64_t handle, bool waits_for_null_stream) {
    auto stream = std::make_shared<Stream>();
    stream->handle = handle;
    stream->gpu = gpu.ordinal;
    stream->waits_for_null_stream = waits_for_null_stream;
    gpu.streams.push_back(stream);
    // Signals are the program's own business.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    std::thread(work, stream).detach();
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return stream;
}

Stream& null_stream(Gpu& gpu) {
    if (!gpu.null_stream) gpu.null_stream = start_stream(gpu, 0, false);
    return *gpu.null_stream;
}

bool is_pending(uint64_t op) { return world().pending.count(op) > 0; }

uint64_t submit(Stream& stream, Op op) {
    World& w = world();
    Gpu& gpu = w.gpus[stream.gpu];
    op.id = ++w.last_op;
    op.gpu = stream.gpu;
    op.after.push_back(gpu.barrier_op);
    const bool is_null_stream = gpu.null_stream.get() == &stream;
    if (is_null_stream) {
        for (const auto& it : gpu.streams)
            if (it->waits_for_null_stream) op.after.push_back(it->last_op);
    } else if (stream.waits_for_null_stream && gpu.null_stream) {
        op.after.push_back(gpu.null_stream->last_op);
    }
    if (op.copy_bytes > 0) {
        Counts& counts = w.counts;
        counts.in_flight_copies += 1;
        counts.in_flight_bytes += op.copy_bytes;
        counts.peak_in_flight_copies = std::max(counts.peak_in_flight_copies, counts.in_flight_copies);
        counts.peak_in_flight_bytes = std::max(counts.peak_in_flight_bytes, counts.in_flight_bytes);
    }
    const auto queued = std::make_shared<Op>(std::move(op));
    stream.last_op = queued->id;
    stream.queue.push_back(queued);
    w.pending[queued->id] = queued;
    w.changed.notify_all();
    return queued->id;
}

void wait_for_op(Lock& lock, uint64_t op) {
    if (!is_pending(op)) return;
    const bool is_seen = is_in_call();
    uint64_t& n_waiting = world().counts.n_waiting;
    if (is_seen) {
        n_waiting += 1;
        write_report();  // for whoever holds the work until somebody waits for it
    }
    world().changed.wait(lock, [&] { return !is_pending(op); });
    if (is_seen) n_waiting -= 1;
}

void wait_for_context(Lock& lock, const Gpu& gpu) {
    std::vector<uint64_t> ops;
    for (const auto& it : world().pending)
        if (it.second->gpu == gpu.ordinal) ops.push_back(it.first);
    for (uint64_t op : ops) wait_for_op(lock, op);
}

namespace {

// All that a stream was given so far. The null stream stands for those that wait for it, too.
std::vector<uint64_t> last_ops(const Stream& stream) {
    const Gpu& gpu = world().gpus[stream.gpu];
    std::vector<uint64_t> ops = {stream.last_op};
    if (gpu.null_stream.get() == &stream)
        for (const auto& it : gpu.streams)
            if (it->waits_for_null_stream) ops.push_back(it->last_op);
    return ops;
}

Event* event_of(CUevent handle, CUresult* error) {
    const auto it = world().events.find(number(handle));
    if (it == world().events.end()) {
        *error = misuse(CUDA_ERROR_INVALID_HANDLE, "%s", describe("event", handle).c_str());
        return nullptr;
    }
    *error = world().gpus[it->second.gpu].broken;
    return *error == CUDA_SUCCESS ? &it->second : nullptr;
}

}  // namespace
}  // namespace fake

using namespace fake;

CUDA_API CUresult cuStreamCreate(CUstream* stream, unsigned flags) {
    return with_context(__func__, [&](Lock&, Gpu& gpu) -> CUresult {
        if (!stream) return misuse(CUDA_ERROR_INVALID_VALUE, "nowhere to put the stream");
        if (flags > 1) return misuse(CUDA_ERROR_INVALID_VALUE, "unknown flags in %#x", flags);
        *stream = new_handle();
        world().streams[number(*stream)] = start_stream(gpu, number(*stream), flags == 0);
        return CUDA_SUCCESS;
    });
}

CUDA_API CUresult cuStreamDestroy_v2(CUstream handle) {
    return with_context(__func__, [&](Lock&, Gpu&) -> CUresult {
        World& w = world();
        const auto it = w.streams.find(number(handle));
        if (it == w.streams.end()) return misuse(CUDA_ERROR_INVALID_HANDLE, "%s", describe("stream", handle).c_str());
        // Work that is pending goes on.
        it->second->is_closing = true;
        w.streams.erase(it);
        w.gone[number(handle)] = "stream";
        w.changed.notify_all();
        return CUDA_SUCCESS;
    });
}

CUDA_API CUresult cuStreamSynchronize(CUstream handle) {
    return with_context(__func__, [&](Lock& lock, Gpu& gpu) -> CUresult {
        CUresult error = CUDA_SUCCESS;
        const Stream* stream = stream_of(handle, gpu, &error);
        if (!stream) return error;
        const Gpu& owner = world().gpus[stream->gpu];
        for (uint64_t op : last_ops(*stream)) wait_for_op(lock, op);
        return owner.broken;
    });
}

CUDA_API CUresult cuStreamQuery(CUstream handle) {
    return with_context(__func__, [&](Lock&, Gpu& gpu) -> CUresult {
        CUresult error = CUDA_SUCCESS;
        const Stream* stream = stream_of(handle, gpu, &error);
        if (!stream) return error;
        for (uint64_t op : last_ops(*stream))
            if (is_pending(op)) return CUDA_ERROR_NOT_READY;
        return CUDA_SUCCESS;
    });
}

CUDA_API CUresult cuStreamWaitEvent(CUstream handle, CUevent event_handle, unsigned flags) {
    const char* const name = __func__;
    return with_context(name, [&](Lock&, Gpu& gpu) -> CUresult {
        if (flags != 0) return misuse(CUDA_ERROR_INVALID_VALUE, "flags are %#x, and must be 0", flags);
        CUresult error = CUDA_SUCCESS;
        Stream* stream = stream_of(handle, gpu, &error);
        if (!stream) return error;
        const Event* event = event_of(event_handle, &error);
        if (!event) return error;
        Op op;
        op.call = name;
        op.after = {event->op};
        submit(*stream, std::move(op));
        return CUDA_SUCCESS;
    });
}

CUDA_API CUresult cuEventCreate(CUevent* event, unsigned flags) {
    return with_context(__func__, [&](Lock&, Gpu& gpu) -> CUresult {
        if (!event) return misuse(CUDA_ERROR_INVALID_VALUE, "nowhere to put the event");
        // CU_EVENT_INTERPROCESS (4) goes only with CU_EVENT_DISABLE_TIMING (2).
        if (flags > 7 || ((flags & 4) && !(flags & 2))) return misuse(CUDA_ERROR_INVALID_VALUE, "unknown flags in %#x", flags);
        *event = new_handle();
        world().events[number(*event)] = {gpu.ordinal, 0};
        return CUDA_SUCCESS;
    });
}

CUDA_API CUresult cuEventRecord(CUevent handle, CUstream stream_handle) {
    const char* const name = __func__;
    return with_context(name, [&](Lock&, Gpu& gpu) -> CUresult {
        CUresult error = CUDA_SUCCESS;
        Event* event = event_of(handle, &error);
        if (!event) return error;
        Stream* stream = stream_of(stream_handle, gpu, &error);
        if (!stream) return error;
        if (event->gpu != stream->gpu)
            return misuse(CUDA_ERROR_INVALID_HANDLE, "the event is of GPU %d, the stream of GPU %d", event->gpu, stream->gpu);
        Op op;
        op.call = name;
        event->op = submit(*stream, std::move(op));
        return CUDA_SUCCESS;
    });
}

// These two ask for no current context.
CUDA_API CUresult cuEventQuery(CUevent handle) {
    return with_init(__func__, [&](Lock&) -> CUresult {
        CUresult error = CUDA_SUCCESS;
        const Event* event = event_of(handle, &error);
        if (!event) return error;
        return is_pending(event->op) ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;
    });
}

CUDA_API CUresult cuEventSynchronize(CUevent handle) {
    return with_init(__func__, [&](Lock& lock) -> CUresult {
        CUresult error = CUDA_SUCCESS;
        const Event* event = event_of(handle, &error);
        if (!event) return error;
        const Gpu& owner = world().gpus[event->gpu];
        wait_for_op(lock, event->op);
        return owner.broken;
    });
}

CUDA_API CUresult cuEventDestroy_v2(CUevent handle) {
    return with_context(__func__, [&](Lock&, Gpu&) -> CUresult {
        World& w = world();
        if (w.events.erase(number(handle)) == 0) return misuse(CUDA_ERROR_INVALID_HANDLE, "%s", describe("event", handle).c_str());
        w.gone[number(handle)] = "event";
        return CUDA_SUCCESS;
    });
}
