// Modules, functions and launches. No PTX is run: a kernel is looked up by name among the host's implementations.
#include <algorithm>
#include <cinttypes>
#include <cstring>

#include "call.h"
#include "control.h"
#include "fake_kernel.h"
#include "ptx.h"

namespace fake {

char* host_view(Allocation& it, uint64_t address);  // device_memory.cpp

namespace {

std::map<std::string, FakeKernel>& kernels() {
    // Filled while the library is loaded, in no certain order: made when first asked for.
    static auto* const all = new std::map<std::string, FakeKernel>;
    return *all;
}

struct Fault {
    CUresult error;
};

// The GPU whose kernel this thread runs; -1: none.
thread_local int launched_on = -1;

// The values of a launch's arguments, taken when it was made.
struct Arguments {
    std::vector<std::vector<char>> values;
    std::vector<void*> pointers;

    Arguments(const Kernel& kernel, void** params) {
        for (size_t i = 0; i < kernel.param_bytes.size(); i++) {
            const char* from = static_cast<const char*>(params[i]);
            values.emplace_back(from, from + kernel.param_bytes[i]);
        }
        for (auto& it : values) pointers.push_back(it.data());
    }
};

CUresult run_kernel(Lock& lock, int gpu, const std::string& name, FakeDim grid, FakeDim block, unsigned shared_bytes, Arguments& arguments) {
    const FakeKernel kernel = kernels().at(name);
    lock.unlock();
    CUresult result = CUDA_SUCCESS;
    launched_on = gpu;
    try {
        kernel(grid, block, shared_bytes, arguments.pointers.data());
    } catch (const Fault& fault) {
        result = fault.error;
    }
    launched_on = -1;
    lock.lock();
    if (result != CUDA_SUCCESS) violation("kernel `%s` failed with error %d", name.c_str(), result);
    return result;
}

bool is_too_large(FakeDim grid, FakeDim block) {
    const auto has_none = [](FakeDim it) { return it.x == 0 || it.y == 0 || it.z == 0; };
    return has_none(grid) || has_none(block) || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535 || block.x > 1024 || block.y > 1024 ||
           block.z > 64 || uint64_t(block.x) * block.y * block.z > 1024;
}

}  // namespace
}  // namespace fake

using namespace fake;

fake_kernel::fake_kernel(const char* name, FakeKernel kernel) { kernels()[name] = kernel; }

void fake_fault(CUresult error) { throw Fault{error}; }

void* fake_host(CUdeviceptr address, size_t len_bytes) {
    Lock lock(world().lock);
    Allocation* memory = allocation_of(address, len_bytes);
    if (memory && memory->gpu == launched_on) return host_view(*memory, address);
    if (memory)
        violation("%#" PRIx64 " is memory of GPU %d, the kernel runs on GPU %d", address, memory->gpu, launched_on);
    else
        violation("%s", why_no_memory(address, len_bytes).c_str());
    fake_fault(CUDA_ERROR_ILLEGAL_ADDRESS);
}

CUDA_API CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    return with_context(__func__, [&](Lock&, Gpu& gpu) -> CUresult {
        if (!module || !image) return misuse(CUDA_ERROR_INVALID_VALUE, "no image, or nowhere to put the module");
        Ptx ptx;
        if (!ptx.parse(static_cast<const char*>(image))) return CUDA_ERROR_INVALID_PTX;
        const Settings& s = settings();
        if (ptx.driver_version_needed() > s.driver_version) return CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
        if (ptx.target > s.compute_major * 10 + s.compute_minor) return CUDA_ERROR_INVALID_PTX;
        *module = new_handle();
        world().modules[number(*module)] = {gpu.ordinal, ptx.kernels};
        return CUDA_SUCCESS;
    });
}

CUDA_API CUresult cuModuleUnload(CUmodule handle) {
    return with_context(__func__, [&](Lock& lock, Gpu&) -> CUresult {
        World& w = world();
        if (w.modules.count(number(handle)) == 0) return misuse(CUDA_ERROR_INVALID_HANDLE, "%s", describe("module", handle).c_str());
        std::vector<uint64_t> users;
        for (const auto& it : w.pending)
            if (it.second->module == number(handle)) users.push_back(it.first);
        if (!users.empty()) violation("a module was unloaded while %zu of its kernels were pending", users.size());
        for (uint64_t op : users) wait_for_op(lock, op);
        for (auto it = w.functions.begin(); it != w.functions.end();) {
            if (it->second.module != number(handle)) {
                ++it;
                continue;
            }
            w.gone[it->first] = "function";
            it = w.functions.erase(it);
        }
        w.modules.erase(number(handle));
        w.gone[number(handle)] = "module";
        return CUDA_SUCCESS;
    });
}

CUDA_API CUresult cuModuleGetFunction(CUfunction* function, CUmodule handle, const char* name) {
    return with_context(__func__, [&](Lock&, Gpu&) -> CUresult {
        if (!function || !name) return misuse(CUDA_ERROR_INVALID_VALUE, "no name, or nowhere to put the function");
        World& w = world();
        const auto module = w.modules.find(number(handle));
        if (module == w.modules.end()) return misuse(CUDA_ERROR_INVALID_HANDLE, "%s", describe("module", handle).c_str());
        const auto kernel = module->second.kernels.find(name);
        if (kernel == module->second.kernels.end()) return CUDA_ERROR_NOT_FOUND;
        for (const auto& it : w.functions)
            if (it.second.module == number(handle) && it.second.kernel.name == name) {
                *function = pointer(it.first);
                return CUDA_SUCCESS;
            }
        *function = new_handle();
        w.functions[number(*function)] = {number(handle), kernel->second};
        return CUDA_SUCCESS;
    });
}

CUDA_API CUresult cuLaunchKernel(CUfunction handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                                 unsigned block_z, unsigned shared_bytes, CUstream stream_handle, void** params, void** extra) {
    const char* const call = __func__;
    return with_context(call, [&](Lock&, Gpu& gpu) -> CUresult {
        World& w = world();
        const auto it = w.functions.find(number(handle));
        if (it == w.functions.end()) return misuse(CUDA_ERROR_INVALID_HANDLE, "%s", describe("function", handle).c_str());
        const Kernel& kernel = it->second.kernel;
        const char* const name = kernel.name.c_str();
        CUresult error = CUDA_SUCCESS;
        Stream* stream = stream_of(stream_handle, gpu, &error);
        if (!stream) return error;
        const int module_gpu = w.modules.at(it->second.module).gpu;
        if (module_gpu != gpu.ordinal || stream->gpu != gpu.ordinal)
            return misuse(CUDA_ERROR_INVALID_HANDLE, "`%s` is of GPU %d, the stream of GPU %d, the current context of GPU %d", name, module_gpu,
                          stream->gpu, gpu.ordinal);
        const FakeDim grid = {grid_x, grid_y, grid_z}, block = {block_x, block_y, block_z};
        if (is_too_large(grid, block))
            return misuse(CUDA_ERROR_INVALID_VALUE, "`%s` on a grid of %u x %u x %u blocks of %u x %u x %u threads", name, grid.x, grid.y, grid.z,
                          block.x, block.y, block.z);
        if (uint64_t(block.x) * block.y * block.z > kernel.most_threads)
            return misuse(CUDA_ERROR_INVALID_VALUE, "`%s` in blocks of %u x %u x %u threads, compiled for %" PRIu64, name, block.x, block.y, block.z,
                          kernel.most_threads);
        if (shared_bytes > 49152) return misuse(CUDA_ERROR_INVALID_VALUE, "`%s` with %u bytes of shared memory", name, shared_bytes);
        if (extra) return misuse(CUDA_ERROR_NOT_SUPPORTED, "`%s` with packed arguments, which the fake does not read", name);
        if (!params && !kernel.param_bytes.empty())
            return misuse(CUDA_ERROR_INVALID_VALUE, "`%s` takes %zu arguments and got none", name, kernel.param_bytes.size());
        if (kernels().count(kernel.name) == 0) return misuse(CUDA_ERROR_NOT_SUPPORTED, "the fake has no kernel `%s`", name);

        const auto arguments = std::make_shared<Arguments>(kernel, params);
        Op op;
        op.call = call;
        op.is_work = true;
        op.module = it->second.module;
        op.run = [=, ordinal = gpu.ordinal, kernel_name = kernel.name](Lock& lock) {
            return run_kernel(lock, ordinal, kernel_name, grid, block, shared_bytes, *arguments);
        };
        w.counts.n_launches += 1;
        submit(*stream, std::move(op));
        return CUDA_SUCCESS;
    });
}
