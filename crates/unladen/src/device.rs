//! Where weights can stay: this machine's memory, or a GPU's.

mod map;

pub use map::DeviceMap;

use crate::error::Error;
use std::{fmt, iter, str::FromStr};

/// Where weights will stay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Device {
    /// This machine's memory.
    #[default]
    Host,
    /// The memory of an NVIDIA GPU, by the driver's ordinal: below [`MAX_GPUS`].
    Cuda(u32),
}

/// Ordinals of GPUs are below this: twice as many as the largest machines of one node have.
pub const MAX_GPUS: u32 = 32;

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Host => f.pad("host"),
            Device::Cuda(ordinal) => f.pad(&format!("cuda:{ordinal}")),
        }
    }
}

impl FromStr for Device {
    type Err = Error;

    /// `host` (or `cpu`), `cuda:1`; `cuda` is the first GPU.
    fn from_str(text: &str) -> Result<Device, Error> {
        let device = match text.split_once(':') {
            None if matches!(text, "host" | "cpu") => Some(Device::Host),
            None if text == "cuda" => Some(Device::Cuda(0)),
            Some(("cuda", ordinal)) if ordinal.bytes().all(|it| it.is_ascii_digit()) => {
                ordinal.parse().ok().filter(|it| *it < MAX_GPUS).map(Device::Cuda)
            }
            _ => None,
        };
        device.ok_or_else(|| Error::Device {
            device: text.to_owned(),
            message: format!("there is no such device: it is `host`, or `cuda:0` to `cuda:{}`", MAX_GPUS - 1),
        })
    }
}

/// Bytes on each device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PerDevice {
    /// In this machine's memory.
    pub host_bytes: u64,
    cuda_bytes: [u64; MAX_GPUS as usize],
}

impl PerDevice {
    /// The same figure for each GPU, nothing for the host.
    pub fn of_each_gpu(bytes: u64) -> PerDevice {
        PerDevice { host_bytes: 0, cuda_bytes: [bytes; MAX_GPUS as usize] }
    }

    /// The figure of one device; nothing for a GPU whose ordinal is too large.
    pub fn get(&self, device: Device) -> u64 {
        match device {
            Device::Host => self.host_bytes,
            Device::Cuda(ordinal) => self.cuda_bytes.get(ordinal as usize).copied().unwrap_or(0),
        }
    }

    /// The figure of one device, to be changed; `None` for a GPU whose ordinal is too large.
    pub fn get_mut(&mut self, device: Device) -> Option<&mut u64> {
        match device {
            Device::Host => Some(&mut self.host_bytes),
            Device::Cuda(ordinal) => self.cuda_bytes.get_mut(ordinal as usize),
        }
    }

    /// All of them, in the order of [`Device`].
    pub fn iter(&self) -> impl Iterator<Item = (Device, u64)> {
        let cuda = self.cuda_bytes.iter().zip(0..).map(|(&bytes, ordinal)| (Device::Cuda(ordinal), bytes));
        iter::once((Device::Host, self.host_bytes)).chain(cuda)
    }

    /// The sum.
    pub fn total_bytes(&self) -> u64 {
        self.iter().fold(0, |sum, (_, bytes)| sum.saturating_add(bytes))
    }

    /// Raises each figure to that of the other.
    pub fn raise(&mut self, other: &PerDevice) {
        self.host_bytes = self.host_bytes.max(other.host_bytes);
        self.cuda_bytes.iter_mut().zip(&other.cuda_bytes).for_each(|(it, other)| *it = (*it).max(*other));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_as_they_are_written() {
        for (text, device) in [
            ("host", Device::Host),
            ("cpu", Device::Host),
            ("cuda", Device::Cuda(0)),
            ("cuda:0", Device::Cuda(0)),
            ("cuda:31", Device::Cuda(31)),
        ] {
            assert_eq!(text.parse::<Device>().unwrap(), device);
        }
        assert_eq!(Device::Cuda(3).to_string().parse::<Device>().unwrap(), Device::Cuda(3));
        for text in ["", "gpu", "cuda:", "cuda:32", "cuda:-1", "cuda:+1", "cuda:x", "mps", "host:0"] {
            assert!(matches!(text.parse::<Device>(), Err(Error::Device { .. })), "{text}");
        }
    }

    #[test]
    fn figures_of_devices_are_apart_and_add_up() {
        let mut held = PerDevice::default();
        for (device, bytes) in [(Device::Host, 1), (Device::Cuda(0), 20), (Device::Cuda(31), 300)] {
            *held.get_mut(device).unwrap() += bytes;
        }
        assert_eq!(held.get(Device::Cuda(0)), 20);
        assert_eq!(held.total_bytes(), 321);
        assert!(held.get_mut(Device::Cuda(MAX_GPUS)).is_none());
        let mut most = PerDevice { host_bytes: 7, ..PerDevice::default() };
        most.raise(&held);
        assert_eq!((most.host_bytes, most.get(Device::Cuda(31))), (7, 300));
    }
}
