//! Putting whole pages where nobody has touched memory yet: the system then neither zeroes them nor takes a fault for
//! each. By userfaultfd, which many containers forbid.
#![allow(unsafe_code)]

use super::{HostBuffer, PAGE_BYTES, Reservation};
use rustix::{
    io::Errno,
    ioctl::{Opcode, Updater, ioctl, opcode},
};
use std::{
    fs::OpenOptions,
    io,
    ops::Range,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
    sync::{Arc, OnceLock, PoisonError, RwLock},
    time::{Duration, Instant},
};

/// Puts whole pages into memory that nobody has touched yet.
///
/// As long as it lives, touching a page of the range that was not placed kills the process (SIGBUS), and a system call that
/// touches one fails (EFAULT); afterwards they are ordinary zero pages. If the buffer goes first, placing ends with it.
#[derive(Debug)]
pub struct Placing {
    ending: Ending,
}

impl Placing {
    /// Takes the whole pages among the first `len_bytes` of a buffer; those behind stay ordinary memory. Pages that were
    /// touched before stay as they are until they are placed.
    ///
    /// `None` where the system does not allow it, for memory that is placed into already, and if there is no whole page.
    pub fn over(buffer: &mut HostBuffer, len_bytes: u64) -> Option<Placing> {
        // The kernel places its own pages, which are larger on some machines.
        if rustix::param::page_size() as u64 != PAGE_BYTES {
            return None;
        }
        let slice = buffer.as_mut_slice();
        let len_bytes = usize::try_from(len_bytes).ok()?;
        let pages =
            slice.get_mut(..len_bytes - len_bytes % PAGE_BYTES as usize).filter(|it| !it.is_empty())?;
        let start = pages.as_mut_ptr().expose_provenance();
        let range = start..start + pages.len();
        let faults = open()?;
        let mut register = Register { range: range_of(&range), mode: MODE_MISSING, ioctls: 0 };
        // SAFETY: `Register` has the layout that the operation reads and writes. The range is memory of `buffer`, borrowed
        // exclusively here; registering changes none of its bytes. What it does change is that touching a missing page
        // becomes SIGBUS, which ends the process and lets nobody see a wrong byte, until `Registration::end`.
        unsafe { ioctl(&faults, Updater::<REGISTER, Register>::new(&mut register)) }.ok()?;
        let registration = Arc::new(Registration { faults: RwLock::new(Some(faults)), range });
        if register.ioctls & CAN_COPY == 0 {
            registration.end();
            return None;
        }
        buffer.placing = Some(Ending(Arc::clone(&registration)));
        Some(Placing { ending: Ending(registration) })
    }

    /// Copies `source` to `target`, which are equally long and whole pages; `target` lies in the range and starts a page.
    /// Pages that are there already are overwritten. Several threads may place into targets of their own at once.
    ///
    /// Fails with [`io::ErrorKind::InvalidInput`] if that is not so, and with what the system says if it has no memory;
    /// some pages may be in place then.
    pub fn place(&self, target: &mut [u8], source: &[u8]) -> io::Result<()> {
        let page = PAGE_BYTES as usize;
        let registration = &*self.ending.0;
        let invalid = |what| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        if target.len() != source.len() {
            return invalid("source and target differ in length");
        }
        if target.is_empty() {
            return Ok(());
        }
        let start = target.as_mut_ptr().expose_provenance();
        if !start.is_multiple_of(page) || !target.len().is_multiple_of(page) {
            return invalid("the target is not whole pages");
        }
        if start < registration.range.start || start + target.len() > registration.range.end {
            return invalid("the target lies outside the memory that is placed into");
        }
        // Held until the last page is in place, so that the registration does not end meanwhile.
        let faults = registration.faults.read().unwrap_or_else(PoisonError::into_inner);
        let Some(faults) = &*faults else { return invalid("the memory is no longer placed into") };
        let mut done = 0;
        while done < target.len() {
            let source = &source[done..];
            let mut copy = Copy {
                target: (start + done) as u64,
                source: source.as_ptr().expose_provenance() as u64,
                len_bytes: source.len() as u64,
                mode: 0,
                copied_bytes: 0,
            };
            // SAFETY: `Copy` has the layout that the operation reads and writes. The kernel reads `source`, borrowed for as
            // long, and writes nothing but the rest of `target`, which is borrowed exclusively and as long as `source`: it
            // holds whatever the addresses are registered for, and if they are for nothing, the kernel refuses.
            let result = unsafe { ioctl(faults, Updater::<COPY, Copy>::new(&mut copy)) };
            match result {
                Ok(()) => return Ok(()),
                // In part, or not at all because something else changes mappings.
                Err(Errno::AGAIN) => done += usize::try_from(copy.copied_bytes).unwrap_or(0),
                Err(Errno::INTR) => {}
                // The page is there, as a part of a huge one perhaps, so writing to it does not fault.
                Err(Errno::EXIST) => {
                    target[done..done + page].copy_from_slice(&source[..page]);
                    done += page;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl Placing {
    /// Makes ordinary memory of some pages that were not placed: they may be touched from here on.
    ///
    /// Fails with [`io::ErrorKind::InvalidInput`] if `target` is not whole pages of the range.
    pub fn leave(&self, target: &mut [u8]) -> io::Result<()> {
        let registration = &*self.ending.0;
        let start = target.as_mut_ptr().expose_provenance();
        let range = start..start + target.len();
        let is_paged = [range.start, range.end].iter().all(|it| it.is_multiple_of(PAGE_BYTES as usize));
        let is_inside = registration.range.start <= range.start && range.end <= registration.range.end;
        let faults = registration.faults.read().unwrap_or_else(PoisonError::into_inner);
        let (Some(faults), true) = (&*faults, is_paged && is_inside) else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the target is no memory that is placed into",
            ));
        };
        let mut pages = range_of(&range);
        // SAFETY: `UffdRange` has the layout that the operation reads. The pages are borrowed exclusively; none of their
        // bytes changes.
        unsafe { ioctl(faults, Updater::<UNREGISTER, UffdRange>::new(&mut pages)) }?;
        Ok(())
    }
}

/// Asks for huge pages where `target`, whole pages that nobody has touched, has room for them. A system without them gives
/// small ones.
pub fn advise_huge(target: &mut [u8]) {
    // SAFETY: the advice concerns pages that are borrowed exclusively, and changes none of their bytes; what is not whole
    // pages is refused.
    let _ = unsafe { libc::madvise(target.as_mut_ptr().cast(), target.len(), libc::MADV_HUGEPAGE) };
}

/// Ends a registration when dropped. `Placing` and its buffer have one each: whichever goes first ends it, so that no
/// registration outlives the memory that it is for.
#[derive(Debug)]
pub(super) struct Ending(Arc<Registration>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.end();
    }
}

#[derive(Debug)]
struct Registration {
    /// `None` once it ended.
    faults: RwLock<Option<OwnedFd>>,
    range: Range<usize>,
}

impl Registration {
    /// Makes ordinary memory of the pages that were not placed. Waits for those who place.
    fn end(&self) {
        let mut faults = self.faults.write().unwrap_or_else(PoisonError::into_inner);
        let Some(faults) = faults.take() else { return };
        let mut range = range_of(&self.range);
        // Closing alone would do, if no forked process held a copy of the descriptor.
        //
        // SAFETY: `UffdRange` has the layout that the operation reads. The memory is still mapped and still `buffer`'s,
        // whose own `Ending` comes here before it unmaps it and finds `faults` gone if this was first; so the range holds
        // no registration but this one. No byte of it changes. Should the kernel refuse, closing follows.
        let _ = unsafe { ioctl(&faults, Updater::<UNREGISTER, UffdRange>::new(&mut range)) };
    }
}

/// Whether placing is allowed here and clearly faster than touching. Measured at the first call, on 1 MiB, for some
/// milliseconds; the answer stays the same as long as the process lives.
pub fn placing_wins() -> bool {
    static WINS: OnceLock<bool> = OnceLock::new();
    *WINS.get_or_init(|| {
        measured().is_some_and(|it| it.placing.as_secs_f64() < 0.9 * it.touching.as_secs_f64())
    })
}

/// The shortest of some fills: what disturbs them only makes them longer.
struct Fills {
    touching: Duration,
    placing: Duration,
}

/// `None` where placing is not allowed.
fn measured() -> Option<Fills> {
    // Enough to see hundreds of faults, too little to count beside any load.
    const PROBE_BYTES: u64 = 1 << 20;
    const PIECE_BYTES: usize = 128 << 10;
    const N_FILLS: usize = 5;
    let source = vec![1u8; PIECE_BYTES];
    let fresh = || HostBuffer::new(Reservation::uncounted(PROBE_BYTES), Path::new("a probe of memory")).ok();
    let mut shortest = Fills { touching: Duration::MAX, placing: Duration::MAX };
    for _ in 0..N_FILLS {
        let mut buffer = fresh()?;
        let began = Instant::now();
        buffer.as_mut_slice().chunks_mut(PIECE_BYTES).for_each(|target| target.copy_from_slice(&source));
        shortest.touching = shortest.touching.min(began.elapsed());
        drop(buffer);

        let mut buffer = fresh()?;
        let pages = Placing::over(&mut buffer, PROBE_BYTES)?;
        let began = Instant::now();
        let mut targets = buffer.as_mut_slice().chunks_mut(PIECE_BYTES);
        targets.try_for_each(|target| pages.place(target, &source)).ok()?;
        shortest.placing = shortest.placing.min(began.elapsed());
    }
    Some(shortest)
}

/// A descriptor for faults of this process alone, with stray touches as errors: nobody waits for them.
fn open() -> Option<OwnedFd> {
    let faults = open_by_call().or_else(open_by_device)?;
    let mut api = Api { version: 0xAA, features: FEATURE_SIGBUS, ioctls: 0 };
    // SAFETY: `Api` has the layout that the operation reads and writes.
    unsafe { ioctl(&faults, Updater::<API, Api>::new(&mut api)) }.ok()?;
    Some(faults)
}

/// Allowed to everybody for faults in user mode, unless a container's rules say otherwise.
fn open_by_call() -> Option<OwnedFd> {
    // SAFETY: the call takes flags and nothing else.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | USER_MODE_ONLY) };
    owned(fd.try_into().ok()?)
}

/// Allowed to whoever may open the device.
fn open_by_device() -> Option<OwnedFd> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd").ok()?;
    // SAFETY: the operation takes flags and nothing else.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), NEW as _, libc::O_CLOEXEC | USER_MODE_ONLY) };
    owned(fd)
}

fn owned(fd: libc::c_int) -> Option<OwnedFd> {
    // SAFETY: both callers just got the descriptor from the kernel, and nobody else knows of it.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}

fn range_of(range: &Range<usize>) -> UffdRange {
    UffdRange { start: range.start as u64, len_bytes: range.len() as u64 }
}

// The kernel's interface, as `userfaultfd(2)` and `ioctl_userfaultfd(2)` describe it.

const USER_MODE_ONLY: libc::c_int = 1;
const FEATURE_SIGBUS: u64 = 1 << 7;
const MODE_MISSING: u64 = 1;
/// Among the operations that a registered range allows.
const CAN_COPY: u64 = 1 << 3;

const NEW: Opcode = opcode::none(0xAA, 0);
const REGISTER: Opcode = opcode::read_write::<Register>(0xAA, 0);
const UNREGISTER: Opcode = opcode::read::<UffdRange>(0xAA, 1);
const COPY: Opcode = opcode::read_write::<Copy>(0xAA, 3);
const API: Opcode = opcode::read_write::<Api>(0xAA, 0x3F);

#[repr(C)]
struct Api {
    version: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdRange {
    start: u64,
    len_bytes: u64,
}

#[repr(C)]
struct Register {
    range: UffdRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    target: u64,
    source: u64,
    len_bytes: u64,
    mode: u64,
    /// Negative: an error.
    copied_bytes: i64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    const PAGE: usize = PAGE_BYTES as usize;

    fn buffer(n_pages: u64) -> HostBuffer {
        HostBuffer::new(Reservation::uncounted(n_pages * PAGE_BYTES), "test".as_ref()).unwrap()
    }

    /// `None`, said loudly, where there is nothing to test.
    #[allow(clippy::print_stderr)]
    fn placing(buffer: &mut HostBuffer, n_pages: u64) -> Option<Placing> {
        let placing = Placing::over(buffer, n_pages * PAGE_BYTES);
        if placing.is_none() {
            eprintln!("NOT TESTED: this system does not allow userfaultfd");
            assert!(!placing_wins());
        }
        placing
    }

    fn bytes(n_pages: usize, seed: usize) -> Vec<u8> {
        (0..n_pages * PAGE).map(|it| ((it * 7 + seed) % 251) as u8).collect()
    }

    #[test]
    fn placed_bytes_arrive_and_the_other_pages_are_zero_afterwards() {
        let mut buffer = buffer(64);
        let Some(placing) = placing(&mut buffer, 64) else { return };
        let source = bytes(10, 1);
        placing.place(&mut buffer.as_mut_slice()[20 * PAGE..30 * PAGE], &source).unwrap();
        assert!(buffer.as_slice()[20 * PAGE..30 * PAGE] == source);
        drop(placing);
        assert!(buffer.as_slice()[..20 * PAGE].iter().all(|byte| *byte == 0));
        assert!(buffer.as_slice()[20 * PAGE..30 * PAGE] == source);
        assert!(buffer.as_slice()[30 * PAGE..].iter().all(|byte| *byte == 0));
        buffer.as_mut_slice().fill(3);
    }

    #[test]
    fn pages_that_are_there_are_overwritten_huge_ones_too() {
        for n_touched in [0, 1, 2] {
            let mut buffer = buffer(1024);
            let slice = buffer.as_mut_slice();
            // SAFETY: the advice concerns the buffer's own pages, and changes none of their bytes.
            unsafe { libc::madvise(slice.as_mut_ptr().cast(), slice.len(), libc::MADV_HUGEPAGE) };
            // Where the system has huge pages, each touch brings 512 pages.
            slice.iter_mut().step_by(400 * PAGE).take(n_touched).for_each(|byte| *byte = 9);
            let Some(placing) = placing(&mut buffer, 1024) else { return };
            for seed in [1, 2] {
                let source = bytes(1024, seed);
                placing.place(buffer.as_mut_slice(), &source).unwrap();
                assert!(buffer.as_slice() == source);
            }
        }
    }

    #[test]
    fn pages_that_are_left_can_be_touched_while_others_are_placed() {
        let mut buffer = buffer(2048);
        let Some(placing) = placing(&mut buffer, 2048) else { return };
        let (left, placed) = buffer.as_mut_slice().split_at_mut(1024 * PAGE);
        placing.leave(left).unwrap();
        left.fill(7);
        let source = bytes(1024, 3);
        placing.place(placed, &source).unwrap();
        assert!(left.iter().all(|byte| *byte == 7) && placed == source);
        assert!(placing.leave(&mut placed[1..]).is_err());
        drop(placing);
        assert!(buffer.as_slice()[1024 * PAGE..] == source);
    }

    #[test]
    fn threads_place_their_own_parts_at_once() {
        let mut buffer = buffer(512);
        let Some(placing) = placing(&mut buffer, 512) else { return };
        let source = bytes(512, 5);
        thread::scope(|scope| {
            let parts = buffer.as_mut_slice().chunks_mut(128 * PAGE).zip(source.chunks(128 * PAGE));
            for (target, source) in parts {
                let placing = &placing;
                scope.spawn(move || {
                    let pieces = target.chunks_mut(3 * PAGE).zip(source.chunks(3 * PAGE));
                    for (target, source) in pieces {
                        placing.place(target, source).unwrap();
                    }
                });
            }
        });
        assert!(buffer.as_slice() == source);
    }

    #[test]
    fn what_lies_outside_or_is_no_whole_page_is_refused() {
        let mut buffer = buffer(8);
        // Half a page more than four: the fifth stays ordinary memory.
        let Some(placing) = Placing::over(&mut buffer, 4 * PAGE_BYTES + 2048) else {
            assert!(placing(&mut buffer, 8).is_none());
            return;
        };
        let source = bytes(8, 3);
        let target = buffer.as_mut_slice();
        for range in [3 * PAGE..5 * PAGE, 4 * PAGE..5 * PAGE, 0..100, 100..PAGE + 100] {
            let error = placing.place(&mut target[range.clone()], &source[..range.len()]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{range:?}");
        }
        assert!(placing.place(&mut target[..PAGE], &source[..2 * PAGE]).is_err());
        placing.place(&mut target[..0], &[]).unwrap();
        target[4 * PAGE..].fill(1);
        placing.place(&mut target[..4 * PAGE], &source[..4 * PAGE]).unwrap();
        assert!(target[..4 * PAGE] == source[..4 * PAGE]);
    }

    #[test]
    fn memory_is_placed_into_by_one_at_a_time() {
        let mut buffer = buffer(8);
        let Some(first) = placing(&mut buffer, 8) else { return };
        assert!(Placing::over(&mut buffer, 8 * PAGE_BYTES).is_none());
        drop(first);
        let second = Placing::over(&mut buffer, 8 * PAGE_BYTES).unwrap();
        second.place(buffer.as_mut_slice(), &bytes(8, 4)).unwrap();
        assert!(buffer.as_slice() == bytes(8, 4));
        assert!(
            Placing::over(&mut HostBuffer::new(Reservation::uncounted(0), "".as_ref()).unwrap(), 0).is_none()
        );
        assert!(Placing::over(&mut buffer, 9 * PAGE_BYTES).is_none());
    }

    #[test]
    fn a_buffer_that_goes_first_ends_the_placing() {
        let mut first = buffer(8);
        let Some(ended) = placing(&mut first, 8) else { return };
        drop(first);
        // Probably at the same address; the ended one must neither place there nor disturb who does.
        let mut second = buffer(8);
        let living = placing(&mut second, 8).unwrap();
        let error = ended.place(second.as_mut_slice(), &bytes(8, 1)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        drop(ended);
        living.place(second.as_mut_slice(), &bytes(8, 2)).unwrap();
        assert!(second.as_slice() == bytes(8, 2));
    }

    #[test]
    fn the_probe_gives_one_answer() {
        assert_eq!(placing_wins(), placing_wins());
    }
}
