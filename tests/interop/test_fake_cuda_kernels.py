"""The fake driver's modules and launches, called well and badly."""
import ctypes

import pytest

from fake_cuda import *


PTX = b"""//
// Made by hand.
//
.version 8.0
.target sm_80
.address_size 64

.visible .entry selftest_fill_u32(
    .param .u64 .ptr .global .align 4 selftest_fill_u32_param_0,
    .param .u32 selftest_fill_u32_param_1, /* how many */
    .param .u32 selftest_fill_u32_param_2
)
.maxntid 256, 1, 1
{
    ret;
}
.visible .entry selftest_shape(.param .u64 a) { ret; }
.visible .entry nobody_wrote_this(.param .align 8 .b8 struct[24], .param .f32 x) { ret; }
.visible .entry without_arguments() { ret; }
// .entry in_a_comment(.param .u64 a)
"""


def launch(driver, function, args, grid=(1, 1, 1), block=(1, 1, 1), shared=0, stream=None, extra=None):
    params = (ctypes.c_void_p * len(args))(*[ctypes.addressof(it) for it in args]) if args is not None else None
    result = driver.cuLaunchKernel(function, *grid, *block, shared, stream, params, extra)
    if args is not None: [ctypes.memset(ctypes.addressof(it), 0xee, ctypes.sizeof(it)) for it in args]  # only the call may read them
    return result


def u64(it): return ctypes.c_uint64(it)
def u32(it): return ctypes.c_uint32(it)


def test_a_kernel_runs_on_its_stream_with_the_arguments_of_the_call(driver):
    module, stream = driver.made(driver.cuModuleLoadData, PTX), driver.stream()
    fill, shape = driver.made(driver.cuModuleGetFunction, module, b"selftest_fill_u32"), driver.made(driver.cuModuleGetFunction, module, b"selftest_shape")
    assert driver.made(driver.cuModuleGetFunction, module, b"selftest_shape") == shape
    address = driver.alloc(1000)
    hold(driver)
    assert launch(driver, fill, [u64(address + 4), u32(3), u32(7)], stream=stream) == 0
    assert driver.cuStreamQuery(stream) == NOT_READY
    driver.control()
    driver.ok(driver.cuStreamSynchronize(stream))
    assert driver.read(address, 20) == POISON * 4 + b"".join(n.to_bytes(4, "little") for n in (7, 8, 9)) + POISON * 4
    assert launch(driver, shape, [u64(address)], (1, 2, 3), (4, 5, 6), 77) == 0
    assert driver.read(address, 28) == b"".join(n.to_bytes(4, "little") for n in (1, 2, 3, 4, 5, 6, 77))
    driver.ok(driver.cuMemFree_v2(address)), driver.ok(driver.cuModuleUnload(module))
    assert driver.report()["launches"] == 2 and driver.violations() == []
    assert driver.cuModuleUnload(module) == launch(driver, shape, [u64(address)]) == INVALID_HANDLE


def test_text_that_is_no_ptx_and_ptx_that_is_too_new_are_refused(driver):
    out = ctypes.c_void_p()
    load = lambda text: driver.cuModuleLoadData(ctypes.byref(out), text)
    for text in (b"", b"hello", b"\x7fELF", b".version 8.0", b".version x\n.target sm_80", PTX.replace(b"sm_80", b"nothing"), PTX[:150]):
        assert load(text) == INVALID_PTX, text
    assert load(PTX.replace(b"version 8.0", b"version 9.0")) == load(PTX.replace(b"version 8.0", b"version 8.8")) == UNSUPPORTED_PTX
    assert load(PTX.replace(b"sm_80", b"sm_90")) == INVALID_PTX
    driver.ok(load(PTX.replace(b"version 8.0", b"version 8.7"))), driver.ok(load(PTX.replace(b"sm_80", b"sm_52")))
    assert driver.violations() == []
    assert driver.cuModuleLoadData(None, PTX) == load(None) == INVALID_VALUE


def test_kernels_that_are_not_there_are_errors(driver):
    module, out = driver.made(driver.cuModuleLoadData, PTX), ctypes.c_void_p()
    find = lambda name: driver.cuModuleGetFunction(ctypes.byref(out), module, name)
    assert find(b"absent") == find(b"in_a_comment") == find(b"") == NOT_FOUND and driver.violations() == []
    function = driver.made(driver.cuModuleGetFunction, module, b"nobody_wrote_this")
    assert launch(driver, function, [(ctypes.c_char * 24)(), ctypes.c_float(1)]) == NOT_SUPPORTED
    assert driver.violations() == ["cuLaunchKernel: CUDA_ERROR_NOT_SUPPORTED: the fake has no kernel `nobody_wrote_this`"]
    assert find(None) == driver.cuModuleGetFunction(None, module, b"x") == INVALID_VALUE
    assert driver.cuModuleGetFunction(ctypes.byref(out), 1234, b"x") == INVALID_HANDLE


def test_launches_that_no_gpu_accepts_are_errors(driver):
    module = driver.made(driver.cuModuleLoadData, PTX)
    function, address = driver.made(driver.cuModuleGetFunction, module, b"selftest_shape"), driver.alloc(28)
    for grid, block in [((0, 1, 1), (1, 1, 1)), ((1, 1, 1), (1, 0, 1)), ((1, 1, 1), (1025, 1, 1)), ((1, 1, 1), (32, 33, 1)), ((1, 65536, 1), (1, 1, 1)), ((1, 1, 1), (1, 1, 65))]:
        assert launch(driver, function, [u64(address)], grid, block) == INVALID_VALUE
    bounded = driver.made(driver.cuModuleGetFunction, module, b"selftest_fill_u32")
    assert launch(driver, bounded, [u64(address), u32(1), u32(0)], block=(257, 1, 1)) == INVALID_VALUE
    assert launch(driver, function, [u64(address)], shared=50000) == launch(driver, function, None) == INVALID_VALUE
    assert launch(driver, function, [u64(address)], extra=(ctypes.c_void_p * 1)()) == NOT_SUPPORTED
    assert launch(driver, function, [u64(address)], stream=1 << 40) == launch(driver, 1 << 40, [u64(address)]) == INVALID_HANDLE
    driver.ok(driver.cuCtxPushCurrent_v2(driver.retain(1)))
    assert launch(driver, function, [u64(address)]) == INVALID_HANDLE, "of another GPU"
    assert len(driver.violations()) == 13


@pytest.mark.parametrize("shift, n, error", [(4, 1000, ILLEGAL_ADDRESS), (-4, 1, ILLEGAL_ADDRESS), (2, 1, MISALIGNED)])
def test_a_kernel_that_leaves_its_memory_breaks_the_context(driver, shift, n, error):
    module, address = driver.made(driver.cuModuleLoadData, PTX), driver.alloc(4000)
    function = driver.made(driver.cuModuleGetFunction, module, b"selftest_fill_u32")
    assert launch(driver, function, [u64(address + shift), u32(n), u32(0)]) == 0, "a launch comes back at once"
    assert driver.cuCtxSynchronize() == error and driver.cuMemFree_v2(address) == error
    assert "kernel `selftest_fill_u32` failed" in driver.violations()[-1]


def test_a_kernel_may_not_touch_memory_of_another_gpu(driver):
    address, module_text = driver.alloc(28), PTX
    driver.ok(driver.cuCtxPushCurrent_v2(driver.retain(1)))
    module = driver.made(driver.cuModuleLoadData, module_text)
    assert launch(driver, driver.made(driver.cuModuleGetFunction, module, b"selftest_shape"), [u64(address)]) == 0
    assert driver.cuStreamSynchronize(None) == ILLEGAL_ADDRESS
    assert "is memory of GPU 0, the kernel runs on GPU 1" in driver.violations()[0]


def test_a_module_unloaded_under_its_kernel_is_noticed(driver):
    module, address = driver.made(driver.cuModuleLoadData, PTX), driver.alloc(28)
    function = driver.made(driver.cuModuleGetFunction, module, b"selftest_shape")
    hold(driver)
    assert launch(driver, function, [u64(address)]) == 0
    let_go_when(driver, lambda report: report["violations"])
    driver.ok(driver.cuModuleUnload(module))
    assert driver.violations() == ["cuModuleUnload: a module was unloaded while 1 of its kernels were pending"]
