//! Reads a safetensors header. Every byte of the data section belongs to exactly one tensor, or the file is refused.

mod metadata;

pub(super) use metadata::metadata;

use super::OpenOptions;
use crate::{
    checkpoint::{Checkpoint, Format},
    dtype::DType,
    error::{Fault, Result},
    source::ReadAt,
    stamp::FileStamp,
    tensor::{Backing, Dims, FileId, Layout, Storage, StorageId, Tensor},
};
use foldhash::fast::RandomState;
use hashbrown::HashTable;
use serde::{
    Deserialize, Deserializer,
    de::{Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use std::{borrow::Cow, fmt, hash::BuildHasher as _};

/// Reads the header of a safetensors file; `source` starts with its length.
pub(super) fn parse(source: &dyn ReadAt, stamp: FileStamp, options: &OpenOptions) -> Result<Checkpoint> {
    let header = header(source, options)?;
    let data_byte = 8 + header.len() as u64;
    let (storages, tensors) = parse_header(&header, data_byte, source.len_bytes() - data_byte)?;
    Ok(Checkpoint {
        format: Format::Safetensors,
        path: stamp.path.clone(),
        files: vec![stamp],
        storages,
        extents: Vec::new(),
        tensors,
        composites: Vec::new(),
        roots: Vec::new(),
        warnings: Vec::new(),
    })
}

/// The JSON of the header.
fn header(source: &dyn ReadAt, options: &OpenOptions) -> Result<Vec<u8>> {
    let mut length = [0; 8];
    source.read_exact_at(0, &mut length)?;
    let claimed_bytes = u64::from_le_bytes(length);
    let max_bytes = options.limits.header_bytes;
    if claimed_bytes > max_bytes {
        let expected = format!("a safetensors header of at most {max_bytes} bytes");
        return Err(Fault::new(expected, format!("{claimed_bytes} bytes")).over_limit("header_bytes"));
    }
    // Whoever opens the file may have allowed any length.
    let data_byte = claimed_bytes.saturating_add(8);
    if data_byte > source.len_bytes() {
        let expected = format!("a header of {claimed_bytes} bytes");
        return Err(Fault::new(expected, format!("a file of {} bytes", source.len_bytes()))
            .hint("the file looks truncated; compare its size with the publisher's")
            .corrupt());
    }
    source.read_range(8..data_byte)
}

/// Turns the JSON into tensors in the order of their bytes. `data_byte`: where the data section starts in the file.
fn parse_header(header: &[u8], data_byte: u64, data_len_bytes: u64) -> Result<(Vec<Storage>, Vec<Tensor>)> {
    let text = std::str::from_utf8(header).map_err(|error| {
        let at = 8 + error.valid_up_to() as u64;
        Fault::new("a safetensors header in UTF-8", "other bytes").at(at).corrupt()
    })?;
    let mut entries = serde_json::from_str::<Header<'_>>(text)
        .map_err(|error| Fault::new("a safetensors header in JSON", error.to_string()).corrupt())?
        .0;
    entries.sort_by_key(|(_, entry)| (entry.start_byte, entry.end_byte));

    let (mut storages, mut tensors) = (Vec::with_capacity(entries.len()), Vec::with_capacity(entries.len()));
    let mut covered_bytes = 0;
    for (name, entry) in entries {
        if entry.start_byte != covered_bytes || entry.end_byte < entry.start_byte {
            let found = format!("bytes {}..{}", entry.start_byte, entry.end_byte);
            return Err(Fault::new(format!("data that starts at byte {covered_bytes}"), found)
                .tensor(name)
                .corrupt());
        }
        covered_bytes = entry.end_byte;
        let len_bytes = entry.end_byte - entry.start_byte;
        let layout = layout(&entry, len_bytes).map_err(|error| error.in_tensor(&name))?;
        let storage = StorageId(storages.len() as u32);
        storages.push(Storage {
            file: FileId(0),
            start_byte: data_byte.saturating_add(entry.start_byte),
            len_bytes,
            swapped: false,
        });
        tensors.push(Tensor { name: name.into_owned(), layout, backing: Backing::Storage(storage) });
    }
    if covered_bytes != data_len_bytes {
        let found = format!("{data_len_bytes} bytes");
        let hint = if covered_bytes > data_len_bytes {
            "the file looks truncated; compare its size with the publisher's"
        } else {
            "bytes follow after the last tensor; compare the file's size with the publisher's"
        };
        return Err(Fault::new(format!("{covered_bytes} bytes of tensors"), found).hint(hint).corrupt());
    }
    Ok((storages, tensors))
}

/// A type whose elements are not bytes: the shape's last dimension becomes one of bytes, as PyTorch counts 4-bit floats.
fn packed(name: &str, shape: &mut [u64]) -> Result<DType> {
    let of_name = |it: &DType| it.packed().is_some_and(|(its, _)| its == name);
    let dtype = DType::all().find(of_name);
    let Some((dtype, bits)) = dtype.and_then(|it| Some((it, it.packed()?.1))) else {
        let found = format!("{name:?}");
        return Err(Fault::new("a dtype of the safetensors format", found).corrupt());
    };
    let found = format!("{name} of shape {shape:?}");
    // Less than 8 bits each: the bytes are fewer than the elements.
    let bits_of = |n_elems: u64| u128::from(n_elems) * u128::from(bits);
    let last = shape.last_mut().filter(|it| bits_of(**it) % 8 == 0);
    let Some(last) = last else {
        let multiple = if bits == 6 { 4 } else { 2 };
        let expected = format!("a last dimension of whole bytes, a multiple of {multiple} elements");
        return Err(Fault::new(expected, found)
            .hint(format!("ask its publisher for a file in which it is padded to a multiple of {multiple}"))
            .unsupported());
    };
    *last = (bits_of(*last) / 8) as u64;
    Ok(dtype)
}

fn layout(entry: &Entry<'_>, len_bytes: u64) -> Result<Layout> {
    let mut shape = entry.shape.clone();
    let dtype = match DType::from_safetensors_name(&entry.dtype) {
        Some(dtype) => dtype,
        None => packed(&entry.dtype, &mut shape)?,
    };
    // From left to right as the format's own reader does: an overflow before a zero counts.
    let n_elems = shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size));
    if n_elems.and_then(|it| it.checked_mul(dtype.size_bytes())) != Some(len_bytes) {
        let expected = format!("the bytes of a {} of shape {:?}", entry.dtype, entry.shape);
        return Err(Fault::new(expected, format!("{len_bytes} bytes")).corrupt());
    }
    Layout::contiguous(dtype, &shape)
}

/// The tensors of a header in its order.
struct Header<'a>(Vec<(Cow<'a, str>, Entry<'a>)>);

struct Entry<'a> {
    dtype: Cow<'a, str>,
    shape: Dims,
    start_byte: u64,
    end_byte: u64,
}

impl<'de: 'a, 'a> Deserialize<'de> for Header<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries: Vec<(Cow<'de, str>, Entry<'de>)> = Vec::new();
        // Positions alone: the names stand in `entries`.
        let (state, mut seen, mut has_metadata) = (RandomState::default(), HashTable::<u32>::new(), false);
        while let Some(Text(name)) = map.next_key()? {
            let is_metadata = name == "__metadata__";
            let hash = state.hash_one(&name);
            let is_name = |&it: &u32| entries[it as usize].0 == name;
            if (is_metadata && has_metadata) || seen.find(hash, is_name).is_some() {
                return Err(A::Error::custom(format_args!("key `{}` stands twice", name.escape_debug())));
            }
            if is_metadata {
                has_metadata = true;
                map.next_value::<Option<Strings>>()?;
            } else {
                entries.push((name, map.next_value()?));
                let position = entries.len() as u32 - 1;
                seen.insert_unique(hash, position, |&it| state.hash_one(&entries[it as usize].0));
            }
        }
        Ok(Header(entries))
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Entry<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // By hand, because a derived reader takes an array in the place of an object, too.
        deserializer.deserialize_map(EntryVisitor)
    }
}

struct EntryVisitor;

impl<'de> Visitor<'de> for EntryVisitor {
    type Value = Entry<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        while let Some(Text(key)) = map.next_key()? {
            let twice = match &*key {
                "dtype" => dtype.replace(map.next_value::<Text<'de>>()?.0).is_some(),
                "shape" => shape.replace(map.next_value::<Shape>()?.0).is_some(),
                "data_offsets" => offsets.replace(map.next_value::<[u64; 2]>()?).is_some(),
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    false
                }
            };
            if twice {
                return Err(A::Error::custom(format_args!("field `{key}` stands twice")));
            }
        }
        let [start_byte, end_byte] = offsets.ok_or_else(|| A::Error::missing_field("data_offsets"))?;
        Ok(Entry {
            dtype: dtype.ok_or_else(|| A::Error::missing_field("dtype"))?,
            shape: shape.ok_or_else(|| A::Error::missing_field("shape"))?,
            start_byte,
            end_byte,
        })
    }
}

/// A string that is borrowed from the header where it holds no escape (`Cow` alone always copies).
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// Sizes, read without an allocation.
struct Shape(Dims);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ShapeVisitor;
        impl<'de> Visitor<'de> for ShapeVisitor {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array of sizes")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Shape, A::Error> {
                let mut shape = Dims::new();
                while let Some(size) = seq.next_element()? {
                    shape.push(size);
                }
                Ok(Shape(shape))
            }
        }
        deserializer.deserialize_seq(ShapeVisitor)
    }
}

/// The free metadata: an object of strings, checked and dropped.
struct Strings;

impl<'de> Deserialize<'de> for Strings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StringsVisitor;
        impl<'de> Visitor<'de> for StringsVisitor {
            type Value = Strings;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Strings, A::Error> {
                while map.next_entry::<Text<'de>, Text<'de>>()?.is_some() {}
                Ok(Strings)
            }
        }
        deserializer.deserialize_map(StringsVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{error::Error, source::MemorySource};
    use std::path::PathBuf;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
    }

    fn parse_bytes(bytes: Vec<u8>) -> Result<Checkpoint> {
        let len_bytes = bytes.len() as u64;
        let stamp =
            FileStamp { path: PathBuf::from("x"), dev: 0, ino: 0, len_bytes, mtime_ns: 0, packed: None };
        parse(&MemorySource::new("x", bytes), stamp, &OpenOptions::default())
    }

    fn ours(header: &str, data_len_bytes: usize) -> Result<Checkpoint> {
        parse_bytes(file(header, &vec![0; data_len_bytes]))
    }

    #[test]
    fn tensors_come_in_the_order_of_their_bytes() {
        let header = r#"  {"b":{"dtype":"F32","shape":[2],"data_offsets":[1,9],"extra":[{}]},
            "__metadata__":null, "a":{"shape":[1],"dtype":"U8","data_offsets":[0,1]}} "#;
        let checkpoint = ours(header, 9).unwrap();
        let names: Vec<_> = checkpoint.tensors.iter().map(|it| it.name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(checkpoint.storages[1].start_byte, 8 + header.len() as u64 + 1);
    }

    /// Headers whose outcome the safetensors crate and we agree on.
    #[test]
    fn accepts_and_refuses_what_the_reference_does() {
        let one = |fields: &str| format!(r#"{{"w":{{{fields}}}}}"#);
        let cases = [
            ("{}".to_owned(), 0, true),
            (r#"{"__metadata__":{}}"#.to_owned(), 0, true),
            (r#"{"__metadata__":{"a":"b"}}"#.to_owned(), 0, true),
            (r#"{"__metadata__":{"a":1}}"#.to_owned(), 0, false),
            (r#"{"__metadata__":{},"__metadata__":{}}"#.to_owned(), 0, false),
            ("{} \n".to_owned(), 0, true),
            ("{}\0".to_owned(), 0, false),
            ("".to_owned(), 0, false),
            ("[]".to_owned(), 0, false),
            (one(r#""dtype":"F32","shape":[1],"data_offsets":[0,4]"#), 4, true),
            (one(r#""dtype":"F32","shape":[],"data_offsets":[0,4]"#), 4, true),
            (one(r#""dtype":"F32","shape":[1],"data_offsets":[0,4]"#), 5, false),
            (one(r#""dtype":"F32","shape":[1],"data_offsets":[0,4]"#), 3, false),
            (one(r#""dtype":"F32","shape":[1],"data_offsets":[1,5]"#), 5, false),
            (one(r#""dtype":"F32","shape":[1],"data_offsets":[4,0]"#), 4, false),
            (one(r#""dtype":"F32","shape":[2],"data_offsets":[0,4]"#), 4, false),
            (one(r#""dtype":"f32","shape":[1],"data_offsets":[0,4]"#), 4, false),
            (one(r#""dtype":"F32","shape":[-1],"data_offsets":[0,4]"#), 4, false),
            (one(r#""dtype":"F32","shape":[1.0],"data_offsets":[0,4]"#), 4, false),
            (one(r#""dtype":"F32","shape":[1e0],"data_offsets":[0,4]"#), 4, false),
            (one(r#""dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,4]"#), 4, false),
            (one(r#""dtype":"F32","shape":[1],"data_offsets":[0,4,4]"#), 4, false),
            (one(r#""dtype":"F32","shape":[1]"#), 4, false),
            (one(r#""dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]"#), 4, false),
            (one(r#""dtype":"F4","shape":[1],"data_offsets":[0,1]"#), 1, false),
            (one(r#""dtype":"F4","shape":[3,4],"data_offsets":[0,6]"#), 6, true),
            (one(r#""dtype":"F6_E2M3","shape":[3,4],"data_offsets":[0,9]"#), 9, true),
            (one(r#""dtype":"F6_E3M2","shape":[0],"data_offsets":[0,0]"#), 0, true),
            (one(r#""dtype":"F6_E3M2","shape":[4],"data_offsets":[0,4]"#), 4, false),
            (
                one(
                    r#""dtype":"F32","shape":[9223372036854775808,0,9223372036854775808],"data_offsets":[0,0]"#,
                ),
                0,
                true,
            ),
            (
                one(
                    r#""dtype":"F32","shape":[9223372036854775808,9223372036854775808,0],"data_offsets":[0,0]"#,
                ),
                0,
                false,
            ),
            (r#"{"\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#.to_owned(), 0, false),
            (r#"{"\u0000":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#.to_owned(), 0, true),
        ];
        for (header, data_len_bytes, accepted) in cases {
            let bytes = file(&header, &vec![0; data_len_bytes]);
            assert_eq!(
                safetensors::SafeTensors::deserialize(&bytes).is_ok(),
                accepted,
                "reference: {header}"
            );
            let ours = parse_bytes(bytes);
            assert_eq!(ours.is_ok(), accepted, "{header}: {ours:?}");
            assert!(ours.is_err() || ours.unwrap().validate().is_ok());
        }
    }

    #[test]
    fn two_tensors_of_one_name_and_arrays_for_objects_are_refused() {
        let twice = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
            "\u0061":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
        assert!(ours(twice, 2).unwrap_err().to_string().contains("`a` stands twice"));
        assert!(ours(r#"{"a":["F32",[1],[0,4]]}"#, 4).is_err());
    }

    #[test]
    fn floats_of_four_and_six_bits_count_in_bytes() {
        let one = |dtype: &str, shape: &str, len_bytes: usize| {
            let header =
                format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,{len_bytes}]}}}}"#);
            let found = ours(&header, len_bytes)?;
            let layout = &found.tensors[0].layout;
            Ok::<_, Error>((layout.dtype(), layout.shape().to_vec()))
        };
        assert_eq!(one("F4", "[3,4]", 6).unwrap(), (DType::F4x2, vec![3, 2]));
        assert_eq!(one("F6_E2M3", "[2,8]", 12).unwrap(), (DType::F6E2M3, vec![2, 6]));
        assert_eq!(one("F6_E3M2", "[4]", 3).unwrap(), (DType::F6E3M2, vec![3]));
        assert_eq!(one("F6_E3M2", "[0]", 0).unwrap(), (DType::F6E3M2, vec![0]));
        let most = one("F4", "[0,18446744073709551614]", 0).unwrap();
        assert_eq!(most, (DType::F4x2, vec![0, (1 << 63) - 1]));
        for (dtype, shape, len_bytes) in [("F4", "[2,1]", 1), ("F6_E2M3", "[2,2]", 3), ("F6_E3M2", "[]", 1)] {
            let error = one(dtype, shape, len_bytes).unwrap_err();
            assert!(matches!(error, Error::Unsupported(_)), "{error}");
        }
        assert!(matches!(one("F6_E2M3", "[8]", 5).unwrap_err(), Error::Corrupt(_)));
        assert!(one("F6_E2M3", "[18446744073709551612]", 3).is_err());
    }

    #[test]
    fn lengths_beyond_the_file_or_the_format_are_told_apart() {
        let mut bytes = file("{}", &[]);
        bytes[0] = 3;
        assert!(parse_bytes(bytes.clone()).unwrap_err().hint().contains("truncated"));
        bytes[4] = 1;
        assert!(parse_bytes(bytes).unwrap_err().to_string().contains("at most 100000000"));
    }
}
