//! A GPU that is in use: its primary context, which frameworks use too, made current for one call at a time.
#![allow(unsafe_code)]

use super::{
    driver::{self, Driver, Failure, Handle, fault},
    version::driver_version,
};
use crate::{
    cuda::{Gpu, Gpus, device_name},
    error::{Error, Result},
};
use std::{
    ffi::{CStr, c_int, c_uint},
    fmt,
    sync::Arc,
};

const COMPUTE_CAPABILITY_MAJOR: c_uint = 75;
const COMPUTE_CAPABILITY_MINOR: c_uint = 76;

/// A GPU that is in use. It is let go of with the last clone, and everything that lies on it holds one.
#[derive(Clone)]
pub struct Context {
    primary: Arc<Primary>,
}

/// A share of a GPU's primary context.
struct Primary {
    driver: &'static Driver,
    ordinal: u32,
    device: c_int,
    handle: Handle,
}

impl Context {
    /// Begins to use a GPU. The first time in a process that takes a fraction of a second, and some of its memory.
    pub fn open(ordinal: u32) -> Result<Context> {
        let driver = driver::start()?;
        let device = find(driver, ordinal)?;
        let mut handle = Handle::NULL;
        // SAFETY: the driver named the device, and writes a handle to where it is told.
        unsafe { driver.cuDevicePrimaryCtxRetain(&mut handle, device) }
            .map_err(|failure| fault(device_name(ordinal), driver.describe(failure)))?;
        Ok(Context { primary: Arc::new(Primary { driver, ordinal, device, handle }) })
    }

    /// The GPU's number: the 0 of `cuda:0`.
    pub fn ordinal(&self) -> u32 {
        self.primary.ordinal
    }

    /// Memory of the GPU that nobody holds: neither this process nor another.
    pub fn free_bytes(&self) -> Result<u64> {
        self.call(free_and_total).map(|(free_bytes, _)| free_bytes)
    }

    /// Waits for everything that this process has the GPU do.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: the function has no arguments, and the context that it is for is current.
        self.call(|driver| unsafe { driver.cuCtxSynchronize() })
    }

    /// Calls the driver with this context current. Fails in the driver's words.
    pub(super) fn call<T>(&self, call: impl FnOnce(&Driver) -> Result<T, Failure>) -> Result<T> {
        self.attempt(call).map_err(|failure| self.fault(self.describe(failure)))
    }

    /// Calls the driver with this context current.
    pub(super) fn attempt<T>(&self, call: impl FnOnce(&Driver) -> Result<T, Failure>) -> Result<T, Failure> {
        let _current = Current::push(&self.primary)?;
        call(self.primary.driver)
    }

    pub(super) fn describe(&self, failure: Failure) -> String {
        self.primary.driver.describe(failure)
    }

    /// An error of this GPU.
    pub(super) fn fault(&self, message: String) -> Error {
        fault(device_name(self.ordinal()), message)
    }

    pub(super) fn handle(&self) -> Handle {
        self.primary.handle
    }

    /// True for the same GPU: a process has one primary context on each.
    pub(super) fn is(&self, other: &Context) -> bool {
        self.handle() == other.handle()
    }

    /// `3072 of 8192 bytes are free`, for an error that has to do with it.
    pub(super) fn describe_memory(&self) -> String {
        match self.attempt(free_and_total) {
            Ok((free_bytes, total_bytes)) => format!("{free_bytes} of {total_bytes} bytes are free"),
            Err(failure) => self.describe(failure),
        }
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Context({})", device_name(self.ordinal()))
    }
}

impl Drop for Primary {
    fn drop(&mut self) {
        // SAFETY: this share was taken when the context was opened, and nothing is left that holds it.
        //
        // If that fails, nothing can be done about it.
        let _ = unsafe { self.driver.cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// A context that is current on this thread, above the one that was.
struct Current<'a>(&'a Primary);

impl<'a> Current<'a> {
    fn push(primary: &'a Primary) -> Result<Current<'a>, Failure> {
        // SAFETY: `primary` holds its context.
        let push = || unsafe { primary.driver.cuCtxPushCurrent_v2(primary.handle) };
        // Once more if it fails: whoever gives memory back has no other chance.
        push().or_else(|_| push())?;
        Ok(Current(primary))
    }
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        let mut popped = Handle::NULL;
        // SAFETY: the context that comes off the thread's stack is the one that `push` put there: whatever was pushed in
        // between was popped by its own `Current`.
        let mut pop = || unsafe { self.0.driver.cuCtxPopCurrent_v2(&mut popped) };
        // Once more if it fails, or the caller would find another context current than he had. There is nobody to tell.
        let _ = pop().or_else(|_| pop());
    }
}

/// Lists the GPUs; none is no error, but a driver that is missing or does not start is. To say what is free on a GPU, the
/// driver has to set foot on it, which takes a fraction of a second for each.
pub fn gpus() -> Result<Gpus> {
    let (driver, no_gpus) = driver::try_start()?;
    let failed = |failure| fault("cuda", driver.describe(failure));
    let cuda_version = driver.version().map_err(failed)?;
    let n_gpus = if no_gpus.is_some() { 0 } else { count(driver).map_err(failed)? };
    let gpus = (0..n_gpus).map(|ordinal| gpu(driver, ordinal));
    let driver_version = driver_version();
    Ok(Gpus { cuda_version, driver_version, gpus: gpus.collect::<Result<_>>()? })
}

fn gpu(driver: &Driver, ordinal: u32) -> Result<Gpu> {
    let device = find(driver, ordinal)?;
    let mut name = [0u8; 256];
    let mut total_bytes = 0;
    let mut capability = [0; 2];
    // SAFETY: the driver named the device. The name's length is told, its end marked by a zero, and the other functions
    // write a number to where they are told.
    let told = unsafe {
        driver
            .cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as c_int, device)
            .and_then(|()| driver.cuDeviceTotalMem_v2(&mut total_bytes, device))
            .and_then(|()| driver.cuDeviceGetAttribute(&mut capability[0], COMPUTE_CAPABILITY_MAJOR, device))
            .and_then(|()| driver.cuDeviceGetAttribute(&mut capability[1], COMPUTE_CAPABILITY_MINOR, device))
    };
    told.map_err(|failure| fault(device_name(ordinal), driver.describe(failure)))?;
    let name = CStr::from_bytes_until_nul(&name).unwrap_or_default();
    Ok(Gpu {
        ordinal,
        name: name.to_string_lossy().into_owned(),
        total_bytes: total_bytes as u64,
        free_bytes: Context::open(ordinal).and_then(|it| it.free_bytes()),
        compute_capability: (capability[0].unsigned_abs(), capability[1].unsigned_abs()),
    })
}

/// The driver's number of a GPU.
fn find(driver: &Driver, ordinal: u32) -> Result<c_int> {
    let failed = |failure| fault(device_name(ordinal), driver.describe(failure));
    let n_gpus = count(driver).map_err(failed)?;
    let Some(number) = c_int::try_from(ordinal).ok().filter(|_| ordinal < n_gpus) else {
        return Err(fault(device_name(ordinal), format!("there is no such GPU, {}", there_are(n_gpus))));
    };
    let mut device = 0;
    // SAFETY: the function writes a number to where it is told.
    unsafe { driver.cuDeviceGet(&mut device, number) }.map_err(failed)?;
    Ok(device)
}

fn count(driver: &Driver) -> Result<u32, Failure> {
    let mut n_gpus = 0;
    // SAFETY: the function writes a number to where it is told.
    unsafe { driver.cuDeviceGetCount(&mut n_gpus) }?;
    Ok(u32::try_from(n_gpus).unwrap_or(0))
}

/// Which ordinals there are, after a comma.
fn there_are(n_gpus: u32) -> String {
    match n_gpus {
        0 => "nor any other".to_owned(),
        1 => "only cuda:0".to_owned(),
        _ => format!("only cuda:0 to cuda:{}", n_gpus - 1),
    }
}

/// Of the GPU whose context is current.
fn free_and_total(driver: &Driver) -> Result<(u64, u64), Failure> {
    let (mut free_bytes, mut total_bytes) = (0, 0);
    // SAFETY: the function writes two numbers to where it is told.
    unsafe { driver.cuMemGetInfo_v2(&mut free_bytes, &mut total_bytes) }?;
    Ok((free_bytes as u64, total_bytes as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_that_is_not_there_is_told_which_ones_are() {
        let texts = [0, 1, 2, 8].map(there_are).join("; ");
        assert_eq!(texts, "nor any other; only cuda:0; only cuda:0 to cuda:1; only cuda:0 to cuda:7");
        let error = fault("cuda:9", format!("there is no such GPU, {}", there_are(2)));
        assert_eq!(error.to_string(), "cuda:9: there is no such GPU, only cuda:0 to cuda:1");
        assert!(error.hint().contains("`unladen devices`"), "{}", error.hint());
    }
}
