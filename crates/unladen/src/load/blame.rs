//! Says which tensor a load failed on: the engine moves bytes and knows places, not tensors.

use crate::{checkpoint::Checkpoint, error::Error, tensor::TensorId};

/// Adds to a fault at a place of a file the name of the first tensor that has bytes there, if one has.
pub(super) fn in_tensor(error: Error, checkpoint: &Checkpoint) -> Error {
    let (Error::Corrupt(fault) | Error::Unsupported(fault) | Error::Mismatch(fault)) = &error else {
        return error;
    };
    let Some(at_byte) = fault.offset_bytes else { return error };
    let has_bytes_there = |id: TensorId| {
        checkpoint.pieces(id).filter(|it| it.layout.n_elems() > 0).any(|piece| {
            let storage = checkpoint.storage_of(&piece);
            let file = checkpoint.file(storage.file);
            let stored = piece.layout.stored_bytes();
            file.path == fault.path
                && match &file.packed {
                    // Whether a record's checksum is right shows behind its last byte.
                    Some(packed) => {
                        (packed.start_byte..=packed.start_byte + packed.len_bytes).contains(&at_byte)
                    }
                    None => (storage.start_byte + stored.start..storage.start_byte + stored.end)
                        .contains(&at_byte),
                }
        })
    };
    match checkpoint.iter().find(|(id, _)| has_bytes_there(*id)) {
        Some((_, tensor)) => {
            let name = tensor.name.clone();
            error.in_tensor(&name)
        }
        None => error,
    }
}
