"""The fake driver's copies: when they read and write, and what becomes of memory that goes too early."""
import ctypes, os, time

import pytest

from fake_cuda import *


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
