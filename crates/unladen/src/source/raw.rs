//! The system calls that read a file. What they gave, and what to do when they gave less, is `read`'s.

use crate::memory::PAGE_BYTES;
use rustix::fs::{AtFlags, StatxFlags};
use std::{
    fmt,
    fs::{File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    },
    sync::{Arc, OnceLock},
};

/// One system call that reads; tests put faults in between.
pub trait RawRead: Send + Sync + fmt::Debug {
    /// Reads into `target` from `start_byte` on and says how much it was: less than asked for is no error, nothing is the
    /// end of the file. `is_direct`: past the page cache, for which all three must be aligned.
    fn read_at(&self, is_direct: bool, start_byte: u64, target: &mut [u8]) -> io::Result<usize>;
}

/// An open file, opened once more for direct reads when the first of them comes.
#[derive(Debug)]
pub(super) struct Descriptors {
    buffered: Arc<File>,
    direct: OnceLock<Option<File>>,
}

impl Descriptors {
    pub(super) fn new(buffered: Arc<File>) -> Descriptors {
        Descriptors { buffered, direct: OnceLock::new() }
    }
}

impl RawRead for Descriptors {
    fn read_at(&self, is_direct: bool, start_byte: u64, target: &mut [u8]) -> io::Result<usize> {
        if !is_direct {
            return self.buffered.read_at(target, start_byte);
        }
        let direct = self.direct.get_or_init(|| reopen_direct(&self.buffered));
        let direct = direct.as_ref().ok_or(io::Error::from_raw_os_error(libc::EOPNOTSUPP))?;
        direct.read_at(target, start_byte)
    }
}

/// The same file, open for direct reads. The path may lead elsewhere by now, the descriptor's link cannot.
fn reopen_direct(file: &File) -> Option<File> {
    let opened = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = libc::O_DIRECT | libc::O_NONBLOCK;
    let direct = OpenOptions::new().read(true).custom_flags(flags).open(opened).ok()?;
    let (left, right) = (file.metadata().ok()?, direct.metadata().ok()?);
    ((left.dev(), left.ino()) == (right.dev(), right.ino())).then_some(direct)
}

/// What a direct read must be a multiple of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    /// The offset in the file, and the length.
    pub(super) file_bytes: usize,
    /// The address in memory.
    pub(super) memory_bytes: usize,
}

/// What the kernel says about direct reads of this file, or a page where it says nothing.
///
/// `None` if it says that there are none, or if they need more than a page.
pub(super) fn direct_alignment(file: &File) -> Option<Alignment> {
    let page = PAGE_BYTES as usize;
    let told = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
    let told = told.filter(|it| StatxFlags::from_bits_retain(it.stx_mask).contains(StatxFlags::DIOALIGN));
    let Some(told) = told else {
        return Some(Alignment { file_bytes: page, memory_bytes: page });
    };
    let usable =
        |bytes: u32| (bytes.is_power_of_two() && u64::from(bytes) <= PAGE_BYTES).then_some(bytes as usize);
    Some(Alignment {
        file_bytes: usable(told.stx_dio_offset_align)?,
        memory_bytes: usable(told.stx_dio_mem_align)?,
    })
}
