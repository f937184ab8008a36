"""The fake driver's streams and events, called well and badly."""
import ctypes

from fake_cuda import *


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
