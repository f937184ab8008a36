//! Writes the pickle of a state dict, or of one tensor, in the words that `torch.save` uses (protocol 2).

use crate::{
    dtype::DType,
    error::{Error, Fault, Result},
    tensor::Layout,
};
use std::collections::HashMap;

/// Items go into a dictionary in batches of this size, as Python's pickler passes them.
const BATCH_ITEMS: usize = 1000;

/// A tensor as the pickle says it: all of a storage, row-major.
pub(super) struct Record<'a> {
    /// Its name in the dictionary.
    pub(super) name: &'a str,
    /// Type and sizes.
    pub(super) layout: &'a Layout,
    /// Number of its storage, `data/0`. Tied tensors name the same.
    pub(super) storage: usize,
}

/// An ordered dictionary from names to tensors.
pub(super) fn dictionary(records: &[Record<'_>]) -> Result<Vec<u8>> {
    let mut pickle = Pickle::new();
    pickle.empty_ordered_dict();
    for batch in records.chunks(BATCH_ITEMS) {
        pickle.op(MARK);
        for record in batch {
            pickle.text(record.name)?;
            pickle.tensor(record)?;
        }
        pickle.op(SETITEMS);
    }
    Ok(pickle.finish())
}

/// One tensor and nothing around it.
pub(super) fn bare(record: &Record<'_>) -> Result<Vec<u8>> {
    let mut pickle = Pickle::new();
    pickle.tensor(record)?;
    Ok(pickle.finish())
}

/// True for types that `torch.save` can write as plain tensors. Quantised ones need their scale besides, and not every type is
/// one of PyTorch's.
pub(super) fn has_plain_tensors(dtype: DType) -> bool {
    let is_quantised = matches!(dtype, DType::QI8 | DType::QU8 | DType::QI32 | DType::QU4x2 | DType::QU2x4);
    dtype.is_in_pytorch() && !is_quantised
}

const MARK: u8 = b'(';
const STOP: u8 = b'.';
const GLOBAL: u8 = b'c';
const REDUCE: u8 = b'R';
const BINPERSID: u8 = b'Q';
const BINUNICODE: u8 = b'X';
const BININT1: u8 = b'K';
const BININT2: u8 = b'M';
const BININT: u8 = b'J';
const LONG1: u8 = 0x8a;
const NEWFALSE: u8 = 0x89;
const EMPTY_TUPLE: u8 = b')';
const TUPLE1: u8 = 0x85;
const TUPLE: u8 = b't';
const SETITEMS: u8 = b'u';
const BINPUT: u8 = b'q';
const BINGET: u8 = b'h';
const PROTO_2: [u8; 2] = [0x80, 2];

struct Pickle {
    bytes: Vec<u8>,
    /// Words that were written before, by what they were written as. There are some 40, one byte counts them.
    memo: HashMap<Vec<u8>, u8>,
}

impl Pickle {
    fn new() -> Pickle {
        Pickle { bytes: PROTO_2.to_vec(), memo: HashMap::new() }
    }

    fn finish(mut self) -> Vec<u8> {
        self.op(STOP);
        self.bytes
    }

    fn op(&mut self, op: u8) {
        self.bytes.push(op);
    }

    /// Writes a word of the fixed vocabulary, or refers to where it was written before.
    fn word(&mut self, word: Vec<u8>) {
        match self.memo.get(&word) {
            Some(&number) => self.bytes.extend([BINGET, number]),
            None => {
                let number = self.memo.len() as u8;
                self.bytes.extend(&word);
                self.bytes.extend([BINPUT, number]);
                self.memo.insert(word, number);
            }
        }
    }

    fn global(&mut self, module: &str, name: &str) {
        self.word([&[GLOBAL], module.as_bytes(), b"\n", name.as_bytes(), b"\n"].concat());
    }

    fn fixed_text(&mut self, text: &'static str) {
        self.word([&[BINUNICODE][..], &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat());
    }

    /// Any text, not remembered: names stand once.
    fn text(&mut self, text: &str) -> Result<()> {
        let len = u32::try_from(text.len()).map_err(|_| {
            Fault::new("a name of less than 4 GiB", format!("{} bytes", text.len())).unsupported()
        })?;
        self.op(BINUNICODE);
        self.bytes.extend(len.to_le_bytes());
        self.bytes.extend(text.as_bytes());
        Ok(())
    }

    fn int(&mut self, number: u64) {
        if let Ok(byte) = u8::try_from(number) {
            self.bytes.extend([BININT1, byte]);
        } else if let Ok(short) = u16::try_from(number) {
            self.op(BININT2);
            self.bytes.extend(short.to_le_bytes());
        } else if let Ok(int) = i32::try_from(number) {
            self.op(BININT);
            self.bytes.extend(int.to_le_bytes());
        } else {
            // Two's complement, with the sign in the last byte, and no byte more than it takes.
            let bytes = u128::from(number).to_le_bytes();
            let len = (128 - u128::from(number).leading_zeros() as usize) / 8 + 1;
            self.bytes.extend([LONG1, len as u8]);
            self.bytes.extend(&bytes[..len]);
        }
    }

    fn ints(&mut self, numbers: &[u64]) {
        if numbers.is_empty() {
            return self.op(EMPTY_TUPLE);
        }
        let is_short = numbers.len() <= 3;
        if !is_short {
            self.op(MARK);
        }
        numbers.iter().for_each(|&it| self.int(it));
        // TUPLE1, TUPLE2 and TUPLE3 follow each other.
        self.op(if is_short { TUPLE1 + numbers.len() as u8 - 1 } else { TUPLE });
    }

    fn empty_ordered_dict(&mut self) {
        self.global("collections", "OrderedDict");
        self.bytes.extend([EMPTY_TUPLE, REDUCE]);
    }

    /// `_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`; v3 for types that have no storage
    /// class of their own, with untyped bytes as the storage and the type behind.
    fn tensor(&mut self, record: &Record<'_>) -> Result<(), Error> {
        let layout = record.layout;
        let class = layout.dtype().storage_class();
        let rebuild = if class.is_some() { "_rebuild_tensor_v2" } else { "_rebuild_tensor_v3" };
        self.global("torch._utils", rebuild);
        self.op(MARK);
        self.op(MARK);
        self.fixed_text("storage");
        match class {
            Some(class) => self.global("torch", class),
            None => self.global("torch.storage", "UntypedStorage"),
        }
        self.text(&record.storage.to_string())?;
        self.fixed_text("cpu");
        self.int(if class.is_some() { layout.n_elems() } else { layout.len_bytes() });
        self.bytes.extend([TUPLE, BINPERSID]);
        self.int(0);
        self.ints(layout.shape());
        self.ints(layout.stride());
        self.op(NEWFALSE);
        self.empty_ordered_dict();
        if class.is_none() {
            self.global("torch", layout.dtype().name());
        }
        self.bytes.extend([TUPLE, REDUCE]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn int(number: u64) -> Vec<u8> {
        let mut pickle = Pickle { bytes: Vec::new(), memo: HashMap::new() };
        pickle.int(number);
        pickle.bytes
    }

    #[test]
    fn integers_take_the_shortest_form_that_keeps_them_positive() {
        assert_eq!(int(255), [BININT1, 255]);
        assert_eq!(int(256), [BININT2, 0, 1]);
        assert_eq!(int(1 << 16), [BININT, 0, 0, 1, 0]);
        assert_eq!(int(i32::MAX as u64), [BININT, 255, 255, 255, 127]);
        assert_eq!(int(1 << 31), [LONG1, 5, 0, 0, 0, 128, 0]);
        assert_eq!(int((1 << 39) - 1), [LONG1, 5, 255, 255, 255, 255, 127]);
        assert_eq!(int(u64::MAX), [LONG1, 9, 255, 255, 255, 255, 255, 255, 255, 255, 0]);
    }

    #[test]
    fn the_vocabulary_fits_the_memo() {
        let layouts: Vec<Layout> = DType::all().map(|it| Layout::contiguous(it, &[1]).unwrap()).collect();
        let mut pickle = Pickle::new();
        for (storage, layout) in layouts.iter().enumerate() {
            pickle.tensor(&Record { name: "t", layout, storage }).unwrap();
        }
        assert!(pickle.memo.len() < 100, "{}", pickle.memo.len());
    }
}
