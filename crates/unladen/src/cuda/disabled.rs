//! The same shape as `enabled`, where unladen is built without CUDA: nothing can be opened, so nothing else can be had.
// Documented in `enabled`, where they do something.
#![allow(missing_docs)]

mod module;

pub use module::{Function, GpuCasts, Module};

use super::{Gpus, SlotCopy, device_name};
use crate::{
    error::{Error, Result},
    memory::{HostBuffer, Reservation},
};

/// What there is none of.
#[derive(Clone, Copy, Debug)]
enum Never {}

fn built_without<T>(device: String) -> Result<T> {
    Err(Error::Device { device, message: "unladen was built without CUDA".to_owned() })
}

/// No: it could not be talked to.
pub fn has_driver() -> bool {
    false
}

/// Fails.
pub fn gpus() -> Result<Gpus> {
    built_without("cuda".to_owned())
}

#[derive(Clone, Debug)]
pub struct Context(Never);

impl Context {
    pub fn open(ordinal: u32) -> Result<Context> {
        built_without(device_name(ordinal))
    }

    pub fn ordinal(&self) -> u32 {
        match self.0 {}
    }

    pub fn free_bytes(&self) -> Result<u64> {
        match self.0 {}
    }

    pub fn synchronize(&self) -> Result<()> {
        match self.0 {}
    }
}

#[derive(Debug)]
pub struct Memory(Never);

impl Memory {
    pub fn new(context: &Context, _reservation: Reservation) -> Result<Memory> {
        match context.0 {}
    }

    pub fn len_bytes(&self) -> u64 {
        match self.0 {}
    }

    pub fn ordinal(&self) -> u32 {
        match self.0 {}
    }

    pub fn address(&self) -> u64 {
        match self.0 {}
    }

    pub fn context(&self) -> &Context {
        match self.0 {}
    }

    pub fn read(&self, _start_byte: u64, _target: &mut [u8]) -> Result<()> {
        match self.0 {}
    }

    pub fn write(&self, _start_byte: u64, _source: &[u8]) -> Result<()> {
        match self.0 {}
    }

    pub fn copy_from(
        &self,
        _start_byte: u64,
        _source: &Memory,
        _source_byte: u64,
        _len_bytes: u64,
    ) -> Result<()> {
        match self.0 {}
    }
}

#[derive(Debug)]
pub struct Slot(Never);

impl Slot {
    /// Fails: without a context a slot has no use.
    pub fn new(_buffer: HostBuffer, contexts: &[Context]) -> Result<Slot> {
        match contexts.first() {
            Some(context) => match context.0 {},
            None => built_without("cuda".to_owned()),
        }
    }

    pub fn is_pinned(&self) -> bool {
        match self.0 {}
    }

    pub fn why_pageable(&self) -> Option<&str> {
        match self.0 {}
    }

    pub fn as_slice(&self) -> &[u8] {
        match self.0 {}
    }

    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        match self.0 {}
    }

    pub fn into_buffer(self) -> Result<HostBuffer> {
        match self.0 {}
    }
}

#[derive(Debug)]
pub struct Upload(Never);

impl Upload {
    pub fn new(context: &Context) -> Result<Upload> {
        match context.0 {}
    }

    pub fn submit(&self, _slot: Slot, _copies: &[SlotCopy<'_>]) -> Result<InFlight> {
        match self.0 {}
    }
}

#[derive(Debug)]
pub struct InFlight(Never);

impl InFlight {
    pub fn is_done(&self) -> Result<bool> {
        match self.0 {}
    }

    pub fn wait(self) -> Result<Slot> {
        match self.0 {}
    }
}
