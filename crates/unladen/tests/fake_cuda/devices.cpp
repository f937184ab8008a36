// The driver and its GPUs: cuInit, versions, names, sizes, attributes.
#include <cstdio>
#include <cstring>

#include "call.h"
#include "control.h"

using namespace fake;

namespace {

bool is_gpu(CUdevice device) { return device >= 0 && size_t(device) < world().gpus.size(); }

// CUdevice_attribute -> value, for those that a loader of weights could ask.
bool attribute(int which, const Gpu& gpu, int* value) {
    switch (which) {
        case 1: *value = 1024; return true;         // MAX_THREADS_PER_BLOCK
        case 2: *value = 1024; return true;         // MAX_BLOCK_DIM_X
        case 3: *value = 1024; return true;         // MAX_BLOCK_DIM_Y
        case 4: *value = 64; return true;           // MAX_BLOCK_DIM_Z
        case 5: *value = 2147483647; return true;   // MAX_GRID_DIM_X
        case 6: *value = 65535; return true;        // MAX_GRID_DIM_Y
        case 7: *value = 65535; return true;        // MAX_GRID_DIM_Z
        case 8: *value = 49152; return true;        // MAX_SHARED_MEMORY_PER_BLOCK
        case 10: *value = 32; return true;          // WARP_SIZE
        case 16: *value = 108; return true;         // MULTIPROCESSOR_COUNT
        case 18: *value = 0; return true;           // INTEGRATED
        case 19: *value = 1; return true;           // CAN_MAP_HOST_MEMORY
        case 20: *value = 0; return true;           // COMPUTE_MODE: default
        case 31: *value = 1; return true;           // CONCURRENT_KERNELS
        case 33: *value = gpu.ordinal + 1; return true;  // PCI_BUS_ID
        case 34: *value = 0; return true;           // PCI_DEVICE_ID
        case 40: *value = 2; return true;           // ASYNC_ENGINE_COUNT
        case 41: *value = 1; return true;           // UNIFIED_ADDRESSING
        case 50: *value = 0; return true;           // PCI_DOMAIN_ID
        case 75: *value = settings().compute_major; return true;
        case 76: *value = settings().compute_minor; return true;
        case 88: *value = 0; return true;           // PAGEABLE_MEMORY_ACCESS
        case 91: *value = 1; return true;           // CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
        case 99: *value = 1; return true;           // HOST_REGISTER_SUPPORTED
        case 100: *value = 0; return true;          // PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES
        case 113: *value = 0; return true;          // READ_ONLY_HOST_REGISTER_SUPPORTED
        default: return false;
    }
}

}  // namespace

CUDA_API CUresult cuInit(unsigned flags) {
    return with_nothing(__func__, [&](Lock&) -> CUresult {
        if (flags != 0) return misuse(CUDA_ERROR_INVALID_VALUE, "flags are %u, and must be 0", flags);
        World& w = world();
        if (w.is_initialised) return CUDA_SUCCESS;
        const Settings& s = settings();
        if (s.n_gpus == 0) return CUDA_ERROR_NO_DEVICE;
        for (int ordinal = 0; ordinal < s.n_gpus; ordinal++) {
            Gpu gpu;
            gpu.ordinal = ordinal;
            const auto own = s.memory_bytes_of.find(ordinal);
            gpu.total_bytes = own == s.memory_bytes_of.end() ? s.memory_bytes : own->second;
            open_memory(gpu);
            w.gpus.push_back(gpu);
        }
        w.is_initialised = true;
        return CUDA_SUCCESS;
    });
}

CUDA_API CUresult cuDriverGetVersion(int* version) {
    return with_nothing(__func__, [&](Lock&) -> CUresult {
        if (!version) return misuse(CUDA_ERROR_INVALID_VALUE, "nowhere to put the version");
        *version = settings().driver_version;
        return CUDA_SUCCESS;
    });
}

CUDA_API CUresult cuDeviceGetCount(int* count) {
    return with_init(__func__, [&](Lock&) -> CUresult {
        if (!count) return misuse(CUDA_ERROR_INVALID_VALUE, "nowhere to put the count");
        *count = int(world().gpus.size());
        return CUDA_SUCCESS;
    });
}

CUDA_API CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    return with_init(__func__, [&](Lock&) -> CUresult {
        if (!device) return misuse(CUDA_ERROR_INVALID_VALUE, "nowhere to put the device");
        // A user may ask for a GPU that is not there: an error, no violation.
        if (!is_gpu(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
        *device = ordinal;
        return CUDA_SUCCESS;
    });
}

CUDA_API CUresult cuDeviceGetName(char* name, int len, CUdevice device) {
    return with_init(__func__, [&](Lock&) -> CUresult {
        if (!name || len <= 0) return misuse(CUDA_ERROR_INVALID_VALUE, "nowhere to put the name");
        if (!is_gpu(device)) return misuse(CUDA_ERROR_INVALID_DEVICE, "there is no GPU %d", device);
        std::snprintf(name, size_t(len), "Fake GPU %d", device);
        return CUDA_SUCCESS;
    });
}

CUDA_API CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
    return with_init(__func__, [&](Lock&) -> CUresult {
        if (!bytes) return misuse(CUDA_ERROR_INVALID_VALUE, "nowhere to put the size");
        if (!is_gpu(device)) return misuse(CUDA_ERROR_INVALID_DEVICE, "there is no GPU %d", device);
        *bytes = world().gpus[device].total_bytes;
        return CUDA_SUCCESS;
    });
}

CUDA_API CUresult cuDeviceGetAttribute(int* value, int which, CUdevice device) {
    return with_init(__func__, [&](Lock&) -> CUresult {
        if (!value) return misuse(CUDA_ERROR_INVALID_VALUE, "nowhere to put the attribute");
        if (!is_gpu(device)) return misuse(CUDA_ERROR_INVALID_DEVICE, "there is no GPU %d", device);
        if (!attribute(which, world().gpus[device], value)) return misuse(CUDA_ERROR_INVALID_VALUE, "the fake has no device attribute %d", which);
        return CUDA_SUCCESS;
    });
}
