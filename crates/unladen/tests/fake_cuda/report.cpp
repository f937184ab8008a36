// Writes the report: one JSON object with all figures, after every call that could have changed one, and when the process ends.
#include "report.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>

#include "call.h"
#include "control.h"

namespace fake {
namespace {

bool is_over = false;

// `%p` in the name stands for the process, for tests that start several.
const std::string& report_path() {
    static const std::string* const path = [] {
        const char* name = std::getenv("FAKE_CUDA_REPORT");
        auto* found = new std::string(name ? name : "");
        const size_t at = found->find("%p");
        if (at != std::string::npos) found->replace(at, 2, std::to_string(getpid()));
        return found;
    }();
    return *path;
}

std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (unsigned char c : text) {
        char escape[8];
        if (c == '"' || c == '\\') {
            out += '\\', out += char(c);
        } else if (c < 0x20 || c >= 0x7f) {
            std::snprintf(escape, sizeof escape, "\\u%04x", c);
            out += escape;
        } else {
            out += char(c);
        }
    }
    return out + "\"";
}

// A JSON object, member by member.
class Object {
  public:
    Object& put(const std::string& name, uint64_t value) { return raw(name, std::to_string(value)); }
    Object& put(const std::string& name, const Tally& tally) { return raw(name, Object().put("n", tally.n).put("bytes", tally.bytes).text()); }
    Object& raw(const std::string& name, const std::string& json) {
        members_ += (members_.empty() ? "" : ", ") + quoted(name) + ": " + json;
        return *this;
    }
    std::string text() const { return "{" + members_ + "}"; }

  private:
    std::string members_;
};

std::string table(const std::map<std::string, uint64_t>& values) {
    Object object;
    for (const auto& it : values) object.put(it.first, it.second);
    return object.text();
}

std::string gpu_report(const Gpu& gpu) {
    uint64_t n_memory = 0;
    for (const auto& it : world().memory) n_memory += it.second.gpu == gpu.ordinal;
    return Object()
        .put("ordinal", gpu.ordinal)
        .put("total_bytes", gpu.total_bytes)
        .put("free_bytes", free_bytes(gpu))
        .put("context_bytes", gpu.context_bytes)
        .put("contexts_retained", gpu.n_retained)
        .put("allocations", n_memory)
        .raw("asked_bytes", Object().put("live", gpu.asked_bytes).put("peak", gpu.peak_asked_bytes).text())
        .raw("taken_bytes", Object().put("live", gpu.taken_bytes).put("peak", gpu.peak_taken_bytes).text())
        .put("broken_by", uint64_t(gpu.broken))
        .text();
}

std::string live_report(const World& w) {
    uint64_t n_contexts = 0, n_registered = 0;
    for (const Gpu& gpu : w.gpus) n_contexts += gpu.n_retained;
    for (const auto& it : w.pinned) n_registered += !it.second.is_allocated;
    return Object()
        .put("contexts", n_contexts)
        .put("memory", w.memory.size())
        .put("registrations", n_registered)
        .put("host_allocations", w.pinned.size() - n_registered)
        .put("streams", w.streams.size())
        .put("events", w.events.size())
        .put("modules", w.modules.size())
        .text();
}

std::string all(const World& w) {
    const Counts& counts = w.counts;
    std::string gpus, violations;
    for (const Gpu& gpu : w.gpus) gpus += (gpus.empty() ? "\n  " : ",\n  ") + gpu_report(gpu);
    for (const std::string& it : counts.violations) violations += (violations.empty() ? "\n  " : ",\n  ") + quoted(it);
    const std::string copies = Object()
                                   .put("h2d", counts.h2d)
                                   .put("d2h", counts.d2h)
                                   .put("d2d", counts.d2d)
                                   .put("between_gpus", counts.between_gpus)
                                   .put("fills", counts.fills)
                                   .put("async_pinned", counts.async_pinned)
                                   .put("async_pageable", counts.async_pageable)
                                   .put("peak_in_flight", counts.peak_in_flight_copies)
                                   .put("peak_in_flight_bytes", counts.peak_in_flight_bytes)
                                   .text();
    std::ostringstream out;
    out << "{\n\"process\": " << getpid() << ",\n\"is_over\": " << (is_over ? "true" : "false") << ",\n\"gpus\": [" << gpus
        << "],\n\"live\": " << live_report(w)
        << ",\n\"pinned_bytes\": " << Object().put("live", counts.pinned_bytes).put("peak", counts.peak_pinned_bytes).text()
        << ",\n\"copies\": " << copies << ",\n\"launches\": " << counts.n_launches << ",\n\"waiting\": " << counts.n_waiting
        << ",\n\"frees_that_waited\": " << counts.frees_that_waited
        << ",\n\"left_in_contexts\": " << table(counts.left_in_contexts) << ",\n\"calls\": " << table(counts.calls)
        << ",\n\"told_to_fail\": " << table(counts.told_to_fail) << ",\n\"violations\": [" << violations << "]\n}\n";
    return out.str();
}

}  // namespace

void write_report() {
    const std::string& path = report_path();
    if (path.empty()) return;
    const std::string beside = path + "." + std::to_string(getpid()) + ".part";
    std::ofstream(beside) << all(world());
    if (std::rename(beside.c_str(), path.c_str()) != 0) std::perror("fake libcuda: the report cannot be written");
}

namespace {

// A process that only looked whether there is a driver, or a fork of one that used it, leaves no report.
__attribute__((destructor)) void last_report() {
    if (is_forked_child()) return;
    Lock lock(world().lock);
    if (world().counts.calls.empty()) return;
    is_over = true;
    write_report();
}

}  // namespace
}  // namespace fake
