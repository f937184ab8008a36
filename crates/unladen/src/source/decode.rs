//! Turns packed bytes into what they were, a piece at a time. Reads no file, and decides about no length.

use crate::stamp::Encoding;
use flate2::{Decompress, FlushDecompress, Status};

/// What has been made of packed bytes so far.
#[derive(Debug)]
pub(super) enum Decoder {
    Deflate(Decompress),
    /// With the first byte of a character whose second has not come yet.
    Latin1(Option<u8>),
}

/// What one piece came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step {
    /// Packed bytes that are used up.
    pub(super) n_read: usize,
    /// Bytes of the target that were filled, from its start.
    pub(super) n_written: usize,
    /// Nothing comes after these.
    pub(super) is_end: bool,
}

impl Decoder {
    pub(super) fn new(encoding: Encoding) -> Decoder {
        match encoding {
            Encoding::Deflate => Decoder::Deflate(Decompress::new(false)),
            Encoding::Latin1 => Decoder::Latin1(None),
        }
    }

    /// Uses as much of `packed` and fills as much of `target` as it can. `is_last`: no packed bytes follow.
    ///
    /// Fails with what it found where that cannot be unpacked.
    pub(super) fn decode(
        &mut self,
        packed: &[u8],
        target: &mut [u8],
        is_last: bool,
    ) -> Result<Step, &'static str> {
        match self {
            Decoder::Deflate(inflate) => {
                let before = (inflate.total_in(), inflate.total_out());
                let status = inflate.decompress(packed, target, FlushDecompress::None);
                let status = status.map_err(|_| "bytes that cannot be inflated")?;
                Ok(Step {
                    n_read: (inflate.total_in() - before.0) as usize,
                    n_written: (inflate.total_out() - before.1) as usize,
                    is_end: status == Status::StreamEnd,
                })
            }
            Decoder::Latin1(lead) => latin1(lead, packed, target, is_last),
        }
    }
}

fn latin1(
    lead: &mut Option<u8>,
    packed: &[u8],
    target: &mut [u8],
    is_last: bool,
) -> Result<Step, &'static str> {
    let (mut n_read, mut n_written) = (0, 0);
    while let Some(&byte) = packed.get(n_read) {
        let Some(place) = target.get_mut(n_written) else { break };
        n_read += 1;
        // Latin-1 reaches up to U+00FF: one byte, or one of two leads and six bits.
        *place = match (lead.take(), byte) {
            (None, 0..=0x7f) => byte,
            (None, 0xc2 | 0xc3) => {
                *lead = Some(byte);
                continue;
            }
            (Some(lead), 0x80..=0xbf) => lead << 6 | byte & 0x3f,
            _ => return Err("text that is not Latin-1"),
        };
        n_written += 1;
    }
    let is_used_up = is_last && n_read == packed.len();
    match lead {
        Some(_) if is_used_up => Err("half a character at its end"),
        _ => Ok(Step { n_read, n_written, is_end: is_used_up }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Decodes with pieces of these sizes on either side.
    fn decode(encoding: Encoding, packed: &[u8], [piece, room]: [usize; 2]) -> Result<Vec<u8>, &'static str> {
        let mut decoder = Decoder::new(encoding);
        let (mut at, mut bytes) = (0, Vec::new());
        loop {
            let end = (at + piece).min(packed.len());
            let mut target = vec![0; room];
            let step = decoder.decode(&packed[at..end], &mut target, end == packed.len())?;
            bytes.extend_from_slice(&target[..step.n_written]);
            at += step.n_read;
            if step.is_end {
                assert_eq!(at, packed.len());
                return Ok(bytes);
            }
            if step.n_read + step.n_written == 0 && end == packed.len() {
                return Err("no end");
            }
        }
    }

    #[test]
    fn every_byte_comes_back_from_latin_1_whatever_the_pieces() {
        let bytes: Vec<u8> = (0..=255).rev().chain(0..=255).collect();
        let text: String = bytes.iter().map(|&it| char::from(it)).collect();
        for sizes in [[1, 1], [1, 100], [100, 1], [7, 5], [1000, 1000]] {
            assert_eq!(decode(Encoding::Latin1, text.as_bytes(), sizes).unwrap(), bytes);
        }
        assert_eq!(decode(Encoding::Latin1, b"", [1, 1]).unwrap(), b"");
    }

    #[test]
    fn other_characters_and_halves_of_them_are_refused() {
        for broken in
            [&b"\xc4\x80"[..], b"\xc3", b"a\xc2", b"\xc2a", b"\x80", b"\xff", b"\xe2\x82\xac", b"\xc3\xc3"]
        {
            for sizes in [[1, 1], [100, 100]] {
                assert!(decode(Encoding::Latin1, broken, sizes).is_err(), "{broken:x?}");
            }
        }
    }

    #[test]
    fn deflated_bytes_come_back_whatever_the_pieces() {
        let bytes: Vec<u8> = (0..20_000u32).map(|it| ((it * it) >> 7) as u8).collect();
        let mut packed = vec![0; 40_000];
        let mut deflate = flate2::Compress::new(flate2::Compression::default(), false);
        deflate.compress(&bytes, &mut packed, flate2::FlushCompress::Finish).unwrap();
        packed.truncate(deflate.total_out() as usize);
        for sizes in [[1, 1], [1, 30_000], [30_000, 1], [313, 257], [40_000, 40_000]] {
            assert!(decode(Encoding::Deflate, &packed, sizes).unwrap() == bytes);
            assert!(decode(Encoding::Deflate, &packed[..packed.len() - 1], sizes).is_err());
        }
    }
}
