//! Distributed checkpoints of PyTorch: the metadata's pickle and two files of chunks, each chunk an archive, with lies in
//! every place, size, offset and name.

use crate::{
    archive::{self, Record},
    damage, number, one_in,
    pickle::{self, global, long, text},
    weight_map::Named,
};
use arbitrary::{Result, Unstructured};

const FILES: [&str; 2] = ["__0_0.distcp", "__1_0.distcp"];
const CLASSES: [(&str, &str, u64); 3] =
    [("FloatStorage", "float32", 4), ("HalfStorage", "float16", 2), ("ByteStorage", "uint8", 1)];
const STRAYS: [&str; 6] = ["../input", ".metadata", "", "link", "pipe", "missing"];

/// A box of a tensor, or an object that is none.
struct Chunk {
    tensor: String,
    /// `None`: it is no tensor.
    at: Option<Vec<u64>>,
    size: Vec<u64>,
    file: usize,
    start_byte: u64,
    len_bytes: u64,
}

/// The files of a folder.
pub fn folder(u: &mut Unstructured<'_>) -> Result<Vec<Named>> {
    let (mut files, mut chunks) = ([Vec::new(), Vec::new()], Vec::new());
    let mut tensors = b"}(".to_vec();
    for index in 0..u.int_in_range(1..=3)? {
        let class = *u.choose(&CLASSES)?;
        let name = format!("model.{index}");
        let size = [u.int_in_range(0..=4)?, u.int_in_range(1..=3)?];
        let first = chunks.len();
        let rows = u.int_in_range(0..=size[0])?;
        for (at, n_rows) in [(0, rows), (rows, size[0] - rows)] {
            let is_left_out = n_rows == 0 && (size[0] > 0 || at > 0 || chunks.len() > first);
            if is_left_out {
                continue;
            }
            let file = u.int_in_range(0..=1)?;
            let size = vec![lie(u, n_rows)?, size[1]];
            let bytes = archive_of(u, class, &size)?;
            let start_byte = files[file].len() as u64;
            let len_bytes = bytes.len() as u64;
            files[file].extend(bytes);
            let tensor = name.clone();
            chunks.push(Chunk { tensor, at: Some(vec![lie(u, at)?, 0]), size, file, start_byte, len_bytes });
        }
        text(&mut tensors, &name);
        tensor(u, &mut tensors, class.1, &size, &chunks[first..])?;
    }
    for name in ["epoch", "optimizer"] {
        if one_in(u, 3)? {
            text(&mut tensors, name);
            object(&mut tensors, "BytesStorageMetadata", b"}");
            if !one_in(u, 8)? {
                let file = u.int_in_range(0..=1)?;
                let pickle = if one_in(u, 2)? { pickle::stream(u)? } else { b"\x80\x02K\x07.".to_vec() };
                let bytes = archive::honest(&archive::records_of(pickle));
                let (start_byte, len_bytes) = (files[file].len() as u64, bytes.len() as u64);
                files[file].extend(bytes);
                let tensor = name.to_owned();
                chunks.push(Chunk { tensor, at: None, size: Vec::new(), file, start_byte, len_bytes });
            }
        }
    }
    tensors.push(b'u');
    let places = places(u, &chunks)?;
    let mut fields = b"}(".to_vec();
    text(&mut fields, "state_dict_metadata");
    fields.extend(tensors);
    text(&mut fields, "planner_data");
    fields.push(b'N');
    text(&mut fields, "storage_data");
    fields.extend(places);
    fields.push(b'u');
    let mut metadata = b"\x80\x04".to_vec();
    object(&mut metadata, "Metadata", &fields);
    metadata.push(b'.');

    let mut all = vec![(".metadata", metadata)];
    all.extend(FILES.into_iter().zip(files));
    if one_in(u, 4)? {
        let at = u.int_in_range(0..=2)?;
        damage(u, &mut all[at].1)?;
    }
    Ok(all)
}

/// What the metadata say of a tensor.
fn tensor(
    u: &mut Unstructured<'_>,
    out: &mut Vec<u8>,
    dtype: &str,
    size: &[u64],
    chunks: &[Chunk],
) -> Result<()> {
    let mut fields = b"}(".to_vec();
    text(&mut fields, "properties");
    let mut state = b"(".to_vec();
    global(&mut state, ("torch", if one_in(u, 24)? { "int64" } else { dtype }));
    state.push(b't');
    object(&mut fields, "TensorProperties", &state);
    text(&mut fields, "size");
    dims(u, &mut fields, size)?;
    text(&mut fields, "chunks");
    fields.extend_from_slice(b"](");
    for chunk in chunks {
        let mut of_chunk = b"}(".to_vec();
        text(&mut of_chunk, "offsets");
        dims(u, &mut of_chunk, chunk.at.as_deref().unwrap_or_default())?;
        text(&mut of_chunk, "sizes");
        dims(u, &mut of_chunk, &chunk.size)?;
        of_chunk.push(b'u');
        object(&mut fields, "ChunkStorageMetadata", &of_chunk);
    }
    fields.extend_from_slice(b"eu");
    object(out, "TensorStorageMetadata", &fields);
    Ok(())
}

/// The dictionary that says where each chunk is.
fn places(u: &mut Unstructured<'_>, chunks: &[Chunk]) -> Result<Vec<u8>> {
    let mut out = b"}(".to_vec();
    for chunk in chunks {
        for _ in 0..if one_in(u, 48)? { 2 } else { 1 } {
            let mut key = b"}(".to_vec();
            text(&mut key, "fqn");
            text(&mut key, &chunk.tensor);
            text(&mut key, "offset");
            match &chunk.at {
                Some(at) => dims(u, &mut key, at)?,
                None => key.push(b'N'),
            }
            text(&mut key, "index");
            key.extend_from_slice(b"Nu");
            object(&mut out, "MetadataIndex", &key);
            let mut place = b"}(".to_vec();
            text(&mut place, "relative_path");
            let file = if one_in(u, 24)? { u.choose(&STRAYS)? } else { FILES[chunk.file] };
            text(&mut place, file);
            text(&mut place, "offset");
            long(&mut place, lie(u, chunk.start_byte)?);
            text(&mut place, "length");
            long(&mut place, lie(u, chunk.len_bytes)?);
            place.push(b'u');
            object(&mut out, "_StorageInfo", &place);
        }
    }
    out.push(b'u');
    Ok(out)
}

/// The archive that a chunk is: one tensor, whole or a view.
fn archive_of(
    u: &mut Unstructured<'_>,
    (class, _, elem_bytes): (&str, &str, u64),
    size: &[u64],
) -> Result<Vec<u8>> {
    let n_elems = size.iter().fold(1u64, |product, it| product.saturating_mul(*it)).min(1 << 10);
    let mut pickle = b"\x80\x02".to_vec();
    global(&mut pickle, ("torch._utils", "_rebuild_tensor_v2"));
    pickle.extend_from_slice(b"((");
    text(&mut pickle, "storage");
    global(&mut pickle, ("torch", class));
    text(&mut pickle, "0");
    text(&mut pickle, "cpu");
    long(&mut pickle, lie(u, n_elems)?);
    pickle.extend_from_slice(b"tQK\0");
    dims(u, &mut pickle, size)?;
    let stride = if one_in(u, 4)? { [1, size[0]] } else { [size[1], 1] };
    dims(u, &mut pickle, &stride)?;
    pickle.extend_from_slice(b"\x89}tR.");
    let bytes: Vec<u8> = (0..n_elems * elem_bytes).map(|it| it as u8).collect();
    let records = [
        Record::new("archive/data.pkl", &pickle),
        Record::new("archive/data/0", &bytes),
        Record::new("archive/version", b"3\n"),
    ];
    if one_in(u, 8)? { archive::write(&records, u) } else { Ok(archive::honest(&records)) }
}

/// An object of one of the classes of the metadata.
fn object(out: &mut Vec<u8>, class: &str, state: &[u8]) {
    global(out, ("torch.distributed.checkpoint.metadata", class));
    out.extend_from_slice(b")\x81");
    out.extend_from_slice(state);
    out.push(b'b');
}

fn dims(u: &mut Unstructured<'_>, out: &mut Vec<u8>, dims: &[u64]) -> Result<()> {
    out.push(b'(');
    for &it in dims {
        long(out, lie(u, it)?);
    }
    if one_in(u, 64)? {
        long(out, 1);
    }
    out.push(b't');
    Ok(())
}

/// There are many numbers here, so that one in a hundred is enough.
fn lie(u: &mut Unstructured<'_>, truth: u64) -> Result<u64> {
    if one_in(u, 100)? { number(u) } else { Ok(truth) }
}
