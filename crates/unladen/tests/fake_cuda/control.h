// What the fake is told from outside: FAKE_CUDA (settings in the environment) and the file that FAKE_CUDA_CONTROL names.
#pragma once

#include <cstdint>
#include <map>

#include "api.h"

namespace fake {

struct Settings {
    int n_gpus = 2;
    uint64_t memory_bytes = 8ull << 30;
    std::map<int, uint64_t> memory_bytes_of;  // by GPU
    uint64_t used_bytes = 0;                  // by other processes
    std::map<int, uint64_t> used_bytes_of;
    uint64_t context_bytes = 0;
    uint64_t pinnable_bytes = UINT64_MAX;
    int driver_version = 12080;
    int compute_major = 8, compute_minor = 0;
    uint64_t delay_us = 0;
    bool is_held = false;
    bool poisons = true;
};

// As of the last refresh. With the lock held.
const Settings& settings();
// Reads the control file again when it changed.
void refresh_settings();
// Whether this call is told to fail, and how. Counts it.
bool is_told_to_fail(const char* name, CUresult* error);
// The same for a piece of work when it runs.
bool work_is_told_to_fail(CUresult* error);

}  // namespace fake
