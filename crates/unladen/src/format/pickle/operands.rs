//! What stands behind an opcode: fixed numbers, strings with their lengths, lines.

use super::{Machine, Value, Wide, arena::Text};
use crate::error::{Error, Result};

impl<'a> Machine<'a> {
    /// The next bytes.
    pub(super) fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        match self.arena.bytes[self.at..].first_chunk::<N>() {
            Some(bytes) => {
                self.at += N;
                Ok(*bytes)
            }
            None => Err(self.cut_short(N as u64)),
        }
    }

    #[inline]
    pub(super) fn place(&mut self, len: u64) -> Result<Text> {
        if len > (self.arena.bytes.len() - self.at) as u64 {
            return Err(self.cut_short(len));
        }
        // Both fit, as the pickle's length does.
        let text = Text { start: self.at as u32, len: len as u32 };
        self.at += len as usize;
        Ok(text)
    }

    #[inline]
    pub(super) fn text(&mut self, is_str: bool, len: u64) -> Result<()> {
        let hole = self.arena.holes.get(self.next_hole);
        if hole.is_some_and(|it| it.at == self.at && it.len_bytes == len) {
            self.next_hole += 1;
            return self.push(Value::Blob(self.next_hole as u32 - 1));
        }
        let text = self.place(len)?;
        self.push(if is_str { Value::Str(text) } else { Value::Bytes(text) })
    }

    /// A signed little-endian integer of any length.
    pub(super) fn long(&mut self, len: u64) -> Result<()> {
        let text = self.place(len)?;
        let bytes = self.arena.bytes(text);
        let fill = if bytes.last().is_some_and(|it| it & 0x80 != 0) { 0xFF } else { 0 };
        let mut low = [fill; 8];
        let (used, rest) = bytes.split_at(bytes.len().min(8));
        low[..used.len()].copy_from_slice(used);
        let number = i64::from_le_bytes(low);
        let fits = rest.iter().all(|&it| it == fill) && (number < 0) == (fill == 0xFF);
        self.push(if fits { Value::Int(Wide(number)) } else { Value::Long(text) })
    }

    pub(super) fn line(&mut self) -> Result<&'a [u8]> {
        let rest = &self.arena.bytes[self.at..];
        let Some(len) = rest.iter().position(|&it| it == b'\n') else {
            return Err(self.fault("a line of text in the pickle", "its end").corrupt());
        };
        self.at += len + 1;
        Ok(&rest[..len])
    }

    /// Bytes of the pickle from here on, with those that are not in memory.
    pub(super) fn left_bytes(&self) -> u64 {
        let holes = self.arena.holes;
        let passed_bytes = self.next_hole.checked_sub(1).map_or(0, |it| holes[it].cut_bytes);
        let cut_bytes = holes.last().map_or(0, |it| it.cut_bytes) - passed_bytes;
        (self.arena.bytes.len() - self.at) as u64 + cut_bytes
    }

    #[cold]
    pub(super) fn cut_short(&self, claimed_bytes: u64) -> Error {
        let found = format!("{} until its end", self.left_bytes());
        self.fault(format!("{claimed_bytes} more bytes of the pickle"), found).corrupt()
    }
}
