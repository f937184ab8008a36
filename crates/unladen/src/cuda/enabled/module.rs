//! Code for a GPU: loaded as PTX, which the driver compiles for the GPU that it finds, and launched.
//!
//! Everything goes to the stream that is always there: launches run one after the other, and
//! [`Memory::read`](super::Memory::read) waits for those before it. Copies of an [`Upload`](super::Upload) have a stream of their own, which nothing here waits for.
#![allow(unsafe_code)]

use super::{context::Context, driver::Handle};
use crate::{
    cuda::Arg,
    error::{Error, Result},
};
use std::{
    ffi::{CString, c_void},
    fmt, ptr,
    sync::Arc,
};

/// What the PTX that comes with this crate asks for.
const NEEDS: &str =
    "kernels need a driver for CUDA 12.0 (525) or later, and a GPU of compute capability 6.0 or higher";

/// Code that was loaded to a GPU.
#[derive(Clone, Debug)]
pub struct Module {
    loaded: Arc<Loaded>,
}

/// Unloaded when the last function of it goes.
struct Loaded {
    context: Context,
    handle: Handle,
}

/// One function of a [`Module`]: a kernel.
#[derive(Clone)]
pub struct Function {
    loaded: Arc<Loaded>,
    handle: Handle,
    name: Box<str>,
}

impl Module {
    /// Has the driver compile PTX for the GPU. It keeps what it compiled on disk; the first time may take a while.
    pub fn load(context: &Context, ptx: &str) -> Result<Module> {
        let text = c_string(ptx, context)?;
        let mut handle = Handle::NULL;
        let loaded = context.attempt(|driver| {
            // SAFETY: the text ends with a zero byte, which is how the driver tells PTX's end, and it is no longer looked
            // at when the function returns. It writes a handle to where it is told.
            unsafe { driver.cuModuleLoadData(&mut handle, text.as_ptr().cast()) }
        });
        loaded.map_err(|failure| context.fault(format!("{}; {NEEDS}", context.describe(failure))))?;
        Ok(Module { loaded: Arc::new(Loaded { context: context.clone(), handle }) })
    }

    /// A kernel by its name.
    pub fn function(&self, name: &str) -> Result<Function> {
        let context = &self.loaded.context;
        let text = c_string(name, context)?;
        let mut handle = Handle::NULL;
        let found = context.attempt(|driver| {
            // SAFETY: the module is loaded as long as `self`, and the name ends with a zero byte. The function writes a
            // handle to where it is told.
            unsafe { driver.cuModuleGetFunction(&mut handle, self.loaded.handle, text.as_ptr()) }
        });
        found.map_err(|failure| context.fault(format!("{}: kernel `{name}`", context.describe(failure))))?;
        Ok(Function { loaded: Arc::clone(&self.loaded), handle, name: name.into() })
    }
}

impl Function {
    /// Starts the kernel in so many blocks of so many threads, all in one dimension, after what was launched before it.
    /// Returns before it has run: [`Context::synchronize`] waits for it, and so does
    /// [`Memory::read`](super::Memory::read). No blocks are no
    /// call.
    ///
    /// Fails if memory lies on another GPU, or is shorter than its start; nothing runs then.
    ///
    /// # Safety
    ///
    /// `args` are the kernel's parameters, one for one. With them, in so many blocks of so many threads, it reads and writes
    /// only inside the memory that it is given, which must not be dropped before it has run, and it comes to an end.
    pub unsafe fn launch(&self, n_blocks: u32, n_threads: u32, args: &[Arg<'_>]) -> Result<()> {
        if n_blocks == 0 {
            return Ok(());
        }
        let context = &self.loaded.context;
        // A number of fewer bits stands where its lowest bits are looked for: this crate is for little-endian machines.
        let mut values: Vec<u64> = args.iter().map(|it| self.value_of(it)).collect::<Result<_>>()?;
        let mut params: Vec<*mut c_void> = values.iter_mut().map(|it| ptr::from_mut(it).cast()).collect();
        let launched = context.attempt(|driver| {
            // SAFETY: the kernel is loaded as long as `self`. The driver copies as many values as it has parameters, which
            // are as many as `args` by the contract above, before it returns. It takes no extra options where there are
            // none. What the kernel does is the contract's.
            unsafe {
                driver.cuLaunchKernel(
                    self.handle,
                    n_blocks,
                    1,
                    1,
                    n_threads,
                    1,
                    1,
                    0,
                    Handle::NULL,
                    params.as_mut_ptr(),
                    ptr::null_mut(),
                )
            }
        });
        launched.map_err(|failure| self.fault(&context.describe(failure)))
    }

    /// Waits for everything that was launched on this GPU.
    pub(super) fn wait(&self) -> Result<()> {
        let context = &self.loaded.context;
        // SAFETY: the null handle is the stream that is always there.
        let waited = context.attempt(|driver| unsafe { driver.cuStreamSynchronize(Handle::NULL) });
        waited.map_err(|failure| self.fault(&context.describe(failure)))
    }

    fn value_of(&self, arg: &Arg<'_>) -> Result<u64> {
        match *arg {
            Arg::Memory(memory, _) if !memory.context().is(&self.loaded.context) => {
                Err(self.fault(&format!("memory on cuda:{} is not at hand here", memory.ordinal())))
            }
            Arg::Memory(memory, start_byte) => memory.address_of(start_byte, 0),
            Arg::U32(number) => Ok(u64::from(number)),
            Arg::U64(number) => Ok(number),
            Arg::F32(number) => Ok(u64::from(number.to_bits())),
        }
    }

    pub(super) fn fault(&self, words: &str) -> Error {
        self.loaded.context.fault(format!("kernel `{}`: {words}", self.name))
    }
}

/// Text with a zero byte at its end.
fn c_string(text: &str, context: &Context) -> Result<CString> {
    CString::new(text).map_err(|_| context.fault("text for the driver has a zero byte inside".to_owned()))
}

impl Drop for Loaded {
    fn drop(&mut self) {
        // Kernels run still if whoever launched them could not wait for them. What that says comes again at another call.
        let _ = self.context.synchronize();
        // SAFETY: the module was loaded by `Module::load`, nothing else has its handle, and what was launched of it has
        // ended.
        let _ = self.context.attempt(|driver| unsafe { driver.cuModuleUnload(self.handle) });
    }
}

impl fmt::Debug for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Function({} on {:?})", self.name, self.loaded.context)
    }
}

impl fmt::Debug for Loaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Loaded(on {:?})", self.context)
    }
}
