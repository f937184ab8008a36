//! What the kernel says a piece of work took in host memory, over what the process held before.
//! Watches the whole process: work on other threads counts too.
#![allow(unsafe_code)]

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    sync::{
        Arc, Barrier,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// How the peaks of anonymous and file memory are told apart. The kernel keeps a high-water mark of their sum alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Method {
    /// Exact, for work that maps no file: the mark is the anonymous peak, but for the program's own code that was
    /// touched first meanwhile, which stays and is taken off.
    #[default]
    HighWater,
    /// For work that maps files: both are looked at every millisecond. Peaks in between are missed.
    Sampled,
}

impl Method {
    /// The name that reports print.
    pub fn name(self) -> &'static str {
        match self {
            Method::HighWater => "high-water",
            Method::Sampled => "sampled",
        }
    }
}

/// Peaks over the state before. The kernel counts pages per processor first, so each may be off by some
/// 256 KiB for each processor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Measured {
    /// How the anonymous and the file peak were found.
    pub method: Method,
    /// Highest resident set, by the kernel's mark (VmHWM).
    pub peak_rss_bytes: u64,
    /// Highest anonymous memory: heap, stacks, private copies.
    pub peak_anon_bytes: u64,
    /// Most pages of files mapped and resident, which the system can take back.
    pub peak_file_bytes: u64,
    /// Growth of the resident set as seen by looking every 0.1 s: what monitoring scripts report, and less than the
    /// truth where a peak is short.
    pub polled_rss_bytes: u64,
}

const SAMPLE_EVERY: Duration = Duration::from_millis(1);
const POLL_EVERY: Duration = Duration::from_millis(100);

/// Runs `work` and reports what it took. One at a time: the high-water mark is the process's, and there is only one.
///
/// Where the mark cannot be reset, the report says [`Method::Sampled`], and every figure is. On a system without
/// `/proc` all figures are zero.
pub fn measure<T>(method: Method, work: impl FnOnce() -> T) -> (T, Measured) {
    give_back_free_memory();
    let method = if reset_high_water() { method } else { Method::Sampled };
    let watcher = Watcher::start(method);
    let is_reset = reset_high_water();
    let before = Resident::now();
    let result = work();
    let after = Resident::now();
    let high_water_bytes = if is_reset { status_bytes("VmHWM:") } else { None };
    let seen = watcher.map(Watcher::stop).unwrap_or_default();

    let over = |peak: u64, base: u64| peak.saturating_sub(base);
    let highest = high_water_bytes.unwrap_or(0).max(after.total()).max(seen.total_bytes);
    let peak_rss_bytes = over(highest, before.total());
    let (peak_anon_bytes, peak_file_bytes) = match method {
        Method::HighWater => {
            let code_bytes = over(after.file_bytes, before.file_bytes).min(peak_rss_bytes);
            (peak_rss_bytes - code_bytes, code_bytes)
        }
        Method::Sampled => (
            over(seen.anon_bytes.max(after.anon_bytes), before.anon_bytes),
            over(seen.file_bytes.max(after.file_bytes), before.file_bytes),
        ),
    };
    let polled_rss_bytes = over(seen.polled_bytes, before.total());
    (result, Measured { method, peak_rss_bytes, peak_anon_bytes, peak_file_bytes, polled_rss_bytes })
}

/// Sets the high-water mark back to what is resident now.
fn reset_high_water() -> bool {
    fs::write("/proc/self/clear_refs", "5").is_ok()
}

/// Freed memory that the allocator kept would be used again without showing. What it keeps at the end of other
/// threads' heaps stays: measure before there are many.
fn give_back_free_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: no condition; the allocator locks itself.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// What is resident at a moment.
#[derive(Clone, Copy, Debug, Default)]
struct Resident {
    anon_bytes: u64,
    /// Shared memory too.
    file_bytes: u64,
}

impl Resident {
    fn now() -> Resident {
        File::open(STATM).ok().and_then(|it| Resident::read(&it)).unwrap_or_default()
    }

    fn total(self) -> u64 {
        self.anon_bytes + self.file_bytes
    }

    /// Reads without allocating, which would be measured too.
    fn read(statm: &File) -> Option<Resident> {
        let mut text = [0; 128];
        let len = statm.read_at(&mut text, 0).ok()?;
        let mut numbers = text[..len].split(|&byte| byte == b' ').skip(1).map(|digits| {
            digits.iter().try_fold(0u64, |sum, digit| {
                digit.is_ascii_digit().then(|| sum * 10 + u64::from(digit - b'0'))
            })
        });
        let (resident, shared) = (numbers.next()??, numbers.next()??);
        let page_bytes = rustix::param::page_size() as u64;
        Some(Resident {
            anon_bytes: resident.saturating_sub(shared) * page_bytes,
            file_bytes: shared * page_bytes,
        })
    }
}

/// Size, resident and shared pages, and more.
const STATM: &str = "/proc/self/statm";

/// A line of the process's status, given in kB.
fn status_bytes(name: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// The highest that a watcher saw.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    anon_bytes: u64,
    file_bytes: u64,
    total_bytes: u64,
    polled_bytes: u64,
}

/// A thread that looks at the process from time to time.
struct Watcher {
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<Seen>>,
}

impl Watcher {
    /// Returns once the thread runs, so that its stack is part of the state before. `None` if there is no thread to
    /// be had; the high-water mark serves without.
    fn start(method: Method) -> Option<Watcher> {
        let statm = File::open(STATM).ok()?;
        let is_over = Arc::new(AtomicBool::new(false));
        let is_running = Arc::new(Barrier::new(2));
        let (over, running) = (Arc::clone(&is_over), Arc::clone(&is_running));
        let every = if method == Method::Sampled { SAMPLE_EVERY } else { POLL_EVERY };
        let watch = move || {
            Resident::read(&statm);
            running.wait();
            watch(&statm, every, &over)
        };
        let thread = thread::Builder::new().name("meter".into()).stack_size(64 << 10).spawn(watch).ok()?;
        is_running.wait();
        Some(Watcher { is_over, thread: Some(thread) })
    }

    fn stop(mut self) -> Seen {
        self.join()
    }

    fn join(&mut self) -> Seen {
        let Some(thread) = self.thread.take() else { return Seen::default() };
        self.is_over.store(true, Ordering::Release);
        thread.thread().unpark();
        thread.join().unwrap_or_default()
    }
}

impl Drop for Watcher {
    /// Ends the thread when the work panics, too.
    fn drop(&mut self) {
        self.join();
    }
}

fn watch(statm: &File, every: Duration, is_over: &AtomicBool) -> Seen {
    let mut seen = Seen::default();
    let mut next_poll = Instant::now();
    while !is_over.load(Ordering::Acquire) {
        if let Some(now) = Resident::read(statm) {
            seen.anon_bytes = seen.anon_bytes.max(now.anon_bytes);
            seen.file_bytes = seen.file_bytes.max(now.file_bytes);
            seen.total_bytes = seen.total_bytes.max(now.total());
            if Instant::now() >= next_poll {
                seen.polled_bytes = seen.polled_bytes.max(now.total());
                next_poll = Instant::now() + POLL_EVERY;
            }
        }
        thread::park_timeout(every);
    }
    seen
}
