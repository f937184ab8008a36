"""What the fake driver is told to do, and what a process sees of it."""
import ctypes, json, os, signal, subprocess, sys

from fake_cuda import *


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
    bad = ["delay 5", "delay_us", "delay_us -1", "hold maybe", "fail cuMemAlloc 1 2", "fail cuMemAlloc_v2 0 2", "fail cuMemAlloc_v2 1 CUDA_ERROR_NONE", "fail cuMemAlloc_v2 1 777",
           "fail cuMemAlloc_v2", "fault 1", "memory 5 0 0", "compute 8", "fail cuInit 1 2 often"]
    driver.control("# a comment", "", *bad, "delay_us 0")
    driver.ok(driver.cuCtxSynchronize())
    assert len(driver.violations()) == len(bad) and "`delay 5`" in driver.violations()[0]


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
