"""Builds the fake CUDA driver and calls it by way of ctypes. Every `driver` is a copy of the library, with a world of its own."""
import ctypes, functools, json, mmap, os, pathlib, shutil, subprocess, threading, time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = ROOT / "crates/unladen/tests/fake_cuda"
OUT = pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target") / "fake-cuda"

INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED, NO_DEVICE, INVALID_DEVICE = 1, 2, 3, 100, 101
INVALID_CONTEXT, INVALID_PTX, UNSUPPORTED_PTX, INVALID_HANDLE, NOT_FOUND, NOT_READY = 201, 218, 222, 400, 500, 600
ILLEGAL_ADDRESS, CONTEXT_IS_DESTROYED, ALREADY_REGISTERED, NOT_REGISTERED, NOT_SUPPORTED = 700, 709, 712, 713, 801
MISALIGNED = 716

KIB, MIB, GIB = 2**10, 2**20, 2**30
POISON = b"\xff"

# Every function of the library with what it takes: i int, u unsigned, b byte, s size, d device address, p pointer or handle.
FUNCTIONS = {
    "cuInit": "u", "cuDriverGetVersion": "p", "cuGetErrorName": "ip", "cuGetErrorString": "ip",
    "cuDeviceGetCount": "p", "cuDeviceGet": "pi", "cuDeviceGetName": "pii", "cuDeviceTotalMem_v2": "pi", "cuDeviceGetAttribute": "pii",
    "cuDevicePrimaryCtxRetain": "pi", "cuDevicePrimaryCtxRelease_v2": "i", "cuDevicePrimaryCtxGetState": "ipp",
    "cuCtxPushCurrent_v2": "p", "cuCtxPopCurrent_v2": "p", "cuCtxGetCurrent": "p", "cuCtxSetCurrent": "p", "cuCtxGetDevice": "p",
    "cuCtxSynchronize": "",
    "cuMemGetInfo_v2": "pp", "cuMemAlloc_v2": "ps", "cuMemFree_v2": "d", "cuMemsetD8_v2": "dbs", "cuMemsetD8Async": "dbsp",
    "cuPointerGetAttribute": "pid",
    "cuMemHostRegister_v2": "psu", "cuMemHostUnregister": "p", "cuMemHostAlloc": "psu", "cuMemFreeHost": "p",
    "cuMemcpyHtoD_v2": "dps", "cuMemcpyDtoH_v2": "pds", "cuMemcpyDtoD_v2": "dds", "cuMemcpyPeer": "dpdps",
    "cuMemcpyHtoDAsync_v2": "dpsp", "cuMemcpyDtoHAsync_v2": "pdsp", "cuMemcpyDtoDAsync_v2": "ddsp", "cuMemcpyPeerAsync": "dpdpsp",
    "cuMemcpy2DAsync_v2": "pp",
    "cuStreamCreate": "pu", "cuStreamSynchronize": "p", "cuStreamDestroy_v2": "p", "cuStreamWaitEvent": "ppu", "cuStreamQuery": "p",
    "cuEventCreate": "pu", "cuEventRecord": "pp", "cuEventQuery": "p", "cuEventSynchronize": "p", "cuEventDestroy_v2": "p",
    "cuModuleLoadData": "pp", "cuModuleGetFunction": "ppp", "cuModuleUnload": "p", "cuLaunchKernel": "puuuuuuuppp",
}
TYPES = {"i": ctypes.c_int, "u": ctypes.c_uint, "b": ctypes.c_ubyte, "s": ctypes.c_size_t, "d": ctypes.c_uint64, "p": ctypes.c_void_p}


def build():
    done = subprocess.run([ROOT / "scripts/fake-cuda", OUT], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"scripts/fake-cuda:\n{done.stdout}{done.stderr}"
    return OUT / "libcuda.so"


@functools.cache
def library(): return build()


class Host:
    """Host memory of whole pages, at a known address."""

    def __init__(self, n_bytes, fill=b"\0"):
        self.map = mmap.mmap(-1, n_bytes)
        self.view = (ctypes.c_char * n_bytes).from_buffer(self.map)
        self.address = ctypes.addressof(self.view)
        self.fill(fill)

    def fill(self, byte): ctypes.memset(self.address, byte[0], len(self.view))

    def bytes(self, n=None): return bytes(self.view[:n])


class Driver:
    """One fake driver, with GPU 0's context current once `open` was called."""

    def __init__(self, library, folder):
        self.control_path, self.report_path = folder / "control", folder / "report.json"
        self.library = ctypes.CDLL(str(library))
        for name, letters in FUNCTIONS.items():
            function = getattr(self.library, name)
            function.restype, function.argtypes = ctypes.c_int, [TYPES[it] for it in letters]
            setattr(self, name, function)

    def control(self, *lines):
        """Replaces the control file; the fake sees it on its next call, and a stream that is held within milliseconds."""
        beside = self.control_path.with_suffix(".new")
        beside.write_text("".join(f"{it}\n" for it in lines))
        beside.rename(self.control_path)

    def report(self): return json.loads(self.report_path.read_text())

    def violations(self): return self.report()["violations"]

    def ok(self, result): assert result == 0, f"error {result}; violations: {self.violations()}"

    def made(self, function, *args, kind=ctypes.c_void_p):
        """Calls a function whose first argument is where its result goes."""
        out = kind()
        self.ok(function(ctypes.byref(out), *args))
        return out.value

    def retain(self, gpu=0): return self.made(self.cuDevicePrimaryCtxRetain, gpu)

    def open(self, gpu=0):
        self.ok(self.cuInit(0))
        context = self.retain(gpu)
        self.ok(self.cuCtxPushCurrent_v2(context))
        return context

    def alloc(self, n_bytes): return self.made(self.cuMemAlloc_v2, n_bytes, kind=ctypes.c_uint64)

    def stream(self, flags=1): return self.made(self.cuStreamCreate, flags)

    def event(self): return self.made(self.cuEventCreate, 2)

    def recorded(self, stream):
        event = self.event()
        self.ok(self.cuEventRecord(event, stream))
        return event

    def pinned(self, n_bytes, fill=b"\0"):
        host = Host(n_bytes, fill)
        self.ok(self.cuMemHostRegister_v2(host.address, n_bytes, 0))
        return host

    def free_bytes(self):
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.ok(self.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)))
        return free.value

    def read(self, address, n_bytes):
        host = Host(n_bytes)
        self.ok(self.cuMemcpyDtoH_v2(host.address, address, n_bytes))
        return host.bytes()

    def word(self, function, error):
        """cuGetErrorName or cuGetErrorString."""
        text = ctypes.c_char_p()
        result = function(error, ctypes.byref(text))
        return result, text.value and text.value.decode()


@pytest.fixture
def new_driver(tmp_path, monkeypatch):
    """Makes a driver with these settings in its environment."""

    def new(*settings):
        for name in ["FAKE_CUDA", "FAKE_CUDA_CONTROL", "FAKE_CUDA_REPORT"]: monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("FAKE_CUDA", "; ".join(settings))
        monkeypatch.setenv("FAKE_CUDA_CONTROL", str(tmp_path / "control"))
        monkeypatch.setenv("FAKE_CUDA_REPORT", str(tmp_path / "report.json"))
        copy = tmp_path / "libcuda.so"
        assert not copy.exists(), "one driver a test: its environment is the process'"
        shutil.copy(library(), copy)
        return Driver(copy, tmp_path)

    return new


@pytest.fixture
def driver(new_driver):
    """A driver without settings, GPU 0's context current."""
    it = new_driver()
    it.context = it.open()
    yield it
    # Nothing is held, so that no thread of the library waits for ever.
    it.control()


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
