//! Errors, by whose fault they are. Each names the file, the tensor, what was expected and what was found.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

/// What a function of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something could not be done, sorted by whose fault it is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("{}{}: cannot {action}: {source}", path.display(), At(*offset_bytes))]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried, after "cannot".
        action: &'static str,
        /// Where in the file, if it was at a place.
        offset_bytes: Option<u64>,
        /// What the system said.
        source: io::Error,
    },
    /// The file contradicts itself or its format.
    #[error("{0}")]
    Corrupt(Box<Fault>),
    /// The file may be fine, this version does not read it.
    #[error("{0}")]
    Unsupported(Box<Fault>),
    /// The load does not fit into the memory that it may take.
    #[error("{}: {}`{what}` needs {limit} of {needed_bytes} bytes, but {available_bytes} are {}", path.display(), Of(tensor), limit.there_are())]
    OverBudget {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor that takes most of it, where one does.
        tensor: Option<String>,
        /// What the load breaks.
        limit: Limit,
        /// Who asks for the bytes: a strategy.
        what: String,
        /// The least that would do: as a budget, this number works and one less does not.
        needed_bytes: u64,
        /// Bytes that may be held.
        available_bytes: u64,
    },
    /// The device is missing or failed.
    #[error("{device}: {message}")]
    Device {
        /// The device, as the user spells it.
        device: String,
        /// What is wrong.
        message: String,
    },
    /// Two things that should agree do not: a model and a checkpoint, a file and its stamp.
    #[error("{0}")]
    Mismatch(Box<Fault>),
    /// A part of the program failed where it must not.
    #[error("{}{}: a thread of the load panicked: {message}", path.display(), At(*offset_bytes))]
    Panicked {
        /// The file that it was reading.
        path: PathBuf,
        /// Where in it.
        offset_bytes: Option<u64>,
        /// What it said.
        message: String,
    },
    /// The caller asked to stop.
    #[error("{}: cancelled", path.display())]
    Cancelled {
        /// The file that was being read or written.
        path: PathBuf,
    },
}

/// What a load can be too large for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Limit {
    /// The host budget: memory besides the weights.
    HostBudget,
    /// The device budget: the weights and all else on the device.
    DeviceBudget,
    /// The machine's memory, or what the control group leaves of it.
    FreeMemory,
    /// What nobody else holds of a GPU's memory. What is needed of it is counted as drivers take it, in whole granules.
    FreeDeviceMemory,
    /// What any machine can address.
    AddressSpace,
}

impl Limit {
    fn there_are(self) -> &'static str {
        match self {
            Limit::HostBudget | Limit::DeviceBudget => "allowed",
            Limit::FreeMemory | Limit::FreeDeviceMemory => "free",
            Limit::AddressSpace => "possible",
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Limit::HostBudget => "a host budget",
            Limit::DeviceBudget => "a device budget",
            Limit::FreeMemory => "free memory",
            Limit::FreeDeviceMemory => "free memory of the GPU (by the driver's granules of 2 MiB)",
            Limit::AddressSpace => "an address space",
        })
    }
}

struct Of<'a>(&'a Option<String>);

impl fmt::Display for Of<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_ref().map_or(Ok(()), |name| write!(f, "tensor `{}`: ", name.escape_debug()))
    }
}

/// What is wrong with a file, and where. Parsers fill in what they know, their callers add the path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fault {
    /// The file; empty until a caller that knows it calls [`Error::in_file`].
    pub path: PathBuf,
    /// The tensor, where one is concerned.
    pub tensor: Option<String>,
    /// Where in the file (or in the named part of it), if at a place.
    pub offset_bytes: Option<u64>,
    /// What should have been there.
    pub expected: String,
    /// What was there.
    pub found: String,
    /// What to try next; empty: nothing better than the general advice.
    pub hint: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.path.as_os_str().is_empty() {
            write!(f, "{}{}: ", self.path.display(), At(self.offset_bytes))?;
        }
        if let Some(tensor) = &self.tensor {
            write!(f, "tensor `{}`: ", tensor.escape_debug())?;
        }
        write!(f, "expected {}, found {}", self.expected, self.found)
    }
}

struct At(Option<u64>);

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |byte| write!(f, " at byte {byte}"))
    }
}

impl Fault {
    /// A fault that knows what was expected and what was found, and nothing else yet.
    pub fn new(expected: impl Into<String>, found: impl Into<String>) -> Fault {
        Fault { expected: expected.into(), found: found.into(), ..Fault::default() }
    }

    /// Says where in the file.
    pub fn at(self, offset_bytes: u64) -> Fault {
        Fault { offset_bytes: Some(offset_bytes), ..self }
    }

    /// Says which tensor.
    pub fn tensor(self, name: impl Into<String>) -> Fault {
        Fault { tensor: Some(name.into()), ..self }
    }

    /// Says what to try next.
    pub fn hint(self, hint: impl Into<String>) -> Fault {
        Fault { hint: hint.into(), ..self }
    }

    /// The file's fault.
    pub fn corrupt(self) -> Error {
        Error::Corrupt(Box::new(self))
    }

    /// Ours: not read by this version.
    pub fn unsupported(self) -> Error {
        Error::Unsupported(Box::new(self))
    }

    /// More than the caller allows a file to claim: `limit` is the field of [`Limits`](crate::Limits) that says how much.
    pub fn over_limit(self, limit: &str) -> Error {
        let hint =
            format!("if you trust the file, allow more: `--limit {limit}=…`, in code `Limits::{limit}`");
        self.hint(hint).unsupported()
    }

    /// Nobody's alone: two things disagree.
    pub fn mismatch(self) -> Error {
        Error::Mismatch(Box::new(self))
    }
}

impl Error {
    /// An operating-system error on a file.
    pub fn io(path: &Path, action: &'static str, source: io::Error) -> Error {
        Error::Io { path: path.to_owned(), action, offset_bytes: None, source }
    }

    /// An operating-system error at a place of a file.
    pub fn io_at(path: &Path, action: &'static str, offset_bytes: u64, source: io::Error) -> Error {
        Error::Io { path: path.to_owned(), action, offset_bytes: Some(offset_bytes), source }
    }

    /// Adds the path to a fault that does not have one yet.
    pub fn in_file(mut self, path: &Path) -> Error {
        if let Error::Corrupt(fault) | Error::Unsupported(fault) | Error::Mismatch(fault) = &mut self
            && fault.path.as_os_str().is_empty()
        {
            fault.path = path.to_owned();
        }
        self
    }

    /// Adds the tensor's name to a fault that does not have one yet.
    pub fn in_tensor(mut self, name: &str) -> Error {
        if let Error::Corrupt(fault) | Error::Unsupported(fault) | Error::Mismatch(fault) = &mut self {
            fault.tensor.get_or_insert_with(|| name.to_owned());
        }
        self
    }

    /// The variant's name, for `--json` and bindings.
    pub fn kind(&self) -> &'static str {
        match self {
            Error::Io { .. } => "Io",
            Error::Corrupt(_) => "Corrupt",
            Error::Unsupported(_) => "Unsupported",
            Error::OverBudget { .. } => "OverBudget",
            Error::Device { .. } => "Device",
            Error::Panicked { .. } => "Panicked",
            Error::Mismatch(_) => "Mismatch",
            Error::Cancelled { .. } => "Cancelled",
        }
    }

    /// What to try next.
    pub fn hint(&self) -> &str {
        match self {
            Error::Corrupt(fault) | Error::Unsupported(fault) | Error::Mismatch(fault)
                if !fault.hint.is_empty() =>
            {
                &fault.hint
            }
            Error::Corrupt(_) => "the file looks damaged; compare its size and hash with the publisher's",
            Error::Unsupported(_) => "save it again with a current torch.save or as safetensors",
            Error::Mismatch(_) => "look at both sides with `unladen inspect`",
            Error::Io { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => "check the path",
                io::ErrorKind::PermissionDenied => "check who may read the file, or write to its folder",
                io::ErrorKind::StorageFull => "free some disk space, or choose another folder",
                io::ErrorKind::OutOfMemory => {
                    "close other programs, or use `stream`, which needs no copy beside the model"
                }
                io::ErrorKind::AlreadyExists => "choose another name, or pass --force to replace it",
                _ => "try again; if it happens again, check the disk",
            },
            // The words that plans for reading have for themselves; others are strategies.
            Error::OverBudget { limit: Limit::HostBudget, what, .. } if what.starts_with("reading ") => {
                "allow the bytes that it needs (--host-budget); they grow with the number of tensors, not with their sizes"
            }
            Error::OverBudget { limit: Limit::HostBudget, .. } => {
                "allow the bytes that it needs (--host-budget); of all strategies `stream` needs least"
            }
            Error::OverBudget { limit: Limit::DeviceBudget, .. } => {
                "allow the bytes that it needs (--device-budget), cast to a smaller type (--dtype bf16), or let a part go elsewhere (--device-map)"
            }
            Error::OverBudget { limit: Limit::FreeDeviceMemory, .. } => {
                "free memory on the GPU (`nvidia-smi` shows who holds it), cast to a smaller type (--dtype bf16), or leave a part on the host (--device-map); tensors that can be freed singly (--free-singly) take more"
            }
            Error::OverBudget { .. } => {
                "free some memory, cast to a smaller type (--dtype bf16), or let the file's own pages do (--intent read-only)"
            }
            Error::Device { message, .. } => device_hint(message),
            Error::Panicked { .. } => {
                "everything was given back, and another load can be tried; unless the panic came from code of yours, please report it"
            }
            Error::Cancelled { .. } => "what the work had taken was given back",
        }
    }
}

/// What to try when a device fails, by words that the message has: the driver's own names of errors, and ours.
const DEVICE_HINTS: &[(&str, &str)] = &[
    (
        "built without CUDA",
        "build it with the feature `cuda`, which it has unless --no-default-features takes it away, or use --device host",
    ),
    (
        "no NVIDIA driver",
        "install the NVIDIA driver and check `nvidia-smi` (a container is given GPUs by `--gpus all`), or use --device host",
    ),
    ("driver is too old", "install a newer NVIDIA driver, or use --device host"),
    (
        "no such GPU",
        "`unladen devices` lists those that there are; what CUDA_VISIBLE_DEVICES leaves out is hidden, and the others are numbered from 0",
    ),
    ("no such device", "`unladen devices` lists those that there are"),
    (
        "not in the host's memory",
        "fetch its bytes with `TensorView::for_each_chunk`, or load it to the host (--device host)",
    ),
    (
        "CUDA_ERROR_STUB_LIBRARY",
        "the libcuda.so that was found is the toolkit's, for linking only: take its folder (`stubs`) out of LD_LIBRARY_PATH, install the NVIDIA driver, or use --device host",
    ),
    ("CUDA_ERROR_NO_DEVICE", "check `nvidia-smi` and CUDA_VISIBLE_DEVICES, or use --device host"),
    (
        "CUDA_ERROR_OUT_OF_MEMORY",
        "end what else uses the GPU (`nvidia-smi` shows it), cast to a smaller type (--dtype bf16), or leave a part on the host or on another GPU (--device-map)",
    ),
    (
        "CUDA_ERROR_DEVICE_UNAVAILABLE",
        "another process has the GPU for itself, or its mode lets nobody in: `nvidia-smi` shows both",
    ),
    (
        "CUDA_ERROR_NOT_INITIALIZED",
        "a process that was forked after it used the GPU cannot use it: start it afresh (in Python, by `spawn`)",
    ),
    (
        "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
        "the driver was updated while its old part was running: reboot (a container: start it anew, without a libcuda.so of its own), or use --device host",
    ),
    (
        "CUDA_ERROR_SYSTEM_NOT_READY",
        "GPUs that NVSwitch joins wait for the fabric manager: `systemctl status nvidia-fabricmanager` says whether it runs, in the driver's version; until then use --device host",
    ),
    (
        "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE",
        "the libcuda.so that was found is a newer one's (the package cuda-compat), which only data-centre GPUs take: take its folder out of LD_LIBRARY_PATH, or install a newer NVIDIA driver",
    ),
    (
        "CUDA_ERROR_JIT_COMPILER_NOT_FOUND",
        "the driver lacks its compiler, libnvidia-ptxjitcompiler.so.1: install all of the driver (a container gets it where NVIDIA_DRIVER_CAPABILITIES has `compute`)",
    ),
    (
        "CUDA_ERROR_NVLINK_UNCORRECTABLE",
        "a link between GPUs failed: `nvidia-smi nvlink --status` and `dmesg` say which; reset the GPU or reboot",
    ),
    ("CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "install a newer NVIDIA driver, or use --device host"),
    (
        "CUDA_ERROR_UNKNOWN",
        "see whether `nvidia-smi` works, and what `dmesg` says of NVRM or Xid; start again, and if it fails again, reboot",
    ),
    (
        "CUDA_ERROR",
        "start again: a GPU that failed serves a process no more; if it fails again, check `nvidia-smi` and `dmesg`",
    ),
];

/// The hint of the first that fits.
fn device_hint(message: &str) -> &'static str {
    let found = DEVICE_HINTS.iter().find(|(words, _)| message.contains(words));
    found.map_or("use --device host", |(_, hint)| hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_driver_says_gets_the_hint_of_its_error() {
        let hint = |message: &str| {
            let error = Error::Device { device: "cuda:0".to_owned(), message: message.to_owned() };
            error.hint().to_owned()
        };
        let full = "cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY (out of memory) for 9 bytes, 8 of 10 bytes are free";
        assert!(hint(full).contains("--device-map"));
        assert!(hint("cuCtxSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS (an illegal...)").contains("start again"));
        assert_eq!(hint("this build loads to `host` only"), "use --device host");
        // None is hidden behind one that comes first.
        for (words, expected) in DEVICE_HINTS {
            assert_eq!(hint(words), *expected, "{words}");
        }
    }
}
