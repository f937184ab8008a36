//! Code for a GPU, where unladen is built without CUDA: there is none to load it to.
// A launch is unsafe where there is something to launch.
#![allow(unsafe_code)]

use super::{Context, Memory, Never};
use crate::{cuda::Arg, dtype::DType, error::Result};

#[derive(Clone, Debug)]
pub struct Module(Never);

impl Module {
    pub fn load(context: &Context, _ptx: &str) -> Result<Module> {
        match context.0 {}
    }

    pub fn function(&self, _name: &str) -> Result<Function> {
        match self.0 {}
    }
}

#[derive(Clone, Debug)]
pub struct Function(Never);

impl Function {
    /// # Safety
    ///
    /// As in `enabled`.
    pub unsafe fn launch(&self, _n_blocks: u32, _n_threads: u32, _args: &[Arg<'_>]) -> Result<()> {
        match self.0 {}
    }
}

#[derive(Debug)]
pub struct GpuCasts(Never);

impl GpuCasts {
    pub fn load(context: &Context) -> Result<GpuCasts> {
        match context.0 {}
    }

    /// No: there is no GPU to do it.
    pub fn can_cast(_from: DType, _to: DType) -> bool {
        false
    }

    pub fn cast(
        &self,
        _dtypes: [DType; 2],
        _source: (&Memory, u64),
        _target: (&Memory, u64),
        _n_elems: u64,
    ) -> Result<()> {
        match self.0 {}
    }
}
