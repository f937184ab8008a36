"""The fake driver's work: streams, events, copies and kernels, what is held, delayed and told to fail, called well and badly."""
import ctypes, json, os, signal, subprocess, sys, threading, time

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


def upload(driver, data):
    """Device memory that holds these bytes."""
    address, host = driver.alloc(len(data)), Host((len(data) + 4095) // 4096 * 4096)
    ctypes.memmove(host.address, data, len(data))
    driver.ok(driver.cuMemcpyHtoD_v2(address, host.address, len(data)))
    driver.ok(driver.cuCtxSynchronize())
    return address


def hold(driver, *lines): driver.control("hold on", *lines)


def let_go_when(driver, is_so):
    """Lets work run as soon as the report says so, while this thread waits in a call."""

    def watch():
        while not is_so(driver.report()): time.sleep(0.001)
        driver.control()

    threading.Thread(target=watch, daemon=True).start()


# Copies


@pytest.mark.parametrize("is_pinned", [False, True])
@pytest.mark.parametrize("n_bytes", [1, 7, 4096, 300_001, 3 * MIB])
def test_bytes_go_there_and_back(driver, n_bytes, is_pinned):
    pages = (n_bytes + 4095) // 4096 * 4096
    source, target = (driver.pinned(pages) if is_pinned else Host(pages) for _ in range(2))
    data = os.urandom(n_bytes)
    ctypes.memmove(source.address, data, n_bytes)
    first, second, stream = driver.alloc(n_bytes + 10), driver.alloc(n_bytes), driver.stream()
    driver.ok(driver.cuMemcpyHtoD_v2(first + 3, source.address, n_bytes))
    driver.ok(driver.cuMemcpyDtoD_v2(second, first + 3, n_bytes))
    driver.ok(driver.cuMemcpyDtoH_v2(target.address, second, n_bytes))
    assert target.bytes(n_bytes) == data
    assert driver.read(first, n_bytes + 10) == POISON * 3 + data + POISON * 7
    target.fill(b"x")
    driver.ok(driver.cuMemsetD8Async(first, 0, n_bytes + 10, stream))
    driver.ok(driver.cuMemcpyHtoDAsync_v2(first, source.address, n_bytes, stream))
    driver.ok(driver.cuMemcpyDtoDAsync_v2(second, first, n_bytes, stream))
    driver.ok(driver.cuMemcpyDtoHAsync_v2(target.address, second, n_bytes, stream))
    driver.ok(driver.cuStreamSynchronize(stream))
    assert target.bytes(n_bytes) == data
    copies = driver.report()["copies"]
    assert copies["h2d"] == {"n": 2, "bytes": 2 * n_bytes} == copies["d2d"] and copies["d2h"]["n"] == 3
    assert copies["async_pinned" if is_pinned else "async_pageable"] == {"n": 2, "bytes": 2 * n_bytes}
    assert driver.violations() == []


def test_a_pinned_source_is_read_when_the_copy_runs(driver):
    slot, address, stream = driver.pinned(4096, b"a"), driver.alloc(4096), driver.stream()
    hold(driver)
    driver.ok(driver.cuMemcpyHtoDAsync_v2(address, slot.address, 4096, stream))
    event = driver.recorded(stream)
    assert driver.cuEventQuery(event) == driver.cuStreamQuery(stream) == NOT_READY
    slot.fill(b"b")  # the mistake
    driver.control()
    driver.ok(driver.cuEventSynchronize(event))
    driver.ok(driver.cuEventQuery(event)), driver.ok(driver.cuStreamQuery(stream))
    assert driver.read(address, 4096) == b"b" * 4096
    violations = driver.violations()
    assert len(violations) == 1 and "changed between the call and the copy" in violations[0] and "cuMemcpyHtoDAsync_v2" in violations[0]


def test_a_slot_that_is_reused_after_its_event_is_fine(driver):
    slot, stream = driver.pinned(4096), driver.stream()
    addresses = [driver.alloc(4096) for _ in range(5)]
    driver.control("delay_us 300")
    event = None
    for n, address in enumerate(addresses):
        if event: driver.ok(driver.cuEventSynchronize(event)), driver.ok(driver.cuEventDestroy_v2(event))
        slot.fill(bytes([n]))
        driver.ok(driver.cuMemcpyHtoDAsync_v2(address, slot.address, 4096, stream))
        event = driver.recorded(stream)
    driver.ok(driver.cuEventSynchronize(event))
    assert [driver.read(it, 4096) for it in addresses] == [bytes([n]) * 4096 for n in range(5)]
    assert driver.violations() == [] and driver.report()["copies"]["peak_in_flight"] == 1


def test_a_delay_is_waited_for(driver):
    slot, address, stream = driver.pinned(4096), driver.alloc(4096), driver.stream()
    driver.control("delay_us 30000")
    start_s = time.monotonic()
    for _ in range(2): driver.ok(driver.cuMemcpyHtoDAsync_v2(address, slot.address, 4096, stream))
    driver.ok(driver.cuStreamSynchronize(stream))
    assert time.monotonic() - start_s >= 0.06


def test_a_pageable_source_is_taken_at_the_call(driver):
    source, address, stream = Host(4096, b"a"), driver.alloc(8192), driver.stream()
    hold(driver)
    driver.ok(driver.cuMemcpyHtoDAsync_v2(address, source.address, 4096, stream))
    # Also the plain call comes back before the bytes are there.
    driver.ok(driver.cuMemcpyHtoD_v2(address + 4096, source.address, 4096))
    source.fill(b"b")
    assert driver.cuStreamQuery(stream) == driver.cuStreamQuery(None) == NOT_READY
    driver.control()
    driver.ok(driver.cuCtxSynchronize())
    assert driver.read(address, 8192) == b"a" * 8192
    assert driver.violations() == []


def test_copies_between_devices_and_fills_come_back_before_they_are_done(driver):
    source, target = upload(driver, b"a" * 100), driver.alloc(100)
    there = driver.retain(1)
    hold(driver)
    driver.ok(driver.cuMemsetD8_v2(source, 7, 50))
    driver.ok(driver.cuMemcpyDtoD_v2(target, source, 100))
    driver.ok(driver.cuMemcpyPeer(source, driver.context, target, driver.context, 0))
    assert driver.cuStreamQuery(None) == NOT_READY
    driver.control()
    driver.ok(driver.cuStreamSynchronize(None))
    assert driver.read(target, 100) == b"\7" * 50 + b"a" * 50
    assert driver.report()["copies"]["fills"] == {"n": 1, "bytes": 50} and there and driver.violations() == []


def test_a_target_on_the_host_shows_nothing_until_the_copy_ran(driver):
    address, target, stream = upload(driver, b"a" * 4096), driver.pinned(4096, b"a"), driver.stream()
    hold(driver)
    driver.ok(driver.cuMemcpyDtoHAsync_v2(target.address, address, 4096, stream))
    assert target.bytes() == POISON * 4096
    driver.control()
    driver.ok(driver.cuStreamSynchronize(stream))
    assert target.bytes() == b"a" * 4096


def test_ranges_that_leave_their_memory_are_errors(driver):
    address, other, host, stream = driver.alloc(100), driver.alloc(100), Host(4096), driver.stream()
    bad = [(address, 101), (address + 1, 100), (address - 1, 2), (address + 100, 1), (address, 2**64 - 1), (address + 50, 2**63), (host.address, 4), (0, 4)]
    for start, n in bad:
        assert driver.cuMemcpyHtoD_v2(start, host.address, n) == driver.cuMemcpyHtoDAsync_v2(start, host.address, n, stream) == INVALID_VALUE
        assert driver.cuMemcpyDtoH_v2(host.address, start, n) == driver.cuMemcpyDtoHAsync_v2(host.address, start, n, stream) == INVALID_VALUE
        assert driver.cuMemcpyDtoD_v2(start, other, n) == driver.cuMemcpyDtoDAsync_v2(other, start, n, stream) == INVALID_VALUE
        assert driver.cuMemsetD8_v2(start, 0, n) == driver.cuMemsetD8Async(start, 0, n, stream) == INVALID_VALUE
    assert driver.cuMemcpyDtoD_v2(address + 1, address, 50) == INVALID_VALUE, "they overlap"
    assert len(driver.violations()) == 8 * len(bad) + 1 and "run past the end" in driver.violations()[0]
    for n in (0, 100): driver.ok(driver.cuMemcpyDtoD_v2(address, other, n))
    driver.ok(driver.cuMemcpyHtoD_v2(0, None, 0)), driver.ok(driver.cuMemcpyDtoH_v2(None, 0, 0)), driver.ok(driver.cuMemsetD8_v2(0, 0, 0))
    assert len(driver.violations()) == 8 * len(bad) + 1, "nothing is nothing"


def test_host_memory_that_is_not_there_is_an_error_and_no_crash(driver):
    address, stream, edge = driver.alloc(8 * MIB), driver.stream(), Host(8192)
    for source, n in [(0, 10), (4096, 10), (address, 10), (4096, 5 * MIB), (2**47 - 8192, 10)]:
        assert driver.cuMemcpyHtoD_v2(address, source, n) == driver.cuMemcpyHtoDAsync_v2(address, source, n, stream) == INVALID_VALUE
        assert driver.cuMemcpyDtoH_v2(source, address, n) == driver.cuMemcpyDtoHAsync_v2(source, address, n, stream) == INVALID_VALUE
    driver.ok(driver.cuMemHostRegister_v2(edge.address, 4096, 0))
    assert driver.cuMemcpyHtoD_v2(address, edge.address + 4000, 200) == driver.cuMemcpyDtoH_v2(edge.address + 4000, address, 200) == INVALID_VALUE
    assert "pinned in part" in driver.violations()[-1]
    driver.ok(driver.cuCtxSynchronize())


def test_memory_freed_before_its_copy_ran_is_waited_for(driver):
    slot, address, stream = driver.pinned(4096), driver.alloc(4096), driver.stream()
    hold(driver)
    driver.ok(driver.cuMemcpyHtoDAsync_v2(address, slot.address, 4096, stream))
    let_go_when(driver, lambda report: report["frees_that_waited"] == 1)
    driver.ok(driver.cuMemFree_v2(address))
    driver.ok(driver.cuStreamQuery(stream))
    assert driver.report()["frees_that_waited"] == 1 and driver.violations() == []
    assert driver.cuMemcpyHtoDAsync_v2(address, slot.address, 4096, stream) == INVALID_VALUE
    assert "that were freed" in driver.violations()[0]


def test_memory_freed_while_another_context_copies_is_noticed(driver):
    slot, here = driver.pinned(4096), driver.alloc(4096)
    driver.ok(driver.cuCtxPushCurrent_v2(driver.retain(1)))
    stream = driver.stream()
    hold(driver)
    driver.ok(driver.cuMemcpyHtoDAsync_v2(here, slot.address, 4096, stream))
    let_go_when(driver, lambda report: report["violations"])
    driver.ok(driver.cuMemFree_v2(here))
    assert ["while 1 copies of another context used it" in it for it in driver.violations()] == [True]


def test_memory_unregistered_in_flight_is_noticed_and_breaks_the_context(driver):
    slot, address, stream = driver.pinned(4096), driver.alloc(4096), driver.stream()
    hold(driver)
    driver.ok(driver.cuMemcpyHtoDAsync_v2(address, slot.address, 4096, stream))
    event = driver.recorded(stream)
    driver.ok(driver.cuMemHostUnregister(slot.address))
    assert "were unregistered while 1 copies used them" in driver.violations()[0]
    driver.control()
    assert driver.cuEventSynchronize(event) == ILLEGAL_ADDRESS
    assert "registration of the source was gone" in driver.violations()[1]
    out = ctypes.c_uint64()
    assert driver.cuMemAlloc_v2(ctypes.byref(out), 1) == driver.cuCtxSynchronize() == driver.cuEventQuery(event) == ILLEGAL_ADDRESS
    assert driver.report()["gpus"][0]["broken_by"] == ILLEGAL_ADDRESS
    # Releasing it is what helps; GPU 1 never minded.
    driver.ok(driver.cuDevicePrimaryCtxRelease_v2(0))
    driver.retain()
    driver.ok(driver.cuCtxSynchronize())
    assert driver.read(upload(driver, b"ok"), 2) == b"ok"


def test_memory_unmapped_in_flight_is_noticed(driver):
    slot, address, stream = driver.pinned(8192), driver.alloc(8192), driver.stream()
    hold(driver)
    driver.ok(driver.cuMemcpyHtoDAsync_v2(address, slot.address, 8192, stream))
    libc = ctypes.CDLL(None)
    libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    assert libc.mmap(slot.address + 4096, 4096, 0, 0x32, -1, 0) == slot.address + 4096  # nobody may read it any more
    driver.control()
    assert driver.cuStreamSynchronize(stream) == ILLEGAL_ADDRESS
    assert driver.violations() == ["cuMemcpyHtoDAsync_v2: the source was gone when the copy ran"]


def test_pinned_memory_of_the_driver_freed_in_flight_is_noticed(driver):
    address, stream = driver.alloc(4096), driver.stream()
    host = driver.made(driver.cuMemHostAlloc, 4096, 0)
    hold(driver)
    driver.ok(driver.cuMemcpyHtoDAsync_v2(address, host, 4096, stream))
    let_go_when(driver, lambda report: report["violations"])
    driver.ok(driver.cuMemFreeHost(host))
    assert ["were freed while 1 copies used them" in it for it in driver.violations()] == [True]
    driver.ok(driver.cuCtxSynchronize())


def test_a_peer_copy_comes_between_what_was_and_what_will_be(driver):
    first, second, slot = driver.context, driver.retain(1), driver.pinned(4096, b"a")
    here, stream = driver.alloc(4096), driver.stream()
    driver.ok(driver.cuCtxPushCurrent_v2(second))
    there, other_stream, target = driver.alloc(4096), driver.stream(), driver.pinned(4096)
    hold(driver)
    driver.ok(driver.cuMemcpyHtoDAsync_v2(here, slot.address, 4096, stream))
    driver.ok(driver.cuMemcpyPeer(there, second, here, first, 4096))
    driver.ok(driver.cuMemcpyDtoHAsync_v2(target.address, there, 4096, other_stream))
    driver.control()
    driver.ok(driver.cuStreamSynchronize(other_stream))
    assert target.bytes() == b"a" * 4096
    driver.ok(driver.cuMemcpyPeerAsync(here, first, there, second, 100, stream))
    driver.ok(driver.cuStreamSynchronize(stream))
    assert driver.violations() == [] and driver.report()["copies"]["between_gpus"] == {"n": 2, "bytes": 4196}
    assert driver.cuMemcpyPeer(there, first, here, second, 10) == driver.cuMemcpyPeerAsync(here, first, here, second, 10, stream) == INVALID_VALUE
    assert driver.cuMemcpyPeer(there, 1234, here, first, 10) == driver.cuMemcpyPeerAsync(there, second, here, None, 10, None) == INVALID_CONTEXT
    assert driver.cuMemcpyPeer(there, second, here, first, 4097) == INVALID_VALUE
    assert driver.cuMemcpyPeerAsync(there, second, here, first, 10, 1 << 40) == INVALID_HANDLE
    assert len(driver.violations()) == 6


# Streams and events


def test_a_stream_waits_for_an_event_of_another(driver):
    slots = [driver.pinned(4096, it) for it in (b"a", b"b")]
    address, first, second = driver.alloc(4096), driver.stream(), driver.stream()
    hold(driver)
    driver.ok(driver.cuMemcpyHtoDAsync_v2(address, slots[0].address, 4096, first))
    driver.ok(driver.cuStreamWaitEvent(second, driver.recorded(first), 0))
    driver.ok(driver.cuMemcpyHtoDAsync_v2(address, slots[1].address, 4096, second))
    driver.control()
    driver.ok(driver.cuStreamSynchronize(second))
    driver.ok(driver.cuStreamQuery(first))
    assert driver.read(address, 4096) == b"b" * 4096 and driver.violations() == []


def test_an_event_stands_for_what_was_there_when_it_was_recorded_last(driver):
    slot, address, stream = driver.pinned(4096), driver.alloc(4096), driver.stream()
    event = driver.event()
    driver.ok(driver.cuEventQuery(event)), driver.ok(driver.cuEventSynchronize(event))
    driver.ok(driver.cuEventRecord(event, stream))
    driver.ok(driver.cuEventSynchronize(event))
    hold(driver)
    driver.ok(driver.cuMemcpyHtoDAsync_v2(address, slot.address, 4096, stream))
    driver.ok(driver.cuEventQuery(event))
    driver.ok(driver.cuEventRecord(event, stream))
    assert driver.cuEventQuery(event) == NOT_READY
    driver.ok(driver.cuEventDestroy_v2(event))
    driver.control()
    driver.ok(driver.cuStreamSynchronize(stream))
    assert driver.violations() == []


def test_the_null_stream_and_the_others_wait_for_each_other_unless_told_not_to(driver):
    slot, address = driver.pinned(4096), driver.alloc(4096)
    waiting, free = driver.stream(0), driver.stream(1)
    hold(driver)
    driver.ok(driver.cuMemsetD8_v2(address, 1, 4096))  # on the null stream
    later, free_later = driver.recorded(waiting), driver.recorded(free)
    assert driver.cuEventQuery(later) == NOT_READY
    driver.ok(driver.cuEventSynchronize(free_later))
    driver.control()
    driver.ok(driver.cuEventSynchronize(later))
    hold(driver)
    driver.ok(driver.cuMemcpyHtoDAsync_v2(address, slot.address, 4096, waiting))
    assert driver.cuEventQuery(driver.recorded(None)) == driver.cuStreamQuery(None) == NOT_READY
    driver.control()
    driver.ok(driver.cuStreamSynchronize(1))  # the null stream's other name
    driver.ok(driver.cuStreamQuery(waiting))
    assert driver.violations() == []


def test_a_stream_that_is_destroyed_finishes_its_work(driver):
    slot, address, stream = driver.pinned(4096, b"a"), driver.alloc(4096), driver.stream(0)
    hold(driver)
    driver.ok(driver.cuMemcpyHtoDAsync_v2(address, slot.address, 4096, stream))
    event = driver.recorded(stream)
    driver.ok(driver.cuStreamDestroy_v2(stream))
    assert driver.report()["live"]["streams"] == 0 and driver.cuEventQuery(event) == NOT_READY
    driver.control()
    driver.ok(driver.cuEventSynchronize(event))
    assert driver.read(address, 4096) == b"a" * 4096 and driver.violations() == []


def test_handles_that_are_none_are_noticed(driver):
    address, host, stream, event = driver.alloc(100), Host(4096), driver.stream(), driver.event()
    for it in (stream, event): assert it >> 48
    driver.ok(driver.cuStreamDestroy_v2(stream)), driver.ok(driver.cuEventDestroy_v2(event))
    live = driver.stream()
    n = 0
    for bad in (stream, 1 << 40, event):
        calls = [driver.cuStreamSynchronize(bad), driver.cuStreamQuery(bad), driver.cuStreamDestroy_v2(bad), driver.cuEventQuery(bad),
                 driver.cuEventSynchronize(bad), driver.cuEventDestroy_v2(bad), driver.cuEventRecord(bad, live),
                 driver.cuStreamWaitEvent(live, bad, 0), driver.cuMemcpyHtoDAsync_v2(address, host.address, 1, bad),
                 driver.cuMemcpyDtoHAsync_v2(host.address, address, 1, bad), driver.cuMemcpyDtoDAsync_v2(address, address, 1, bad),
                 driver.cuMemsetD8Async(address, 0, 1, bad), driver.cuModuleUnload(bad)]
        assert set(calls) == {INVALID_HANDLE}
        n += len(calls)
    assert driver.cuStreamDestroy_v2(None) == INVALID_HANDLE and driver.cuStreamSynchronize(2) == NOT_SUPPORTED
    out = ctypes.c_void_p()
    assert driver.cuStreamCreate(None, 0) == driver.cuStreamCreate(ctypes.byref(out), 2) == INVALID_VALUE
    assert driver.cuEventCreate(None, 0) == driver.cuEventCreate(ctypes.byref(out), 4) == driver.cuEventCreate(ctypes.byref(out), 8) == INVALID_VALUE
    assert driver.cuStreamWaitEvent(live, driver.event(), 1) == INVALID_VALUE
    assert len(driver.violations()) == n + 8 and "is a stream that was destroyed" in driver.violations()[0]


def test_streams_and_events_of_two_gpus_do_not_mix_where_a_driver_minds(driver):
    stream, event, slot = driver.stream(), driver.event(), driver.pinned(4096, b"a")
    driver.ok(driver.cuCtxPushCurrent_v2(driver.retain(1)))
    other_stream, address = driver.stream(), driver.alloc(4096)
    assert driver.cuEventRecord(event, other_stream) == driver.cuEventRecord(event, None) == INVALID_HANDLE
    assert len(driver.violations()) == 2
    # A copy may go by any stream, and a stream may wait for any event.
    driver.ok(driver.cuMemcpyHtoDAsync_v2(address, slot.address, 4096, stream))
    driver.ok(driver.cuEventRecord(event, stream))
    driver.ok(driver.cuStreamWaitEvent(other_stream, event, 0))
    driver.ok(driver.cuStreamSynchronize(other_stream))
    assert driver.read(address, 4096) == b"a" * 4096 and len(driver.violations()) == 2


def test_events_need_no_current_context(driver):
    event = driver.recorded(driver.stream())
    driver.ok(driver.cuCtxPopCurrent_v2(None))
    driver.ok(driver.cuEventSynchronize(event)), driver.ok(driver.cuEventQuery(event))
    assert driver.violations() == []


# Kernels


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
    assert launch(driver, function, [u64(address)], shared=50000) == launch(driver, function, None) == INVALID_VALUE
    assert launch(driver, function, [u64(address)], extra=(ctypes.c_void_p * 1)()) == NOT_SUPPORTED
    assert launch(driver, function, [u64(address)], stream=1 << 40) == launch(driver, 1 << 40, [u64(address)]) == INVALID_HANDLE
    driver.ok(driver.cuCtxPushCurrent_v2(driver.retain(1)))
    assert launch(driver, function, [u64(address)]) == INVALID_HANDLE, "of another GPU"
    assert len(driver.violations()) == 12


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


# What it is told


def test_calls_fail_as_told_and_have_no_effect(driver):
    out = ctypes.c_uint64(5)
    alloc = lambda: driver.cuMemAlloc_v2(ctypes.byref(out), 10)
    driver.control("fail cuMemAlloc_v2 3 2  # the third", "fail cuEventCreate 1 CUDA_ERROR_UNKNOWN 2", "fail cuMemHostRegister_v2 1 2 always")
    assert [alloc() for _ in range(5)] == [0, 0, 2, 0, 0]
    assert driver.report()["live"]["memory"] == 4
    assert [driver.cuEventCreate(ctypes.byref(out), 0) for _ in range(4)] == [999, 999, 0, 0]
    host = Host(4096)
    assert {driver.cuMemHostRegister_v2(host.address, 4096, 0) for _ in range(10)} == {2}
    driver.control("fail cuMemAlloc_v2 2 2")
    assert [alloc() for _ in range(3)] == [0, 2, 0]
    driver.control("fail cuMemAlloc_v2 2 2")
    assert [alloc() for _ in range(3)] == [0, 2, 0], "written again, counted again"
    report = driver.report()
    assert report["told_to_fail"] == {"cuMemAlloc_v2": 3, "cuEventCreate": 2, "cuMemHostRegister_v2": 10}
    assert report["calls"]["cuMemAlloc_v2"] == 11 and report["violations"] == []


def test_the_environment_can_tell_failures_too(new_driver):
    driver = new_driver("gpus 1", "fail cuInit 2 803", "fail cuDevicePrimaryCtxRetain 1 46")
    driver.ok(driver.cuInit(0))
    assert driver.cuInit(0) == 803 and driver.cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_void_p()), 0) == 46
    driver.ok(driver.cuInit(0))


def test_work_fails_as_told_and_breaks_its_context(driver):
    slot, address, stream = driver.pinned(4096), driver.alloc(4096), driver.stream()
    driver.control("fault 2 700")
    hold_free = [driver.cuMemcpyHtoDAsync_v2(address, slot.address, 4096, stream)]
    driver.ok(driver.cuStreamSynchronize(stream))
    hold_free.append(driver.cuMemcpyHtoDAsync_v2(address, slot.address, 4096, stream))
    assert hold_free == [0, 0] and driver.cuStreamSynchronize(stream) == ILLEGAL_ADDRESS
    assert driver.cuMemFree_v2(address) == driver.cuEventCreate(ctypes.byref(ctypes.c_void_p()), 0) == ILLEGAL_ADDRESS
    assert driver.violations() == []


def test_settings_that_are_none_are_noticed(driver):
    bad = ["delay 5", "delay_us", "delay_us -1", "hold maybe", "fail cuMemAlloc 1 2", "fail cuMemAlloc_v2 0 2", "fail cuMemAlloc_v2 1 CUDA_ERROR_NONE",
           "fail cuMemAlloc_v2", "fault 1", "memory 5 0 0", "compute 8", "fail cuInit 1 2 often"]
    driver.control("# a comment", "", *bad, "delay_us 0")
    driver.ok(driver.cuCtxSynchronize())
    assert len(driver.violations()) == len(bad) and "`delay 5`" in driver.violations()[0]


# A process


CHILD = """
import ctypes, os, sys
lib = ctypes.CDLL("libcuda.so")
if "look" in sys.argv: sys.exit(0)
context, memory, version = ctypes.c_void_p(), ctypes.c_uint64(), ctypes.c_int()
assert lib.cuInit(0) == 0 and lib.cuDevicePrimaryCtxRetain(ctypes.byref(context), 1) == 0
lib.cuCtxPushCurrent_v2.argtypes = [ctypes.c_void_p]
assert lib.cuCtxPushCurrent_v2(context) == 0
assert lib.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(1000)) == 0
if os.fork() == 0:
    assert lib.cuDriverGetVersion(ctypes.byref(version)) == 3
    sys.exit(0)
assert os.wait()[1] == 0
if "follow" in sys.argv: ctypes.string_at(memory.value, 1)
"""


def child(tmp_path, *words):
    library()
    env = os.environ | {"LD_LIBRARY_PATH": str(OUT), "FAKE_CUDA_REPORT": str(tmp_path / "report-%p.json")}
    for name in ("FAKE_CUDA", "FAKE_CUDA_CONTROL"): env.pop(name, None)
    done = subprocess.run([sys.executable, "-c", CHILD, *words], env=env, capture_output=True, text=True, timeout=60)
    return done, [json.loads(it.read_text()) for it in tmp_path.glob("report-*.json")]


def test_a_process_finds_it_and_leaves_its_last_report_at_the_end(tmp_path):
    done, reports = child(tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(reports) == 1 and reports[0]["is_over"] is True
    assert reports[0]["live"]["memory"] == reports[0]["live"]["contexts"] == 1
    assert reports[0]["gpus"][1]["asked_bytes"] == {"live": 1000, "peak": 1000}
    assert reports[0]["calls"]["cuCtxPushCurrent_v2"] == 1 and reports[0]["violations"] == []
    assert [it.name for it in tmp_path.glob("*.part")] == []


def test_a_process_that_only_looks_leaves_no_report(tmp_path):
    done, reports = child(tmp_path, "look")
    assert (done.returncode, reports) == (0, [])


def test_following_a_device_address_is_a_crash(tmp_path):
    done, reports = child(tmp_path, "follow")
    assert done.returncode == -signal.SIGSEGV
    assert len(reports) == 1 and reports[0]["is_over"] is False
