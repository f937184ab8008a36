//! The GPUs that a checkpoint is loaded to, opened when first asked for: a driver takes its time for that.

use crate::{cuda::Context, device::Device, error::Result};
use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

/// Open GPUs by ordinal.
#[derive(Debug, Default)]
pub(super) struct Gpus(Mutex<BTreeMap<u32, Context>>);

impl Gpus {
    pub(super) fn open(&self, ordinal: u32) -> Result<Context> {
        let mut opened = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(context) = opened.get(&ordinal) {
            return Ok(context.clone());
        }
        let context = Context::open(ordinal)?;
        opened.insert(ordinal, context.clone());
        Ok(context)
    }

    /// Fails with [`Error::Device`](crate::Error::Device) if one of them is not there.
    pub(super) fn open_all(&self, devices: &[Device]) -> Result<()> {
        devices.iter().try_for_each(|device| match device {
            Device::Host => Ok(()),
            Device::Cuda(ordinal) => self.open(*ordinal).map(drop),
        })
    }
}
