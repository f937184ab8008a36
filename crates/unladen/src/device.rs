//! Where weights can stay.

use crate::error::Error;
use std::{fmt, str::FromStr};

/// Where the weights will stay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Device {
    /// This machine's memory.
    #[default]
    Host,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Host => f.write_str("host"),
        }
    }
}

impl FromStr for Device {
    type Err = Error;

    fn from_str(text: &str) -> Result<Device, Error> {
        match text {
            "host" | "cpu" => Ok(Device::Host),
            _ => Err(Error::Device {
                device: text.to_owned(),
                message: "this build loads to `host` only".to_owned(),
            }),
        }
    }
}
