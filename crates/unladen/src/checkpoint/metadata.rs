//! How much heap a checkpoint's own tables take: names, shapes, storages, files, warnings. Nothing beside a model's
//! weights, but more than the weights of many tiny tensors.

use super::{Checkpoint, Composite, CompositeKind, Format, Warning};
use crate::{
    stamp::{FileStamp, Packed},
    tensor::spilled_bytes,
};

/// What an allocator adds to a block in front of it.
const BLOCK_HEAD_BYTES: usize = 8;
/// Blocks are multiples of this, and no smaller than two of it.
const BLOCK_STEP_BYTES: usize = 16;
/// Blocks from this size on are mappings of their own: whole pages.
const MAPPED_BYTES: usize = 128 << 10;
const PAGE_BYTES: usize = 4096;
/// What a tensor takes while a distributed checkpoint is opened, its chunks apart: measured on 40 to 40,000 tensors.
const DCP_TENSOR_BYTES: u64 = 800;
/// What a chunk of a tensor takes: measured on 20,000 of them.
const DCP_CHUNK_BYTES: u64 = 960;
/// The ends of archives and windows of local headers, however few tensors there are.
const READS_BYTES: u64 = 256 << 10;

impl Checkpoint {
    /// Bytes of heap that the tables of this checkpoint hold, the allocator's rounding included: close, and not less.
    ///
    /// Arithmetic over the tables, one pass. The tables of the files that are open beside it are not in it.
    pub fn metadata_bytes(&self) -> u64 {
        let tables = [
            self.files_bytes(),
            table(&self.storages),
            table(&self.extents),
            table(&self.tensors),
            table(&self.composites),
            table(&self.roots),
            table(&self.warnings),
            block(self.path.capacity()),
        ];
        let tensors = self
            .tensors
            .iter()
            .map(|it| block(it.name.capacity()) + it.layout.block_bytes().map(block).sum::<u64>());
        let extents = self
            .extents
            .iter()
            .map(|it| it.layout.block_bytes().chain(spilled_bytes(&it.at)).map(block).sum());
        let composites = self.composites.iter().map(composite);
        let roots = self.roots.iter().map(|it| block(it.capacity()));
        let warnings = self.warnings.iter().map(warning);
        tables.into_iter().chain(tensors).chain(extents).chain(composites).chain(roots).chain(warnings).sum()
    }

    /// The files' part of them: long only if there are many, or many records packed in one.
    fn files_bytes(&self) -> u64 {
        let packed_name = |it: &FileStamp| it.packed.as_ref().map_or(0, |it| block(it.name.len()));
        let names = self.files.iter().map(|it| block(it.path.capacity()) + packed_name(it));
        table(&self.files) + names.sum::<u64>()
    }

    /// Bytes of heap that the list of packed records takes beside the open file, where it stands once more.
    pub fn packed_list_bytes(&self) -> u64 {
        let packed = self.files.iter().filter_map(|it| Some((it, it.packed.as_ref()?)));
        let of_one = |(file, packed): (&FileStamp, &Packed)| {
            // Lists grow by doubling.
            2 * size_of::<FileStamp>() as u64 + block(file.path.capacity()) + block(packed.name.len())
        };
        packed.map(of_one).sum()
    }

    /// About the most heap that opening this checkpoint took, with what stayed of it ([`Checkpoint::metadata_bytes`]).
    ///
    /// Measured on files of 100,000 tensors: 3.5 to 4 times the tables for a pickle and its archive (the allocator does not
    /// always find room where it was before), 2.1 times for a safetensors header. An estimate with some room for plain state dicts; objects without tensors come on top.
    pub fn opening_peak_bytes(&self) -> u64 {
        let held_bytes = self.metadata_bytes();
        let passing_bytes = match self.format {
            // Nothing of a pickle becomes a file.
            Format::Pth | Format::Legacy | Format::Tar | Format::Pickle | Format::TorchScript => {
                (held_bytes - self.files_bytes()).saturating_mul(13) / 4
            }
            Format::Safetensors => held_bytes.saturating_mul(3) / 2,
            // Its files are opened one after the other.
            Format::Folder | Format::Offload => held_bytes / 2,
            // The weight map stays while its files are opened one after the other; one of them may hold nearly all.
            Format::Sharded => held_bytes.saturating_mul(3),
            // Not by what stays: a tensor and a chunk are half a dozen objects each in the pickle of the metadata.
            Format::Dcp => {
                let tensors = (self.tensors.len() as u64).saturating_mul(DCP_TENSOR_BYTES);
                tensors.saturating_add((self.storages.len() as u64).saturating_mul(DCP_CHUNK_BYTES))
            }
        };
        held_bytes.saturating_add(passing_bytes).saturating_add(READS_BYTES)
    }
}

/// What a block of some bytes takes.
fn block(len_bytes: usize) -> u64 {
    let whole = |step| len_bytes.saturating_add(2 * BLOCK_HEAD_BYTES).next_multiple_of(step);
    let taken = match len_bytes {
        0 => 0,
        MAPPED_BYTES.. => whole(PAGE_BYTES),
        // One head only: the second belongs to mappings.
        _ => (len_bytes + BLOCK_HEAD_BYTES).next_multiple_of(BLOCK_STEP_BYTES).max(2 * BLOCK_STEP_BYTES),
    };
    taken as u64
}

fn table<T>(table: &Vec<T>) -> u64 {
    block(table.capacity() * size_of::<T>())
}

fn composite(composite: &Composite) -> u64 {
    let class = match &composite.kind {
        CompositeKind::Subclass { class } => block(class.capacity()),
        _ => 0,
    };
    class + block(composite.name.capacity()) + spilled_bytes(&composite.shape).map_or(0, block)
}

fn warning(warning: &Warning) -> u64 {
    match warning {
        Warning::UnknownSymbols(names) | Warning::DangerousSymbols(names) => {
            table(names) + names.iter().map(|it| block(it.capacity())).sum::<u64>()
        }
        Warning::DuplicateKey(text) | Warning::MetaTensor(text) | Warning::LeftOut(text) => {
            block(text.capacity())
        }
        Warning::SameName { name, listed_as, place } => {
            [name, listed_as, place].map(|it| block(it.capacity())).into_iter().sum()
        }
        Warning::OutsideRoot { root, others, .. } => {
            block(root.capacity()) + table(others) + others.iter().map(|it| block(it.capacity())).sum::<u64>()
        }
        Warning::PartsAlone { name, what } => block(name.capacity()) + block(what.capacity()),
        Warning::MissingRecord(_) | Warning::TrailingBytes { .. } => 0,
        Warning::TiesWrittenOut { .. } | Warning::ViewsWrittenOut { .. } => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_rounded_as_allocators_round_them() {
        assert_eq!([0, 1, 24, 25, 40, 41].map(block), [0, 32, 32, 48, 48, 64]);
        assert_eq!(block(MAPPED_BYTES), MAPPED_BYTES as u64 + 4096);
    }
}
