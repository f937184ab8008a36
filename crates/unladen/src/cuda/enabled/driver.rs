//! The driver's library: found, asked for its functions, told to start, and its errors put into words.
//!
//! By `dlopen`, with a table of the functions that are used. Bindings would bring thousands of functions, panic where one
//! is missing, and give the driver's results a Rust `enum`, which a driver that is newer than the bindings breaks.
#![allow(unsafe_code)]

use crate::error::{Error, Result};
use std::{
    ffi::{CStr, CString, c_char, c_int, c_uint, c_void},
    fmt, mem,
    ptr::{self, NonNull},
    sync::{Mutex, PoisonError},
};

/// What a function returns: 0, or what went wrong.
pub(super) type Code = c_uint;

/// There is a driver, and no GPU that this process may see.
const NO_DEVICE: Code = 100;
/// What was asked about still runs.
pub(super) const NOT_READY: Code = 600;

/// The name that the driver itself has. The plain `libcuda.so` may be the toolkit's, which has no driver behind it.
const LIBRARIES: [&CStr; 2] = [c"libcuda.so.1", c"libcuda.so"];

/// A context, stream, event, module or kernel: a name that only the driver looks behind. The null handle names none, and of streams the
/// one that is always there.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct Handle(*mut c_void);

// SAFETY: nothing here is reached through the pointer. The driver's functions take any handle on any thread, and several
// threads may pass the same one at once.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Handle {
    pub(super) const NULL: Handle = Handle(ptr::null_mut());
}

/// A function of the driver that did not do what it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) function: &'static str,
    pub(super) code: Code,
}

/// Declares the functions: a field, where one is found in the library, and a method, which calls it.
macro_rules! functions {
    ($($name:ident($($argument:ident: $type:ty),*);)*) => {
        /// The driver's functions. They may be called from any thread.
        #[allow(non_snake_case)]
        pub(super) struct Driver {
            $($name: unsafe extern "C" fn($($type),*) -> Code,)*
        }

        #[allow(non_snake_case, clippy::too_many_arguments)]
        impl Driver {
            /// Finds them all. Fails with what the first that is missing is called.
            fn find(library: &Library) -> Result<Driver, &'static str> {
                Ok(Driver {
                    $($name: {
                        let found = library.find(stringify!($name)).ok_or(stringify!($name))?;
                        // SAFETY: the library is the driver's by its name, which the driver's header gives a function of
                        // this name with these arguments, and never unloaded.
                        unsafe {
                            mem::transmute::<NonNull<c_void>, unsafe extern "C" fn($($type),*) -> Code>(found)
                        }
                    },)*
                })
            }

            $(
                /// # Safety
                ///
                /// What the driver's documentation of this function asks for.
                pub(super) unsafe fn $name(&self, $($argument: $type),*) -> Result<(), Failure> {
                    // SAFETY: the caller's.
                    match unsafe { (self.$name)($($argument),*) } {
                        0 => Ok(()),
                        code => Err(Failure { function: stringify!($name), code }),
                    }
                }
            )*
        }
    };
}

/// `CUDA_MEMCPY2D`: lines of bytes, at equal distances on either side.
#[repr(C)]
pub(super) struct Copy2D {
    source_x_bytes: usize,
    source_y: usize,
    source_kind: c_uint,
    source_host: *const c_void,
    source_device: u64,
    source_array: *const c_void,
    source_step_bytes: usize,
    target_x_bytes: usize,
    target_y: usize,
    target_kind: c_uint,
    target_host: *mut c_void,
    target_device: u64,
    target_array: *const c_void,
    target_step_bytes: usize,
    line_bytes: usize,
    n_lines: usize,
}

impl Copy2D {
    /// Lines from the host to a GPU: where the first starts on either side, and how far it is to the next.
    pub(super) fn to_device(
        (source_host, source_step_bytes): (*const c_void, usize),
        (target_device, target_step_bytes): (u64, usize),
        line_bytes: usize,
        n_lines: usize,
    ) -> Copy2D {
        Copy2D {
            source_x_bytes: 0,
            source_y: 0,
            source_kind: 1, // CU_MEMORYTYPE_HOST
            source_host,
            source_device: 0,
            source_array: ptr::null(),
            source_step_bytes,
            target_x_bytes: 0,
            target_y: 0,
            target_kind: 2, // CU_MEMORYTYPE_DEVICE
            target_host: ptr::null_mut(),
            target_device,
            target_array: ptr::null(),
            target_step_bytes,
            line_bytes,
            n_lines,
        }
    }
}

// As the driver's header has them: `CUdevice` is a number, `CUdeviceptr` 64 bits, handles are pointers.
functions! {
    cuInit(flags: c_uint);
    cuGetErrorName(code: Code, name: *mut *const c_char);
    cuGetErrorString(code: Code, text: *mut *const c_char);
    cuDriverGetVersion(version: *mut c_int);

    cuDeviceGetCount(count: *mut c_int);
    cuDeviceGet(device: *mut c_int, ordinal: c_int);
    cuDeviceGetName(name: *mut c_char, len: c_int, device: c_int);
    cuDeviceTotalMem_v2(len_bytes: *mut usize, device: c_int);
    cuDeviceGetAttribute(value: *mut c_int, attribute: c_uint, device: c_int);

    cuDevicePrimaryCtxRetain(context: *mut Handle, device: c_int);
    cuDevicePrimaryCtxRelease_v2(device: c_int);
    cuCtxPushCurrent_v2(context: Handle);
    cuCtxPopCurrent_v2(context: *mut Handle);
    cuCtxSynchronize();

    cuMemGetInfo_v2(free_bytes: *mut usize, total_bytes: *mut usize);
    cuMemAlloc_v2(address: *mut u64, len_bytes: usize);
    cuMemFree_v2(address: u64);
    cuMemHostRegister_v2(start: *mut c_void, len_bytes: usize, flags: c_uint);
    cuMemHostUnregister(start: *mut c_void);

    cuMemcpyHtoD_v2(target: u64, source: *const c_void, len_bytes: usize);
    cuMemcpyDtoH_v2(target: *mut c_void, source: u64, len_bytes: usize);
    cuMemcpyDtoD_v2(target: u64, source: u64, len_bytes: usize);
    cuMemcpyPeer(target: u64, target_context: Handle, source: u64, source_context: Handle, len_bytes: usize);
    cuMemcpyHtoDAsync_v2(target: u64, source: *const c_void, len_bytes: usize, stream: Handle);
    cuMemcpy2DAsync_v2(copy: *const Copy2D, stream: Handle);

    cuStreamCreate(stream: *mut Handle, flags: c_uint);
    cuStreamSynchronize(stream: Handle);
    cuStreamDestroy_v2(stream: Handle);

    cuEventCreate(event: *mut Handle, flags: c_uint);
    cuEventRecord(event: Handle, stream: Handle);
    cuEventQuery(event: Handle);
    cuEventSynchronize(event: Handle);
    cuEventDestroy_v2(event: Handle);

    cuModuleLoadData(module: *mut Handle, image: *const c_void);
    cuModuleGetFunction(function: *mut Handle, module: Handle, name: *const c_char);
    cuModuleUnload(module: Handle);
    cuLaunchKernel(
        function: Handle,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        shared_bytes: c_uint,
        stream: Handle,
        params: *mut *mut c_void,
        extra: *mut *mut c_void
    );
}

impl Driver {
    /// `cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY (out of memory)`.
    pub(super) fn describe(&self, failure: Failure) -> String {
        // Versions of a function are the driver's affair.
        let function = failure.function.trim_end_matches("_v2");
        let name = text(|text| {
            // SAFETY: the function writes a pointer to where `text` points, for codes that it does not know a null one.
            unsafe { self.cuGetErrorName(failure.code, text) }
        });
        let words = text(|text| {
            // SAFETY: as above.
            unsafe { self.cuGetErrorString(failure.code, text) }
        });
        match (name, words) {
            (Some(name), Some(words)) => format!("{function}: {name} ({words})"),
            (Some(name), None) => format!("{function}: {name}"),
            _ => format!("{function}: error {}, which the driver does not name", failure.code),
        }
    }

    /// The newest CUDA that the driver speaks. Known before it starts.
    pub(super) fn version(&self) -> Result<(u32, u32), Failure> {
        let mut version = 0;
        // SAFETY: the function writes a number to where it is told.
        unsafe { self.cuDriverGetVersion(&mut version) }?;
        let version = version.unsigned_abs();
        Ok((version / 1000, version % 1000 / 10))
    }
}

/// What a function that gives text gave.
fn text(ask: impl FnOnce(*mut *const c_char) -> Result<(), Failure>) -> Option<String> {
    let mut text = ptr::null();
    ask(&mut text).ok()?;
    // SAFETY: the driver's texts end with a zero byte and stay as long as the library, which is never unloaded.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

/// The driver, as far as this process has come with it. What failed is tried again when somebody asks again.
struct State {
    loaded: Option<&'static Driver>,
    is_started: bool,
}

static STATE: Mutex<State> = Mutex::new(State { loaded: None, is_started: false });

/// True if this machine has an NVIDIA driver's library. Whether it works is another question, which [`gpus`](super::gpus)
/// answers.
pub fn has_driver() -> bool {
    loaded(&mut STATE.lock().unwrap_or_else(PoisonError::into_inner)).is_ok()
}

/// The driver, and why it did not start if that is for want of GPUs.
pub(super) fn try_start() -> Result<(&'static Driver, Option<Failure>)> {
    let mut state = STATE.lock().unwrap_or_else(PoisonError::into_inner);
    let driver = loaded(&mut state)?;
    if !state.is_started {
        // SAFETY: the function may be called at any time, with no flags.
        match unsafe { driver.cuInit(0) } {
            Ok(()) => state.is_started = true,
            Err(failure) if failure.code == NO_DEVICE => return Ok((driver, Some(failure))),
            Err(failure) => return Err(fault("cuda", driver.describe(failure))),
        }
    }
    Ok((driver, None))
}

/// The driver, ready for work.
pub(super) fn start() -> Result<&'static Driver> {
    match try_start()? {
        (driver, None) => Ok(driver),
        (driver, Some(failure)) => Err(fault("cuda", driver.describe(failure))),
    }
}

fn loaded(state: &mut State) -> Result<&'static Driver> {
    if let Some(driver) = state.loaded {
        return Ok(driver);
    }
    let driver = load(&LIBRARIES).map_err(|message| fault("cuda", message))?;
    // Stays, as the library does, once in a process.
    Ok(state.loaded.insert(Box::leak(Box::new(driver))))
}

/// The first of some libraries that is there.
fn load(names: &[&CStr]) -> Result<Driver, String> {
    let mut reasons = Vec::new();
    let library = names.iter().find_map(|name| Library::open(name).map_err(|it| reasons.push(it)).ok());
    // Of several names, the first is the one to look for.
    let missing =
        || format!("there is no NVIDIA driver here: {}", reasons.first().map_or("", String::as_str));
    let library = library.ok_or_else(missing)?;
    Driver::find(&library)
        .map_err(|function| format!("the NVIDIA driver is too old for unladen: it has no `{function}`"))
}

/// An error of a device.
pub(super) fn fault(device: impl Into<String>, message: impl Into<String>) -> Error {
    Error::Device { device: device.into(), message: message.into() }
}

/// A library that stays loaded: the driver starts threads, which nothing may pull the code from under.
struct Library(NonNull<c_void>);

impl Library {
    /// Looks where the system looks. Fails with what the system says.
    fn open(name: &CStr) -> Result<Library, String> {
        // SAFETY: the name ends with a zero byte. Whatever the library does when it is loaded is the driver's to answer
        // for: whoever can put another one in its place can run any code in this process.
        let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        NonNull::new(library).map(Library).ok_or_else(|| {
            // SAFETY: the function may be called at any time.
            let said = unsafe { libc::dlerror() };
            // SAFETY: the text is this thread's until its next call of this kind, and copied before.
            let said = (!said.is_null()).then(|| unsafe { CStr::from_ptr(said) });
            said.unwrap_or(name).to_string_lossy().into_owned()
        })
    }

    fn find(&self, name: &str) -> Option<NonNull<c_void>> {
        let name = CString::new(name).ok()?;
        // SAFETY: the library is loaded, and the name ends with a zero byte.
        NonNull::new(unsafe { libc::dlsym(self.0.as_ptr(), name.as_ptr()) })
    }
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Driver")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_not_there_is_no_driver() {
        let message = load(&[c"libunladen-has-none.so.1", c"libunladen-has-none.so"]).unwrap_err();
        assert!(
            message.starts_with("there is no NVIDIA driver here: libunladen-has-none.so.1: "),
            "{message}"
        );
        let error = fault("cuda", message);
        assert!(error.hint().contains("install the NVIDIA driver"), "{}", error.hint());
        assert!(error.hint().contains("--device host"), "{}", error.hint());
    }

    #[test]
    fn a_library_without_the_functions_is_told_by_the_first_that_it_lacks() {
        let message = load(&[c"libunladen-has-none.so", c"libc.so.6"]).unwrap_err();
        assert_eq!(message, "the NVIDIA driver is too old for unladen: it has no `cuInit`");
        assert!(fault("cuda", message).hint().contains("newer NVIDIA driver"));
    }

    #[test]
    fn asking_for_a_driver_never_panics_and_gives_the_same_answer_again() {
        let answers: Vec<_> = (0..2).map(|_| try_start().map(|_| ()).map_err(|it| it.to_string())).collect();
        assert_eq!(answers[0], answers[1]);
        assert!(has_driver() || answers[0].is_err());
    }
}
