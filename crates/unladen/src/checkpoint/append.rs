//! Puts checkpoints together: what one file says becomes a part of what a set of files says.

use super::Checkpoint;
use crate::{
    error::{Fault, Result},
    tensor::{Backing, Extent, FileId, Storage, StorageId, Tensor},
};

impl Checkpoint {
    /// Adds all that another checkpoint says, its files behind those that are here; its format and its path are lost.
    ///
    /// Names that stand in both are the caller's to find. Fails with [`Error::Unsupported`](crate::Error::Unsupported) if
    /// there are more files, storages, extents or tensors then than can be numbered; nothing is added in that case.
    pub fn append(&mut self, other: Checkpoint) -> Result<()> {
        let first_file = first(self.files.len(), other.files.len(), "files")?;
        let first_storage = first(self.storages.len(), other.storages.len(), "storages")?;
        let first_extent = first(self.extents.len(), other.extents.len(), "extents")?;
        let first_tensor = first(self.tensors.len(), other.tensors.len(), "tensors")?;
        let storage_id = |it: StorageId| StorageId(first_storage + it.0);
        let backing = |it: Backing| match it {
            Backing::Meta => Backing::Meta,
            Backing::Storage(storage) => Backing::Storage(storage_id(storage)),
            Backing::Extents(range) => Backing::Extents(first_extent + range.start..first_extent + range.end),
        };
        let storage = |it: Storage| Storage { file: FileId(first_file + it.file.0), ..it };
        let extent = |it: Extent| Extent { storage: storage_id(it.storage), ..it };
        let tensor = |it: Tensor| Tensor { backing: backing(it.backing), ..it };
        self.files.extend(other.files);
        self.storages.extend(other.storages.into_iter().map(storage));
        self.extents.extend(other.extents.into_iter().map(extent));
        self.tensors.extend(other.tensors.into_iter().map(tensor));
        self.composites.extend(other.composites.into_iter().map(|it| it.shifted(first_tensor)));
        for root in other.roots {
            if !self.roots.contains(&root) {
                self.roots.push(root);
            }
        }
        self.warnings.extend(other.warnings);
        Ok(())
    }
}

/// The number of the first one that is added; `n_more` follow, and all of them have numbers.
fn first(n_here: usize, n_more: usize, what: &str) -> Result<u32> {
    let end = n_here.checked_add(n_more).and_then(|it| u32::try_from(it).ok());
    match (u32::try_from(n_here), end) {
        (Ok(first), Some(_)) => Ok(first),
        _ => {
            let expected = format!("at most {} {what} in a checkpoint", u32::MAX);
            Err(Fault::new(expected, "more of them").unsupported())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        DType, Format,
        checkpoint::Warning,
        stamp::FileStamp,
        tensor::{Dims, Layout},
    };

    /// Two storages of 8 bytes in a file; a tensor on the second, and one that is put together from both.
    fn checkpoint(name: &str) -> Checkpoint {
        let path = std::path::PathBuf::from(name);
        let storage = |start_byte| Storage { file: FileId(0), start_byte, len_bytes: 8, swapped: false };
        let half = |storage, at| Extent {
            storage: StorageId(storage),
            layout: Layout::contiguous(DType::F32, &[2]).unwrap(),
            at: Dims::from_slice(&[at]),
        };
        let tensor = |part: &str, size, backing| Tensor {
            name: format!("{name}.{part}"),
            layout: Layout::contiguous(DType::F32, &[size]).unwrap(),
            backing,
        };
        Checkpoint {
            format: Format::Pth,
            path: path.clone(),
            files: vec![FileStamp { path, dev: 0, ino: 0, len_bytes: 16, mtime_ns: 0, packed: None }],
            storages: vec![storage(0), storage(8)],
            extents: vec![half(0, 0), half(1, 2)],
            tensors: vec![
                tensor("plain", 2, Backing::Storage(StorageId(1))),
                tensor("split", 4, Backing::Extents(0..2)),
                tensor("meta", 4, Backing::Meta),
            ],
            composites: Vec::new(),
            roots: Vec::new(),
            warnings: vec![Warning::MetaTensor(format!("{name}.meta"))],
        }
    }

    #[test]
    fn what_is_appended_still_lies_in_its_own_file() {
        let mut all = checkpoint("a");
        all.append(checkpoint("b")).unwrap();
        all.append(checkpoint("c")).unwrap();
        all.validate().unwrap();
        assert_eq!((all.path.to_str(), all.warnings.len()), (Some("a"), 3));
        for (id, tensor) in all.iter() {
            let file_of_name = all.files.iter().find(|it| tensor.name.starts_with(it.path.to_str().unwrap()));
            for piece in all.pieces(id) {
                assert_eq!(Some(all.file(all.storage_of(&piece).file)), file_of_name, "{}", tensor.name);
            }
        }
        let starts: Vec<u64> = all.pieces(crate::tensor::TensorId(7)).map(|it| it.at[0]).collect();
        assert_eq!(starts, [0, 2]);
    }

    #[test]
    fn what_cannot_be_numbered_is_an_error() {
        assert_eq!(first(3, 4, "files").unwrap(), 3);
        assert!(first(3, u32::MAX as usize - 2, "files").is_err());
        assert!(first(usize::MAX, 1, "files").is_err());
    }
}
