//! The ways by which bytes come from a file, by name. Choosing one and reading by it is `source`'s.

use crate::error::{Error, Fault};
use std::{fmt, str::FromStr};

/// How bytes come from a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum IoPath {
    /// Through the page cache, which keeps them: right for a file that is there already.
    #[default]
    Buffered,
    /// Through the page cache, and dropped from it behind the reader: for file systems that have no direct reads.
    DropBehind,
    /// Past the page cache.
    Direct,
    /// Each range by what the page cache holds of it: buffered where it is there, past it where not.
    Mixed,
}

const NAMES: &[(IoPath, &str)] = &[
    (IoPath::Buffered, "buffered"),
    (IoPath::DropBehind, "drop-behind"),
    (IoPath::Direct, "direct"),
    (IoPath::Mixed, "mixed"),
];

impl IoPath {
    /// True if it is for files of which the page cache holds most: they come at the speed of memory.
    pub fn is_mostly_cached(self) -> bool {
        matches!(self, IoPath::Buffered | IoPath::Mixed)
    }

    /// Every way there is.
    pub fn all() -> impl Iterator<Item = IoPath> {
        NAMES.iter().map(|(path, _)| *path)
    }

    /// True if bytes may come past the page cache: in whole pages, to whole pages.
    pub fn is_past_cache(self) -> bool {
        matches!(self, IoPath::Direct | IoPath::Mixed)
    }

    /// How a record that is packed in such a file comes: in no pages of the file, so past no cache. What is read of the
    /// file for it stays in the page cache, or does not, as the rest of the file.
    pub fn of_packed(self) -> IoPath {
        match self {
            IoPath::Buffered => IoPath::Buffered,
            IoPath::DropBehind | IoPath::Direct | IoPath::Mixed => IoPath::DropBehind,
        }
    }

    /// The name, as the user spells it.
    pub fn name(self) -> &'static str {
        NAMES.iter().find(|(path, _)| *path == self).map_or("", |(_, name)| name)
    }
}

impl fmt::Display for IoPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for IoPath {
    type Err = Error;

    fn from_str(text: &str) -> Result<IoPath, Error> {
        NAMES.iter().find(|(_, name)| *name == text).map(|(path, _)| *path).ok_or_else(|| {
            let known: Vec<_> = NAMES.iter().map(|(_, name)| *name).collect();
            Fault::new(format!("a way to read ({})", known.join(", ")), format!("`{text}`"))
                .hint("`mixed` suits files of which the system holds a part, or none knows which")
                .mismatch()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_is_found_by_its_name_and_no_other_is() {
        assert_eq!(IoPath::all().count(), 4);
        for path in IoPath::all() {
            assert!(!path.name().is_empty());
            assert_eq!(path.to_string().parse::<IoPath>().unwrap(), path);
        }
        let error = "mapped".parse::<IoPath>().unwrap_err();
        assert!(error.to_string().contains("drop-behind"), "{error}");
        assert!(error.hint().contains("mixed"));
    }
}
