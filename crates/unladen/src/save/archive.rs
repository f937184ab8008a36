//! Writes a zip archive record by record, laid out byte for byte as PyTorch's writer lays it out: nothing compressed,
//! payloads aligned, sizes and checksums behind the payload and in the directory, a zip64 end always.

use super::target::TargetFile;
use crate::error::{Fault, Result};
use sha2::{Digest, Sha256};

/// Payloads start at multiples of this, as `.storage_alignment` says.
pub(super) const ALIGN_BYTES: u64 = 64;

/// From here on, a 32-bit field says "look into the zip64 extra field".
const MAX_32: u64 = u32::MAX as u64;

/// More than any record takes beside its payload and its name (in two places): headers, padding, descriptor.
pub(super) const RECORD_OVERHEAD_BYTES: u64 = 30 + 28 + 4 + ALIGN_BYTES + 24 + 46 + 28;

/// An archive that is being written.
pub(super) struct Archive<'a> {
    target: &'a mut TargetFile,
    root: &'a str,
    directory: Vec<u8>,
    n_records: u64,
}

impl<'a> Archive<'a> {
    /// An empty archive whose records lie in the folder `root`.
    pub(super) fn new(target: &'a mut TargetFile, root: &'a str) -> Archive<'a> {
        Archive { target, root, directory: Vec::new(), n_records: 0 }
    }

    /// Appends a small record.
    pub(super) fn bytes(&mut self, name: &str, payload: &[u8]) -> Result<()> {
        self.record(name, payload.len() as u64, |sink| sink(payload))
    }

    /// Appends a record of `len_bytes` bytes, which `fill` passes to the sink.
    pub(super) fn record(
        &mut self,
        name: &str,
        len_bytes: u64,
        fill: impl FnOnce(&mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>,
    ) -> Result<()> {
        let name = format!("{}/{name}", self.root);
        let header_byte = self.target.at_byte();
        // An empty record has no descriptor behind it (bit 3), every name is UTF-8 (bit 11).
        let flags: u16 = if len_bytes == 0 { 0x0800 } else { 0x0808 };
        let name_len = u16::try_from(name.len())
            .map_err(|_| Fault::new("a name of at most 65535 bytes", name.len().to_string()).unsupported())?;
        let extra = local_extra(header_byte, name_len, len_bytes);

        let mut header = Vec::with_capacity(30 + name.len() + extra.len());
        header.extend(b"PK\x03\x04");
        // Version 0, stored, no time, and no checksum or size yet.
        put_u16s(&mut header, &[0, flags, 0, 0, 0]);
        put_u32s(&mut header, &[0, 0, 0]);
        put_u16s(&mut header, &[name_len, extra.len() as u16]);
        header.extend(name.as_bytes());
        header.extend(&extra);
        self.target.write(&header)?;

        let mut checksum = crc32fast::Hasher::new();
        let target = &mut *self.target;
        fill(&mut |chunk| {
            checksum.update(chunk);
            target.write(chunk)
        })?;
        let checksum = checksum.finalize();

        if len_bytes > 0 {
            let mut descriptor = b"PK\x07\x08".to_vec();
            put_u32s(&mut descriptor, &[checksum]);
            if len_bytes >= MAX_32 || header_byte >= MAX_32 {
                put_u64s(&mut descriptor, &[len_bytes, len_bytes]);
            } else {
                put_u32s(&mut descriptor, &[len_bytes as u32, len_bytes as u32]);
            }
            self.target.write(&descriptor)?;
        }
        self.list(&name, name_len, flags, checksum, len_bytes, header_byte);
        Ok(())
    }

    /// Adds a record to the directory.
    fn list(
        &mut self,
        name: &str,
        name_len: u16,
        flags: u16,
        checksum: u32,
        len_bytes: u64,
        header_byte: u64,
    ) {
        let large: Vec<u64> =
            [len_bytes, len_bytes, header_byte].into_iter().filter(|&it| it >= MAX_32).collect();
        let extra = if large.is_empty() { Vec::new() } else { zip64_extra(&large) };
        let directory = &mut self.directory;
        directory.extend(b"PK\x01\x02");
        put_u16s(directory, &[0, 0, flags, 0, 0, 0]);
        put_u32s(directory, &[checksum, saturated(len_bytes), saturated(len_bytes)]);
        put_u16s(directory, &[name_len, extra.len() as u16, 0, 0, 0]);
        put_u32s(directory, &[0, saturated(header_byte)]);
        directory.extend(name.as_bytes());
        directory.extend(extra);
        self.n_records += 1;
    }

    /// 40 digits that depend on every name, size and checksum so far, as PyTorch's `.data/serialization_id` does.
    pub(super) fn serialization_id(&self) -> String {
        let hash = Sha256::digest(&self.directory);
        let number = |at: usize| hash[at..at + 8].iter().fold(0u64, |sum, &byte| sum << 8 | u64::from(byte));
        format!("{:020}{:020}", number(0), number(8))
    }

    /// Appends the directory.
    pub(super) fn finish(self) -> Result<()> {
        let directory_byte = self.target.at_byte();
        let directory_bytes = self.directory.len() as u64;
        let end_byte = directory_byte + directory_bytes;
        let mut end = b"PK\x06\x06".to_vec();
        put_u64s(&mut end, &[44]);
        put_u16s(&mut end, &[0x031e, 45]);
        put_u32s(&mut end, &[0, 0]);
        put_u64s(&mut end, &[self.n_records, self.n_records, directory_bytes, directory_byte]);
        end.extend(b"PK\x06\x07");
        put_u32s(&mut end, &[0]);
        put_u64s(&mut end, &[end_byte]);
        put_u32s(&mut end, &[1]);
        end.extend(b"PK\x05\x06");
        let n_records = self.n_records.min(u64::from(u16::MAX)) as u16;
        put_u16s(&mut end, &[0, 0, n_records, n_records]);
        put_u32s(&mut end, &[saturated(directory_bytes), saturated(directory_byte)]);
        put_u16s(&mut end, &[0]);
        self.target.write(&self.directory)?;
        self.target.write(&end)
    }
}

/// The extra field of a local header: 64-bit sizes and offset as PyTorch writes them (the compressed size is not
/// known there yet), then padding up to where the payload starts.
fn local_extra(header_byte: u64, name_len: u16, len_bytes: u64) -> Vec<u8> {
    let mut large = Vec::new();
    if len_bytes >= MAX_32 {
        large.extend([len_bytes, 0]);
    }
    if header_byte >= MAX_32 {
        large.push(header_byte);
    }
    let mut extra = if large.is_empty() { Vec::new() } else { zip64_extra(&large) };
    let start_byte = header_byte + 30 + u64::from(name_len) + extra.len() as u64 + 4;
    let padding_bytes = start_byte.next_multiple_of(ALIGN_BYTES) - start_byte;
    extra.extend(b"FB");
    put_u16s(&mut extra, &[padding_bytes as u16]);
    extra.resize(extra.len() + padding_bytes as usize, b'Z');
    extra
}

fn zip64_extra(fields: &[u64]) -> Vec<u8> {
    let mut extra = Vec::new();
    put_u16s(&mut extra, &[1, 8 * fields.len() as u16]);
    put_u64s(&mut extra, fields);
    extra
}

fn saturated(number: u64) -> u32 {
    number.min(MAX_32) as u32
}

fn put_u16s(bytes: &mut Vec<u8>, numbers: &[u16]) {
    bytes.extend(numbers.iter().flat_map(|it| it.to_le_bytes()));
}

fn put_u32s(bytes: &mut Vec<u8>, numbers: &[u32]) {
    bytes.extend(numbers.iter().flat_map(|it| it.to_le_bytes()));
}

fn put_u64s(bytes: &mut Vec<u8>, numbers: &[u64]) {
    bytes.extend(numbers.iter().flat_map(|it| it.to_le_bytes()));
}
