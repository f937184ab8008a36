//! Writes the files of the other tests, by hand, so that they can be wrong in any way.

use std::{
    fmt::Write as _,
    fs,
    io::{Cursor, Write as _},
    path::Path,
};
use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

/// A safetensors file of bytes: names, shapes, contents.
pub(crate) fn safetensors(path: &Path, dtype: &str, tensors: &[(&str, &[u64], Vec<u8>)]) {
    let (mut header, mut data) = (String::from("{"), Vec::new());
    for (index, (name, shape, bytes)) in tensors.iter().enumerate() {
        let comma = if index == 0 { "" } else { "," };
        let (start, end) = (data.len(), data.len() + bytes.len());
        write!(
            header,
            r#"{comma}"{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#
        )
        .unwrap();
        data.extend_from_slice(bytes);
    }
    header.push('}');
    fs::write(path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()).unwrap();
}

/// Bytes that count up from a number.
pub(crate) fn counting(first: u8, n_bytes: u64) -> Vec<u8> {
    (0..n_bytes).map(|it| first.wrapping_add(it as u8)).collect()
}

/// An expression of a pickle.
#[derive(Clone, Debug)]
pub(crate) enum Py {
    None,
    Int(i64),
    Str(String),
    /// Module and name.
    Global(&'static str, &'static str),
    Tuple(Vec<Py>),
    List(Vec<Py>),
    Dict(Vec<(Py, Py)>),
    /// Function, arguments.
    Call(Box<Py>, Vec<Py>),
    /// Class, state.
    Object(Box<Py>, Box<Py>),
    Persistent(Box<Py>),
}

pub(crate) fn text(text: &str) -> Py {
    Py::Str(text.to_owned())
}

/// An object with attributes.
pub(crate) fn object(module: &'static str, class: &'static str, fields: Vec<(&str, Py)>) -> Py {
    let fields = fields.into_iter().map(|(name, value)| (text(name), value)).collect();
    Py::Object(Box::new(Py::Global(module, class)), Box::new(Py::Dict(fields)))
}

/// `torch.Size`.
pub(crate) fn size(sizes: &[u64]) -> Py {
    let sizes = Py::Tuple(sizes.iter().map(|&it| Py::Int(it as i64)).collect());
    Py::Call(Box::new(Py::Global("torch", "Size")), vec![sizes])
}

pub(crate) fn pickle(value: &Py) -> Vec<u8> {
    let mut bytes = vec![0x80, 2];
    put(value, &mut bytes);
    bytes.push(b'.');
    bytes
}

fn put(value: &Py, out: &mut Vec<u8>) {
    match value {
        Py::None => out.push(b'N'),
        Py::Int(number) => {
            out.extend([0x8a, 8]);
            out.extend(number.to_le_bytes());
        }
        Py::Str(text) => {
            out.push(b'X');
            out.extend((text.len() as u32).to_le_bytes());
            out.extend(text.as_bytes());
        }
        Py::Global(module, name) => out.extend(format!("c{module}\n{name}\n").bytes()),
        Py::Tuple(items) => {
            out.push(b'(');
            items.iter().for_each(|it| put(it, out));
            out.push(b't');
        }
        Py::List(items) => {
            out.extend(b"](");
            items.iter().for_each(|it| put(it, out));
            out.push(b'e');
        }
        Py::Dict(items) => {
            out.extend(b"}(");
            items.iter().for_each(|(key, value)| {
                put(key, out);
                put(value, out);
            });
            out.push(b'u');
        }
        Py::Call(function, args) => {
            put(function, out);
            put(&Py::Tuple(args.clone()), out);
            out.push(b'R');
        }
        Py::Object(class, state) => {
            put(class, out);
            out.extend([b')', 0x81]);
            put(state, out);
            out.push(b'b');
        }
        Py::Persistent(id) => {
            put(id, out);
            out.push(b'Q');
        }
    }
}

/// What `torch.save` writes for one float tensor with these strides.
pub(crate) fn archive(shape: &[u64], stride: &[u64], bytes: &[u8]) -> Vec<u8> {
    let numbers = |it: &[u64]| Py::Tuple(it.iter().map(|&it| Py::Int(it as i64)).collect());
    let storage = Py::Persistent(Box::new(Py::Tuple(vec![
        text("storage"),
        Py::Global("torch", "FloatStorage"),
        text("0"),
        text("cpu"),
        Py::Int(bytes.len() as i64 / 4),
    ])));
    let hooks = Py::Call(Box::new(Py::Global("collections", "OrderedDict")), vec![]);
    let args = vec![storage, Py::Int(0), numbers(shape), numbers(stride), Py::Int(0), hooks];
    let tensor = Py::Call(Box::new(Py::Global("torch._utils", "_rebuild_tensor_v2")), args);
    archive_of(&tensor, Some(bytes))
}

/// An archive as `torch.save` writes it of any value, with the bytes of one storage or of none.
pub(crate) fn archive_of(value: &Py, storage: Option<&[u8]>) -> Vec<u8> {
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let pickle = pickle(value);
    let storage = storage.map(|bytes| ("archive/data/0", bytes));
    let records = [("archive/data.pkl", &pickle[..])].into_iter().chain(storage);
    for (name, content) in records.chain([("archive/version", &b"3\n"[..])]) {
        zip.start_file(name, options).unwrap();
        zip.write_all(content).unwrap();
    }
    zip.finish().unwrap().into_inner()
}
