//! Tells what a file is by its first bytes, never by its name; where they tell nothing, by whether all of it is a pickle.

use super::{Limits, plain};
use crate::{
    error::{Error, Fault},
    source::ReadAt,
};

/// Bytes that [`head`] reads: up to the mark of a tar archive.
const HEAD_BYTES: u64 = 512;

/// What this version reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Container {
    Safetensors,
    Pickled(Pickled),
}

/// A container around a pickle of PyTorch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pickled {
    Zip,
    /// Pickles, then storages: PyTorch before 1.6.
    Legacy,
    /// Perhaps PyTorch before 0.1.10.
    Tar,
    /// One pickle.
    Plain,
}

/// PyTorch's magic number as pickles of protocol 2 and above write it, without the protocol.
const LEGACY_MAGIC: &[u8] = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";
/// The same as protocols 0 and 1 write it.
const LEGACY_MAGIC_TEXT: &[u8] = b"L119547037146038801333356L\n.";
/// How pickles of protocols 0 and 1 start that hold a dictionary, a list, or an object of a module that is known for it.
const TEXT_PICKLES: &[&[u8]] = &[
    b"(dp",
    b"(lp",
    b"}q\x00",
    b"]q\x00",
    b"ccollections\n",
    b"ccopy_reg\n",
    b"c__builtin__\n",
    b"ctorch",
    b"cnumpy",
];

const EXPECTED: &str = "a checkpoint of PyTorch, or safetensors";
const RESAVE: &str = "load it with PyTorch and save it again with torch.save, or as safetensors";

/// A start of a file that is known and not read: what it is, and what to do about it.
struct Known {
    start: &'static [u8],
    what: &'static str,
    hint: &'static str,
}

const KNOWN: &[Known] = &[
    Known {
        start: b"version https://git-lfs",
        what: "a Git LFS pointer, which stands for the real file",
        hint: "fetch the real file with `git lfs pull`, or download it",
    },
    Known { start: b"\x1f\x8b", what: "a gzip file", hint: "unpack it with `gunzip` first" },
    Known { start: b"7z\xbc\xaf\x27\x1c", what: "a 7z archive", hint: "unpack it with `7z x` first" },
    Known {
        start: b"\x89HDF",
        what: "an HDF5 file (Keras?)",
        hint: "convert it to safetensors with the framework that wrote it",
    },
    Known { start: b"GGUF", what: "a GGUF file", hint: "ask its publisher for safetensors, or convert it" },
    Known { start: b"\x89PNG\r\n", what: "a PNG image", hint: "name a checkpoint file" },
    Known { start: b"\x28\xb5\x2f\xfd", what: "a zstd file", hint: "unpack it with `unzstd` first" },
    Known { start: b"\xfd7zXZ", what: "an xz file", hint: "unpack it with `unxz` first" },
    Known { start: b"BZh", what: "a bzip2 file", hint: "unpack it with `bunzip2` first" },
    Known { start: b"\xff\xd8\xff", what: "a JPEG image", hint: "name a checkpoint file" },
    Known { start: b"%PDF-", what: "a PDF document", hint: "name a checkpoint file" },
    Known {
        start: b"\x93NUMPY",
        what: "an array of NumPy (.npy)",
        hint: "load it with numpy.load and save it as safetensors",
    },
    Known { start: b"Rar!", what: "a RAR archive", hint: "unpack it with `unrar x` first" },
    Known { start: b"\x04\x22\x4d\x18", what: "an LZ4 file", hint: "unpack it with `unlz4` first" },
    Known { start: b"PYTORCH1", what: "a preview of PyTorch's archive format", hint: RESAVE },
    Known {
        start: b"PK\x05\x06",
        what: "an empty zip archive",
        hint: "the file was not written to the end; save it again",
    },
];

/// The first bytes of a file, or all.
pub(super) fn head(source: &dyn ReadAt) -> Result<Vec<u8>, Error> {
    source.read_range(0..source.len_bytes().min(HEAD_BYTES))
}

/// The container that a file is, which starts with `head`.
///
/// Fails with `Unsupported` for what is known and not read, with `Corrupt` for what is no checkpoint at all.
pub(super) fn sniff(source: &dyn ReadAt, head: &[u8], limits: &Limits) -> Result<Container, Error> {
    match told(head, limits.header_bytes)? {
        Some(container) => Ok(container),
        // Protocols 0 and 1 have no mark, and their first opcode may be any letter.
        None if plain::is_unmarked(source, head, limits)? => Ok(Container::Pickled(Pickled::Plain)),
        None => Err(stranger(head)),
    }
}

/// The container that starts with `head`; `None` for strangers.
///
/// Fails with `Unsupported` for what is known and not read, with `Corrupt` for what is no checkpoint at all.
fn told(head: &[u8], max_safetensors_header_bytes: u64) -> Result<Option<Container>, Error> {
    let unsupported = |what: &str, hint: &str| Err(Fault::new(EXPECTED, what).hint(hint).unsupported());
    if head.is_empty() {
        return Err(Fault::new(EXPECTED, "an empty file").hint("download or save it again").corrupt());
    }
    if head.starts_with(b"PK\x03\x04") {
        return Ok(Some(Container::Pickled(Pickled::Zip)));
    }
    let header_fits =
        head.first_chunk::<8>().is_some_and(|it| u64::from_le_bytes(*it) <= max_safetensors_header_bytes);
    let is_json = |at: usize| head.get(at) == Some(&b'{');
    // First of all: the header's length may look like the start of anything (35,615 is that of a gzip file).
    if header_fits && is_json(8) {
        return Ok(Some(Container::Safetensors));
    }
    if is_json(0) && head.iter().all(|it| *it != 0) {
        let hint = "name the checkpoint beside it, or the folder that holds both";
        return unsupported("a text in JSON (a weight map or a configuration?)", hint);
    }
    if let Some(known) = KNOWN.iter().find(|it| head.starts_with(it.start)) {
        return unsupported(known.what, known.hint);
    }
    let trimmed = head.trim_ascii_start();
    let starts =
        |text: &str| trimmed.get(..text.len()).is_some_and(|it| it.eq_ignore_ascii_case(text.as_bytes()));
    if starts("<!doctype") || starts("<html") || starts("<?xml") {
        return unsupported(
            "a web page, not the file it was meant to be",
            "the download went wrong (a login page, an error page); download it again",
        );
    }
    if head.get(257..262) == Some(b"ustar") {
        return Ok(Some(Container::Pickled(Pickled::Tar)));
    }
    if is_legacy(head) {
        return Ok(Some(Container::Pickled(Pickled::Legacy)));
    }
    if header_fits && head.get(8).is_some_and(u8::is_ascii_whitespace) {
        return Ok(Some(Container::Safetensors));
    }
    let is_pickle = head[0] == 0x80 && head.get(1).is_some_and(|&protocol| (1..=5).contains(&protocol));
    if is_pickle || TEXT_PICKLES.iter().any(|it| head.starts_with(it)) {
        return Ok(Some(Container::Pickled(Pickled::Plain)));
    }
    // A header that is too long is still told as safetensors when the JSON shows.
    Ok(is_json(8).then_some(Container::Safetensors))
}

/// What is said of a file that is nothing known.
fn stranger(head: &[u8]) -> Error {
    let first: Vec<String> = head.iter().take(8).map(|it| format!("{it:02x}")).collect();
    Fault::new(EXPECTED, format!("a file that starts with {}", first.join(" ")))
        .hint("name a checkpoint file; if this is one, it is damaged or has bytes in front")
        .corrupt()
}

/// True for a pickle of PyTorch's magic number, of any protocol. The number is compared, never computed.
fn is_legacy(head: &[u8]) -> bool {
    if head.starts_with(LEGACY_MAGIC_TEXT) {
        return true;
    }
    let pickle = match head {
        [0x80, _, rest @ ..] => rest,
        _ => head,
    };
    // The frame of protocols 4 and 5.
    let pickle = match pickle {
        [0x95, rest @ ..] => rest.get(8..).unwrap_or_default(),
        _ => pickle,
    };
    pickle.starts_with(LEGACY_MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::MemorySource;

    fn container(file: &[u8], header_bytes: u64) -> Result<Container, Error> {
        let limits = Limits { header_bytes, ..Limits::default() };
        sniff(&MemorySource::new("x", file.to_vec()), file, &limits)
    }

    fn found(file: &[u8]) -> String {
        container(file, 100).unwrap_err().to_string()
    }

    #[test]
    fn what_is_read_is_told_by_content() {
        assert_eq!(container(b"PK\x03\x04rest", 100).unwrap(), Container::Pickled(Pickled::Zip));
        assert_eq!(container(b"\x02\0\0\0\0\0\0\0{}", 100).unwrap(), Container::Safetensors);
        assert_eq!(container(b"\x04\0\0\0\0\0\0\0  {}", 100).unwrap(), Container::Safetensors);
        assert_eq!(container(b"\x1f\x8b\0\0\0\0\0\0{}", 100_000).unwrap(), Container::Safetensors);
        let legacy: [&[u8]; 3] = [
            b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.",
            b"\x80\x04\x95\x0d\0\0\0\0\0\0\0\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.",
            b"L119547037146038801333356L\n.",
        ];
        legacy
            .iter()
            .for_each(|it| assert_eq!(container(it, 100).unwrap(), Container::Pickled(Pickled::Legacy)));
        let pickles: [&[u8]; 4] = [
            b"\x80\x04}.",
            b"(dp0\n.",
            b"ccollections\nOrderedDict\n)R.",
            // The magic number of a file inside the pickle is not the file's own.
            b"\x80\x03C\x0f\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19..",
        ];
        pickles
            .iter()
            .for_each(|it| assert_eq!(container(it, 100).unwrap(), Container::Pickled(Pickled::Plain)));
        let mut tar = [0; 512];
        tar[257..262].copy_from_slice(b"ustar");
        assert_eq!(container(&tar, 100).unwrap(), Container::Pickled(Pickled::Tar));
    }

    #[test]
    fn what_is_not_read_is_named() {
        assert!(found(b"").contains("empty"));
        assert!(found(b"version https://git-lfs.github.com/spec/v1\n").contains("Git LFS"));
        assert!(found(b"\n<!DOCTYPE HTML><p>").contains("web page"));
        assert!(found(b"\x1f\x8b\x08").contains("gzip"));
        assert!(found(b"\xff\xd8\xff\xe0").contains("JPEG"));
        assert!(found(b"{\"a\": [{\"b\": 1}]}").contains("JSON"));
        assert!(found(b"\xfe\xd8\xff\xe0").contains("fe d8 ff e0"));
    }

    #[test]
    fn pickles_without_a_mark_are_told_by_all_their_bytes() {
        let plain: [&[u8]; 6] = [
            b"(S'a'\nI1\ntp0\n.",
            b"(cmodule\nClass\np0\nS'x'\no.",
            b"cmy.module\nClass\n(tR.",
            b"]K\x01a.",
            b"(imodule\nClass\n(dp0\nb.",
            b"}U\x01aK\x01s.",
        ];
        for pickle in plain {
            assert_eq!(container(pickle, 100).unwrap(), Container::Pickled(Pickled::Plain), "{pickle:?}");
            let longer = [pickle, b"\n"].concat();
            assert!(found(&longer).contains("a file that starts with"), "{pickle:?}");
            let cut = &pickle[..pickle.len() - 2];
            assert!(found(&[cut, b"."].concat()).contains("a file that starts with"), "{pickle:?}");
        }
        let strangers: [&[u8]; 9] = [
            b".",
            b"].",
            b"}.",
            b"(.",
            b"I1\n.",
            b"(a note)\nin two lines.",
            b"checkpoint of\nour best run\n.",
            b"copyright (c) us.\nAll rights\nreserved.",
            b"(P1\nt.",
        ];
        for text in strangers {
            assert!(found(text).contains("a file that starts with"), "{}", text.escape_ascii());
        }
    }
}
