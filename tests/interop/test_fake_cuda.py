"""The fake driver itself: GPUs, contexts, memory and host memory, called well and badly."""
import ctypes, re, subprocess, threading

import pytest

from fake_cuda import *
from fake_cuda import ROOT

LIVE = {"contexts", "memory", "registrations", "host_allocations", "streams", "events", "modules"}


def test_the_library_shows_the_functions_of_the_table_and_nothing_else():
    done = subprocess.run(["nm", "-D", "--defined-only", build()], capture_output=True, text=True, check=True)
    assert {line.split()[-1] for line in done.stdout.splitlines()} == set(FUNCTIONS)


def test_building_again_changes_nothing():
    before = build().stat()
    assert build().stat().st_mtime_ns == before.st_mtime_ns
    assert (build().parent / "libcuda.so.1").resolve() == build().resolve()


def test_the_library_has_every_function_that_the_crate_calls():
    room = ROOT / "crates/unladen/src/cuda"
    code = "".join(re.sub(r"//.*", "", path.read_text()) for path in room.rglob("*.rs"))
    named = set(re.findall(r"\b(cu[A-Z]\w*)\(", code))
    if not named: pytest.skip("the crate calls no driver function")
    assert named <= set(FUNCTIONS), f"not in the fake: {sorted(named - set(FUNCTIONS))}"


def test_nothing_works_before_init(new_driver):
    driver = new_driver()
    out = ctypes.c_uint64()
    assert driver.cuDeviceGetCount(ctypes.byref(out)) == NOT_INITIALIZED
    assert driver.cuMemAlloc_v2(ctypes.byref(out), 1) == NOT_INITIALIZED
    assert driver.made(driver.cuDriverGetVersion, kind=ctypes.c_int) == 12080
    assert driver.word(driver.cuGetErrorName, 2) == (0, "CUDA_ERROR_OUT_OF_MEMORY")
    assert driver.cuInit(1) == INVALID_VALUE
    assert len(driver.violations()) == 3


def test_errors_have_the_names_and_words_of_the_driver(driver):
    assert driver.word(driver.cuGetErrorName, 0) == (0, "CUDA_SUCCESS")
    assert driver.word(driver.cuGetErrorString, 2) == (0, "out of memory")
    assert driver.word(driver.cuGetErrorString, 600) == (0, "device not ready")
    assert driver.word(driver.cuGetErrorName, 12345) == (INVALID_VALUE, None)
    assert driver.word(driver.cuGetErrorString, 12345) == (INVALID_VALUE, None)
    assert driver.cuGetErrorName(0, None) == INVALID_VALUE


def test_gpus_are_as_the_settings_say(new_driver):
    driver = new_driver("gpus 3", "memory 1000000000", "memory 5000 1", "compute 9 0", "driver_version 12040")
    driver.ok(driver.cuInit(0))
    driver.ok(driver.cuInit(0))
    assert driver.made(driver.cuDeviceGetCount, kind=ctypes.c_int) == 3
    assert driver.made(driver.cuDriverGetVersion, kind=ctypes.c_int) == 12040
    assert [driver.made(driver.cuDeviceTotalMem_v2, i, kind=ctypes.c_size_t) for i in range(3)] == [1000000000, 5000, 1000000000]
    assert driver.made(driver.cuDeviceGet, 2, kind=ctypes.c_int) == 2
    assert [driver.made(driver.cuDeviceGetAttribute, which, 0, kind=ctypes.c_int) for which in (75, 76, 41)] == [9, 0, 1]
    name = ctypes.create_string_buffer(b"x" * 20, 20)
    driver.ok(driver.cuDeviceGetName(name, 20, 1))
    assert name.value == b"Fake GPU 1"
    driver.ok(driver.cuDeviceGetName(name, 5, 1))
    assert name.raw[:5] == b"Fake\0", "cut, with its end"
    assert driver.violations() == []
    out = ctypes.c_int()
    assert driver.cuDeviceGet(ctypes.byref(out), 3) == INVALID_DEVICE
    assert driver.cuDeviceGet(ctypes.byref(out), -1) == INVALID_DEVICE
    assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_void_p()), 3) == INVALID_DEVICE
    assert driver.violations() == [], "whoever asks for a GPU that is not there did nothing wrong"
    assert driver.cuDeviceGetCount(None) == driver.cuDeviceGet(None, 0) == driver.cuDriverGetVersion(None) == INVALID_VALUE
    assert driver.cuDeviceGetName(name, 0, 0) == driver.cuDeviceTotalMem_v2(None, 0) == INVALID_VALUE
    assert driver.cuDeviceGetName(name, 20, 7) == driver.cuDeviceTotalMem_v2(ctypes.byref(ctypes.c_size_t()), 7) == INVALID_DEVICE
    assert driver.cuDeviceGetAttribute(ctypes.byref(out), 9999, 0) == driver.cuDeviceGetAttribute(None, 1, 0) == INVALID_VALUE
    assert driver.cuDeviceGetAttribute(ctypes.byref(out), 1, 5) == INVALID_DEVICE
    assert len(driver.violations()) == 10


def test_a_machine_without_gpus_says_so_at_init(new_driver):
    driver = new_driver("gpus 0")
    assert driver.cuInit(0) == NO_DEVICE
    assert driver.violations() == []


def test_a_primary_context_is_counted_and_one_handle(driver):
    assert driver.retain() == driver.context != driver.retain(1)
    flags, active = ctypes.c_uint(), ctypes.c_int()
    driver.ok(driver.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active)))
    assert active.value == 1
    assert [it["contexts_retained"] for it in driver.report()["gpus"]] == [2, 1]
    for gpu in (0, 0, 1): driver.ok(driver.cuDevicePrimaryCtxRelease_v2(gpu))
    driver.ok(driver.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active)))
    assert active.value == 0
    assert driver.violations() == [] and driver.report()["live"] == dict.fromkeys(LIVE, 0)
    # It is still current here, and of no use.
    assert driver.cuCtxSynchronize() == CONTEXT_IS_DESTROYED
    assert driver.cuDevicePrimaryCtxRelease_v2(0) == INVALID_CONTEXT
    assert driver.cuCtxPushCurrent_v2(driver.context) == INVALID_CONTEXT
    assert driver.cuDevicePrimaryCtxRelease_v2(9) == INVALID_DEVICE
    assert driver.cuDevicePrimaryCtxGetState(9, ctypes.byref(flags), ctypes.byref(active)) == INVALID_DEVICE
    assert driver.cuDevicePrimaryCtxGetState(0, None, None) == driver.cuDevicePrimaryCtxRetain(None, 0) == INVALID_VALUE
    assert len(driver.violations()) == 5
    # Retained again, it is what it was.
    assert driver.retain() == driver.context
    driver.ok(driver.cuCtxSynchronize())


def test_current_contexts_are_a_stack(driver):
    first, second = driver.context, driver.retain(1)
    current = lambda: driver.made(driver.cuCtxGetCurrent)
    device = lambda: driver.made(driver.cuCtxGetDevice, kind=ctypes.c_int)
    driver.ok(driver.cuCtxPushCurrent_v2(second))
    assert (current(), device()) == (second, 1)
    assert driver.made(driver.cuCtxPopCurrent_v2) == second and (current(), device()) == (first, 0)
    driver.ok(driver.cuCtxSetCurrent(second))
    assert current() == second
    driver.ok(driver.cuCtxPopCurrent_v2(None))
    assert current() is None, "setting replaced the top"
    driver.ok(driver.cuCtxSetCurrent(None))
    driver.ok(driver.cuCtxSetCurrent(first))
    driver.ok(driver.cuCtxSetCurrent(None))
    assert current() is None and driver.violations() == []
    assert driver.cuCtxPopCurrent_v2(None) == driver.cuCtxPushCurrent_v2(None) == driver.cuCtxPushCurrent_v2(4096) == INVALID_CONTEXT
    assert driver.cuCtxSetCurrent(4096) == INVALID_CONTEXT and driver.cuCtxGetCurrent(None) == INVALID_VALUE
    out = ctypes.c_uint64()
    assert driver.cuMemAlloc_v2(ctypes.byref(out), 1) == driver.cuStreamCreate(ctypes.byref(out), 0) == INVALID_CONTEXT
    assert driver.cuEventCreate(ctypes.byref(out), 0) == driver.cuMemcpyHtoD_v2(0, None, 1) == INVALID_CONTEXT
    assert driver.cuCtxGetDevice(ctypes.byref(out)) == driver.cuCtxSynchronize() == INVALID_CONTEXT


def test_a_thread_has_a_stack_of_its_own(driver):
    seen = []

    def other():
        seen.append(driver.made(driver.cuCtxGetCurrent))
        driver.ok(driver.cuCtxPushCurrent_v2(driver.context))
        seen.append(driver.alloc(10))

    thread = threading.Thread(target=other)
    thread.start(), thread.join()
    assert seen[0] is None and driver.made(driver.cuCtxGetCurrent) == driver.context
    driver.ok(driver.cuMemFree_v2(seen[1]))
    assert driver.violations() == []


def test_what_a_context_leaves_behind_is_named(driver):
    stream, event, host = driver.stream(), driver.event(), driver.pinned(4096)
    address, other = driver.alloc(100), driver.retain(1)
    driver.ok(driver.cuDevicePrimaryCtxRelease_v2(0))
    report = driver.report()
    assert report["left_in_contexts"] == {"memory": 1, "stream": 1, "event": 1, "pinned host memory": 1}
    assert report["live"] == dict.fromkeys(LIVE, 0) | {"contexts": 1}
    assert report["gpus"][0]["taken_bytes"]["live"] == report["pinned_bytes"]["live"] == 0
    assert len(report["violations"]) == 1 and "1 of kind stream" in report["violations"][0], report["violations"]
    driver.ok(driver.cuCtxPushCurrent_v2(other))
    assert driver.cuMemFree_v2(address) == INVALID_VALUE
    assert driver.cuEventQuery(event) == driver.cuStreamQuery(stream) == INVALID_HANDLE
    assert driver.cuMemHostUnregister(host.address) == NOT_REGISTERED


def test_allocations_take_whole_blocks_of_the_free_figure(driver):
    gpu = lambda: driver.report()["gpus"][0]
    assert driver.free_bytes() == 8 * GIB
    small = [driver.alloc(n) for n in (1, 1000, MIB - 1)]
    assert driver.free_bytes() == 8 * GIB - 2 * MIB, "small ones share a block"
    large = driver.alloc(MIB)
    assert driver.free_bytes() == 8 * GIB - 4 * MIB
    larger = driver.alloc(2 * MIB + 1)
    assert driver.free_bytes() == 8 * GIB - 8 * MIB
    asked_bytes = 1 + 1000 + MIB - 1 + MIB + 2 * MIB + 1
    assert gpu()["asked_bytes"] == {"live": asked_bytes, "peak": asked_bytes}
    assert gpu()["taken_bytes"] == {"live": 8 * MIB, "peak": 8 * MIB} and gpu()["allocations"] == 5
    second_block = driver.alloc(MIB - 512), driver.alloc(512), driver.alloc(512)
    assert driver.free_bytes() == 8 * GIB - 10 * MIB
    for it in [*small, large, larger, *second_block]:
        assert it % 256 == 0
        driver.ok(driver.cuMemFree_v2(it))
    assert driver.free_bytes() == 8 * GIB and gpu()["taken_bytes"] == {"live": 0, "peak": 10 * MIB}
    assert driver.violations() == []


def test_a_full_gpu_is_out_of_memory_and_no_violation(new_driver):
    driver = new_driver("memory 10485760", "context_bytes 1048576", "used 2097152 0")
    driver.open()
    assert driver.free_bytes() == 7 * MIB
    first = driver.alloc(5 * MIB)  # three blocks
    out = ctypes.c_uint64(77)
    assert driver.cuMemAlloc_v2(ctypes.byref(out), 1) == driver.cuMemAlloc_v2(ctypes.byref(out), 2**63) == OUT_OF_MEMORY and out.value == 77
    driver.control("used 0 0")
    assert driver.free_bytes() == 3 * MIB, "somebody else went"
    driver.alloc(100)
    driver.ok(driver.cuMemFree_v2(first))
    assert driver.violations() == []
    driver.control("used 20000000")
    assert driver.free_bytes() == 5 * MIB, "GPU 0 has a figure of its own, the environment's"


def test_a_context_that_does_not_fit_is_out_of_memory(new_driver):
    driver = new_driver("memory 1000", "context_bytes 1001")
    driver.ok(driver.cuInit(0))
    assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_void_p()), 0) == OUT_OF_MEMORY


def test_fresh_memory_is_poisoned_and_a_device_address_is_no_host_address(driver):
    address = driver.alloc(3 * MIB)
    assert driver.read(address, 3 * MIB) == POISON * (3 * MIB)
    assert address >> 48, "no user address has these bits"
    assert not any(f"{address:x}" in line for line in open("/proc/self/maps"))


def test_poison_can_be_left_out(new_driver):
    driver = new_driver("poison off")
    driver.open()
    assert driver.read(driver.alloc(10), 10) == bytes(10)


def test_frees_that_are_none_are_noticed(driver):
    address = driver.alloc(100)
    assert driver.cuMemFree_v2(address + 1) == driver.cuMemFree_v2(0) == driver.cuMemFree_v2(driver.context) == INVALID_VALUE
    driver.ok(driver.cuMemFree_v2(address))
    assert driver.cuMemFree_v2(address) == INVALID_VALUE
    assert driver.alloc(100) != address
    out = ctypes.c_uint64()
    assert driver.cuMemAlloc_v2(ctypes.byref(out), 0) == driver.cuMemAlloc_v2(None, 1) == INVALID_VALUE
    assert driver.cuMemGetInfo_v2(None, None) == INVALID_VALUE
    violations = driver.violations()
    assert len(violations) == 7 and "which was freed before" in violations[3], violations


def test_memory_of_another_gpu_is_valid_in_copies_and_frees(driver):
    second = driver.retain(1)
    driver.ok(driver.cuCtxPushCurrent_v2(second))
    there = driver.alloc(100)
    driver.ok(driver.cuCtxPopCurrent_v2(None))
    here, host = driver.alloc(100), Host(4096, b"a")
    driver.ok(driver.cuMemcpyHtoD_v2(there, host.address, 100))
    driver.ok(driver.cuMemcpyDtoD_v2(here, there, 100))
    driver.ok(driver.cuCtxSynchronize())
    assert driver.read(here, 100) == b"a" * 100
    assert driver.report()["gpus"][1]["asked_bytes"]["live"] == 100 and driver.report()["copies"]["between_gpus"] == {"n": 1, "bytes": 100}
    driver.ok(driver.cuMemFree_v2(there))
    assert driver.violations() == []


def test_a_pointer_tells_what_it_is(driver):
    address, host = driver.alloc(1000), driver.pinned(4096)

    def attribute(which, pointer, kind):
        out = kind()
        return driver.cuPointerGetAttribute(ctypes.byref(out), which, pointer), out.value

    assert attribute(2, address + 999, ctypes.c_uint) == (0, 2) and attribute(2, host.address, ctypes.c_uint) == (0, 1)
    assert attribute(1, address, ctypes.c_void_p) == (0, driver.context)
    assert attribute(9, address, ctypes.c_int) == (0, 0) and attribute(8, address, ctypes.c_bool) == (0, False)
    assert attribute(11, address + 5, ctypes.c_uint64) == (0, address) and attribute(12, address + 5, ctypes.c_size_t) == (0, 1000)
    assert attribute(3, address + 5, ctypes.c_uint64) == (0, address + 5) and attribute(13, address, ctypes.c_bool) == (0, True)
    assert attribute(4, host.address, ctypes.c_uint64) == (0, host.address) and attribute(4, address, ctypes.c_uint64)[0] == INVALID_VALUE
    assert attribute(2, address + 1000, ctypes.c_uint)[0] == attribute(2, 4096, ctypes.c_uint)[0] == INVALID_VALUE
    assert driver.violations() == [], "asking is fine"
    assert attribute(77, address, ctypes.c_uint)[0] == driver.cuPointerGetAttribute(None, 2, address) == INVALID_VALUE
    assert len(driver.violations()) == 2


def test_host_memory_is_registered_once_and_unregistered_where_it_begins(driver):
    host = driver.pinned(8192)
    assert driver.report()["live"]["registrations"] == 1 and driver.report()["pinned_bytes"] == {"live": 8192, "peak": 8192}
    assert driver.cuMemHostRegister_v2(host.address, 8192, 0) == ALREADY_REGISTERED
    assert driver.cuMemHostRegister_v2(host.address + 4096, 1, 0) == ALREADY_REGISTERED
    assert driver.cuMemHostUnregister(host.address + 4096) == NOT_REGISTERED
    driver.ok(driver.cuMemHostUnregister(host.address))
    assert driver.cuMemHostUnregister(host.address) == NOT_REGISTERED
    assert driver.cuMemHostRegister_v2(None, 1, 0) == driver.cuMemHostRegister_v2(host.address, 0, 0) == INVALID_VALUE
    assert driver.cuMemHostRegister_v2(host.address, 1, 16) == driver.cuMemHostUnregister(None) == INVALID_VALUE
    assert driver.cuMemHostRegister_v2(0x1000, 4096, 0) == INVALID_VALUE, "nothing is mapped there"
    assert driver.cuMemHostRegister_v2(host.address, 2**62, 0) == INVALID_VALUE
    assert driver.cuMemHostRegister_v2(host.address, 1, 8) == NOT_SUPPORTED
    assert driver.report()["live"]["registrations"] == 0 and driver.report()["pinned_bytes"] == {"live": 0, "peak": 8192}
    assert len(driver.violations()) == 10


def test_host_memory_of_the_driver_is_pinned(driver):
    address = driver.made(driver.cuMemHostAlloc, 5000, 0)
    assert ctypes.string_at(address, 5000) == POISON * 5000
    assert driver.report()["live"]["host_allocations"] == 1 and driver.report()["pinned_bytes"]["live"] == 5000
    assert driver.cuMemHostUnregister(address) == NOT_REGISTERED
    driver.ok(driver.cuMemFreeHost(address))
    out = ctypes.c_void_p()
    assert driver.cuMemFreeHost(address) == driver.cuMemFreeHost(None) == driver.cuMemHostAlloc(ctypes.byref(out), 0, 0) == INVALID_VALUE
    assert driver.cuMemHostAlloc(None, 1, 0) == driver.cuMemHostAlloc(ctypes.byref(out), 1, 8) == INVALID_VALUE
    registered = driver.pinned(4096)
    assert driver.cuMemFreeHost(registered.address) == INVALID_VALUE
    assert len(driver.violations()) == 7


def test_pinning_has_a_limit_if_told(new_driver):
    driver = new_driver("pinnable 10000")
    driver.open()
    first, second = driver.pinned(8192), Host(4096)
    assert driver.cuMemHostRegister_v2(second.address, 4096, 0) == OUT_OF_MEMORY
    assert driver.cuMemHostAlloc(ctypes.byref(ctypes.c_void_p()), 1809, 0) == OUT_OF_MEMORY
    driver.ok(driver.cuMemHostUnregister(first.address))
    driver.ok(driver.cuMemHostRegister_v2(second.address, 4096, 0))
    assert driver.violations() == []
