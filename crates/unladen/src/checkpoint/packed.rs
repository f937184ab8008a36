//! What is true of tensors in packed records, which can only be read from beginning to end: to go back means to unpack once
//! more. So that no file makes us unpack without end, few tensors share a record, and each goes through it forwards.

use super::Checkpoint;
use crate::{
    error::{Error, Fault, Result},
    stamp::{Encoding, FileStamp},
    tensor::{FileId, Layout, Tensor},
};

/// Tensors in one record, tied ones counted once: each may cost a walk through all of it.
const MAX_VIEWS: u32 = 64;

/// Views that go back and forth may span so much, which is always read at once.
const MAX_TANGLED_BYTES: u64 = 64 << 10;

impl Checkpoint {
    /// True if the file is a packed record of another.
    pub fn is_packed(&self, file: FileId) -> bool {
        self.files.get(file.0 as usize).is_some_and(|it| it.packed.is_some())
    }

    /// How many packed records there are.
    pub fn n_packed(&self) -> usize {
        self.files.iter().filter(|it| it.packed.is_some()).count()
    }

    /// Fails with [`Error::Unsupported`] if packed records would have to be unpacked again and again.
    pub(super) fn check_packed(&self) -> Result<()> {
        if self.n_packed() == 0 {
            return Ok(());
        }
        let mut n_views = vec![0u32; self.files.len()];
        for ((id, tensor), first) in self.iter().zip(self.first_with_same_bytes()) {
            if id != first {
                continue;
            }
            for piece in self.pieces(id) {
                let file = self.storage_of(&piece).file;
                if !self.is_packed(file) || piece.layout.n_elems() == 0 {
                    continue;
                }
                n_views[file.0 as usize] += 1;
                if n_views[file.0 as usize] > MAX_VIEWS {
                    let found = "more of them";
                    let expected = format!("at most {MAX_VIEWS} tensors in a packed record");
                    return Err(self.unsupported(file, tensor, expected, found));
                }
                let stored = piece.layout.stored_bytes();
                if stored.end - stored.start > MAX_TANGLED_BYTES && !goes_forwards(piece.layout) {
                    let found = "one whose strides overlap";
                    let expected = "a tensor that can be read from beginning to end, in a packed record";
                    return Err(self.unsupported(file, tensor, expected.to_owned(), found));
                }
            }
        }
        Ok(())
    }

    fn unsupported(&self, file: FileId, tensor: &Tensor, expected: String, found: &str) -> Error {
        let FileStamp { path, packed, .. } = self.file(file);
        let name = packed.as_ref().map_or("", |it| &*it.name);
        let hint = match packed.as_ref().map(|it| it.encoding) {
            Some(Encoding::Deflate) => "unzip the file and zip it again without compression (`zip -0`)",
            Some(Encoding::Latin1) | None => "save it again with a current torch.save",
        };
        Fault::new(expected, format!("{found} in `{}`", name.escape_debug()))
            .tensor(&tensor.name)
            .hint(hint)
            .unsupported()
            .in_file(path)
    }
}

/// True if each axis steps over all that the axes of shorter steps span, as slicing, permuting and expanding leave it: then
/// the elements can be taken from the first byte to the last.
fn goes_forwards(layout: &Layout) -> bool {
    let axes = layout.stride().iter().zip(layout.shape()).filter(|&(&step, &len)| step > 0 && len > 1);
    let mut axes: Vec<(u64, u64)> = axes.map(|(&step, &len)| (step, len)).collect();
    axes.sort_unstable();
    let mut span_elems = 1;
    axes.into_iter().all(|(step, len)| {
        let is_over = step >= span_elems;
        span_elems += (len - 1) * step;
        is_over
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        checkpoint::Format,
        dtype::DType,
        stamp::Packed,
        tensor::{Backing, Storage, StorageId},
    };

    const LEN_BYTES: u64 = 1 << 20;

    fn checkpoint(layouts: Vec<Layout>) -> Checkpoint {
        let file = FileStamp { path: "a.pt".into(), dev: 0, ino: 0, len_bytes: 9, mtime_ns: 0, packed: None };
        let packed = Packed {
            name: "a/data/0".into(),
            encoding: Encoding::Deflate,
            start_byte: 0,
            len_bytes: 9,
            file_len_bytes: 9,
            crc32: None,
        };
        let record = file.of_packed(LEN_BYTES, packed);
        let tensor = |(number, layout)| Tensor {
            name: format!("t{number}"),
            layout,
            backing: Backing::Storage(StorageId(0)),
        };
        Checkpoint {
            format: Format::Pth,
            path: "a.pt".into(),
            files: vec![file, record],
            storages: vec![Storage { file: FileId(1), start_byte: 0, len_bytes: LEN_BYTES, swapped: false }],
            extents: Vec::new(),
            tensors: layouts.into_iter().enumerate().map(tensor).collect(),
            composites: Vec::new(),
            roots: Vec::new(),
            warnings: Vec::new(),
        }
    }

    fn view(shape: &[u64], stride: &[u64], offset: u64) -> Layout {
        Layout::strided(DType::U8, shape, stride, offset).unwrap()
    }

    #[test]
    fn a_record_has_few_views_and_any_number_of_ties() {
        let views = |n: u64| (0..n).map(|it| view(&[10], &[1], it)).collect::<Vec<_>>();
        assert!(checkpoint(views(64)).validate().is_ok());
        assert!(checkpoint(vec![view(&[10], &[1], 0); 1000]).validate().is_ok());
        let error = checkpoint(views(65)).validate().unwrap_err();
        assert!(matches!(error, Error::Unsupported(_)) && error.to_string().contains("`t64`"), "{error}");
        assert!(error.hint().contains("zip -0"));
        // Without packing there may be thousands.
        let mut plain = checkpoint(views(65));
        plain.storages[0] = Storage { file: FileId(0), len_bytes: 9, ..plain.storages[0].clone() };
        plain.tensors.retain(|it| it.layout.stored_bytes().end <= 9);
        plain.validate().unwrap();
    }

    #[test]
    fn slices_permutations_and_expansions_go_forwards_and_tangled_windows_do_not() {
        for (shape, stride) in [
            (vec![1000, 1000], vec![1000, 1]),
            (vec![1000, 1000], vec![1, 1000]),
            (vec![500, 333], vec![2000, 3]),
            (vec![7, 500, 1, 333], vec![0, 2000, 12345, 3]),
            (vec![10, 20, 30], vec![1, 300, 10]),
            (vec![100_000], vec![10]),
        ] {
            let one = checkpoint(vec![view(&shape, &stride, 0)]);
            one.validate().unwrap_or_else(|error| panic!("{shape:?} {stride:?}: {error}"));
        }
        for (shape, stride) in [
            (vec![1000, 1000], vec![1, 1]),
            (vec![1000, 1001], vec![1000, 1]),
            (vec![100, 900], vec![1000, 999]),
        ] {
            let layout = view(&shape, &stride, 0);
            let is_short = layout.stored_bytes().end <= MAX_TANGLED_BYTES;
            assert_eq!(checkpoint(vec![layout]).validate().is_ok(), is_short, "{shape:?} {stride:?}");
        }
    }
}
