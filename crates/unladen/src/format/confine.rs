//! Opens the files that an index names: each by a plain name, in the index's own folder, a regular file, and behind no link
//! that leads elsewhere. An index comes from strangers, and so do the links beside it.

use super::OpenOptions;
use crate::{
    error::{Error, Fault, Result},
    source::{FileSource, ReadAt as _},
};
use std::{
    ffi::OsStr,
    fs::{self, Metadata},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// The longest name that file systems have.
const MAX_NAME_BYTES: usize = 255;
/// How deep below a snapshot the parts of a model lie: `snapshots/<revision>/unet/`.
const MAX_SNAPSHOT_DEPTH: usize = 4;
/// What Hugging Face's cache has where several repositories share their blobs.
const SHARED_BLOBS_MARKER: &str = ".huggingface-shared-blobs";
/// Characters of a name that a message shows.
const MAX_SHOWN_CHARS: usize = 120;

/// A folder whose files an index names.
pub(super) struct Folder<'a> {
    path: &'a Path,
    follow_links: bool,
}

impl<'a> Folder<'a> {
    pub(super) fn new(path: &'a Path, options: &OpenOptions) -> Folder<'a> {
        // The folder of a path without one is the one that the process is in.
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        Folder { path, follow_links: options.follow_links }
    }

    pub(super) fn path(&self) -> &'a Path {
        self.path
    }

    /// Opens a file of the folder.
    ///
    /// Fails with [`Error::Corrupt`] for names that are paths and for files that are not there, with
    /// [`Error::Unsupported`] for what is no regular file and for links that lead out of the folder.
    pub(super) fn open(&self, name: &str) -> Result<FileSource> {
        if matches!(name, "" | "." | "..") || name.contains(['/', '\0']) || name.len() > MAX_NAME_BYTES {
            return Err(Fault::new(
                "the name of a file in the index's own folder",
                format!("`{}`", shown(name)),
            )
            .hint("the index leads out of its folder; do not trust it")
            .corrupt());
        }
        let path = self.path.join(name);
        let missing = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => Fault::new("a file, because an index names it", "none of that name")
                .hint("the download or copy is incomplete: bring the missing file")
                .corrupt()
                .in_file(&path),
            _ => Error::io(&path, "look at the file", error),
        };
        let mut file = fs::symlink_metadata(&path).map_err(missing)?;
        if file.is_symlink() {
            let target = fs::canonicalize(&path).map_err(missing)?;
            self.check_link(&path, &target)?;
            file = fs::symlink_metadata(&target).map_err(missing)?;
        }
        if !file.is_file() {
            return Err(Fault::new("a regular file, because an index names it", kind_of(&file))
                .hint("do not trust this folder, unless you know why the file is none")
                .unsupported()
                .in_file(&path));
        }
        let source = FileSource::open(&path)?;
        let stamp = source.stamp();
        if (stamp.dev, stamp.ino) != (file.dev(), file.ino()) {
            return Err(Fault::new("the file that was looked at", "another of its name")
                .hint("something replaces files in the folder; wait until it is done")
                .mismatch()
                .in_file(source.path()));
        }
        Ok(source)
    }

    fn check_link(&self, link: &Path, target: &Path) -> Result<()> {
        if self.follow_links {
            return Ok(());
        }
        let folder =
            fs::canonicalize(self.path).map_err(|error| Error::io(self.path, "find the folder", error))?;
        let is_inside = target.parent() == Some(&*folder);
        if is_inside || stores(&folder).iter().any(|store| target.starts_with(store)) {
            return Ok(());
        }
        Err(Fault::new("a file in the folder", format!("a link to `{}`", shown(&target.to_string_lossy())))
            .hint("if you trust the link, allow it (--follow-links, `OpenOptions::follow_links`), or copy the file to its place")
            .unsupported()
            .in_file(link))
    }
}

/// Where links of a folder may lead that is a snapshot in Hugging Face's cache: to the repository's blobs, which may in
/// turn be links to blobs that repositories share. Real folders only, and the folder's path has no links any more.
fn stores(folder: &Path) -> Vec<PathBuf> {
    let above = folder.ancestors().skip(1).take(MAX_SNAPSHOT_DEPTH);
    let snapshots = above.filter(|it| it.file_name() == Some(OsStr::new("snapshots"))).last();
    let Some(repository) = snapshots.and_then(Path::parent) else { return Vec::new() };
    let shared = repository.parent().map(|cache| cache.join("blobs"));
    let shared =
        shared.filter(|it| fs::symlink_metadata(it.join(SHARED_BLOBS_MARKER)).is_ok_and(|it| it.is_file()));
    let stores = [Some(repository.join("blobs")), shared].into_iter().flatten();
    stores.filter(|it| fs::symlink_metadata(it).is_ok_and(|it| it.is_dir())).collect()
}

fn kind_of(file: &Metadata) -> &'static str {
    if file.is_dir() {
        "a folder"
    } else if file.is_symlink() {
        "a link"
    } else {
        "a pipe or a device"
    }
}

/// The start of a name: an index may hold one of many megabytes.
pub(super) fn shortened(name: &str) -> String {
    let mut start: String = name.chars().take(MAX_SHOWN_CHARS).collect();
    if start.len() < name.len() {
        start.push_str("..");
    }
    start
}

/// A name as messages show it.
pub(super) fn shown(name: &str) -> String {
    shortened(name).escape_debug().to_string()
}

/// Some names as a message lists them, which is still to be escaped: the first few, and how many more there are.
#[derive(Default)]
pub(super) struct ShownNames {
    text: String,
    n_names: usize,
}

/// Names that a message lists.
const MAX_LISTED: usize = 20;

impl ShownNames {
    pub(super) fn push(&mut self, name: &str) {
        if self.n_names < MAX_LISTED {
            let comma = if self.n_names == 0 { "" } else { ", " };
            self.text.push_str(&format!("{comma}`{}`", shortened(name)));
        }
        self.n_names += 1;
    }

    pub(super) fn len(&self) -> usize {
        self.n_names
    }
}

impl std::fmt::Display for ShownNames {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)?;
        match self.n_names.saturating_sub(MAX_LISTED) {
            0 => Ok(()),
            n_more => write!(f, " and {n_more} more"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn folder(options: &OpenOptions, path: &Path, name: &str) -> Result<u64> {
        Folder::new(path, options).open(name).map(|it| it.len_bytes())
    }

    fn strict(path: &Path, name: &str) -> Result<u64> {
        folder(&OpenOptions::default(), path, name)
    }

    #[test]
    fn names_that_are_paths_open_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("inner");
        fs::create_dir(&inner).unwrap();
        fs::write(dir.path().join("x"), "outside").unwrap();
        fs::write(inner.join("x"), "in").unwrap();
        assert_eq!(strict(&inner, "x").unwrap(), 2);
        let absolute = dir.path().join("x").display().to_string();
        let long = "x".repeat(1 << 20);
        for name in ["../x", "./x", "x/", "/x", "", ".", "..", "a/b", "x\0", &*absolute, &*long] {
            let error = strict(&inner, name).unwrap_err();
            assert!(
                matches!(error, Error::Corrupt(_)) && error.hint().contains("trust"),
                "{name:.20}: {error}"
            );
            assert!(error.to_string().len() < 1000);
        }
    }

    #[test]
    fn what_is_missing_or_no_file_is_named_and_waits_for_nobody() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("folder")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            dir.path().join("pipe"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RWXU,
            0,
        )
        .unwrap();
        symlink("/dev/zero", dir.path().join("device")).unwrap();
        symlink("nowhere", dir.path().join("dangling")).unwrap();
        let all = OpenOptions { follow_links: true, ..OpenOptions::default() };
        for (name, what) in [
            ("nothing", "none of that name"),
            ("dangling", "none of that name"),
            ("folder", "a folder"),
            ("pipe", "a pipe or a device"),
            ("device", "a pipe or a device"),
        ] {
            let error = folder(&all, dir.path(), name).unwrap_err().to_string();
            assert!(error.contains(what) && error.contains(name), "{error}");
        }
    }

    #[test]
    fn links_stay_in_the_folder_unless_the_caller_allows_more() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("inner");
        fs::create_dir(&inner).unwrap();
        fs::write(dir.path().join("secret"), "outside").unwrap();
        fs::write(inner.join("x"), "in").unwrap();
        symlink("x", inner.join("near")).unwrap();
        symlink("../secret", inner.join("far")).unwrap();
        symlink("far", inner.join("by_two_links")).unwrap();
        assert_eq!(strict(&inner, "near").unwrap(), 2);
        for name in ["far", "by_two_links"] {
            let error = strict(&inner, name).unwrap_err();
            assert!(
                matches!(error, Error::Unsupported(_)) && error.to_string().contains("secret"),
                "{error}"
            );
            let all = OpenOptions { follow_links: true, ..OpenOptions::default() };
            assert_eq!(folder(&all, &inner, name).unwrap(), 7);
        }
    }

    #[test]
    fn snapshots_of_a_cache_link_to_its_blobs_and_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let repository = dir.path().join("models--a--b");
        let snapshot = repository.join("snapshots/0123");
        fs::create_dir_all(snapshot.join("unet")).unwrap();
        fs::create_dir_all(repository.join("blobs")).unwrap();
        fs::create_dir_all(dir.path().join("blobs/ab")).unwrap();
        fs::write(repository.join("blobs/f00"), "blob").unwrap();
        fs::write(repository.join("refs"), "other").unwrap();
        fs::write(dir.path().join("blobs/ab/abc"), "shared").unwrap();
        symlink("../../blobs/f00", snapshot.join("shard")).unwrap();
        symlink("../../../blobs/f00", snapshot.join("unet/shard")).unwrap();
        symlink("../../refs", snapshot.join("stray")).unwrap();
        symlink("../../blobs/ab/abc", repository.join("blobs/f01")).unwrap();
        symlink("../../blobs/f01", snapshot.join("shared")).unwrap();
        assert_eq!(strict(&snapshot, "shard").unwrap(), 4);
        assert_eq!(strict(&snapshot.join("unet"), "shard").unwrap(), 4);
        assert!(strict(&snapshot, "stray").is_err());
        let error = strict(&snapshot, "shared").unwrap_err().to_string();
        assert!(error.contains("a link to"), "a folder of that name is no store of the cache: {error}");
        fs::write(dir.path().join("blobs").join(SHARED_BLOBS_MARKER), "1").unwrap();
        assert_eq!(strict(&snapshot, "shared").unwrap(), 6);
    }

    #[test]
    fn long_lists_of_names_are_cut_short() {
        let mut names = ShownNames::default();
        (0..25).for_each(|it| names.push(&it.to_string()));
        assert!(
            names.to_string().starts_with("`0`, `1`, ") && names.to_string().ends_with("`19` and 5 more")
        );
    }
}
