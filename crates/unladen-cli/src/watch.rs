//! Watches work: a progress bar on a terminal for whatever takes over a second, and a clean stop on Ctrl-C.

use indicatif::{ProgressBar, ProgressStyle};
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    iterator::Signals,
};
use std::{
    io::IsTerminal,
    sync::{
        LazyLock, Once,
        mpsc::{self, RecvTimeoutError},
    },
    time::{Duration, Instant},
};
use unladen::Progress;

/// The work of this process. One at a time, and whatever runs when Ctrl-C comes is cancelled.
static PROGRESS: LazyLock<Progress> = LazyLock::new(Progress::default);

/// The progress to hand to whatever works. From the first call on, Ctrl-C asks the work to stop; before it, while headers are
/// read, there is nothing to take along, and Ctrl-C ends the program.
pub(crate) fn progress() -> &'static Progress {
    LISTENING.call_once(cancel_on_interrupt);
    &PROGRESS
}

static LISTENING: Once = Once::new();

/// Ctrl-C and SIGTERM ask the work to stop, and to take its temporary files along; a second one stops at once.
fn cancel_on_interrupt() {
    // Without this they still end the program, only less tidily: no reason to refuse to work.
    let Ok(mut signals) = Signals::new([SIGINT, SIGTERM]) else { return };
    let listen = move || {
        for (number, _) in signals.forever().enumerate() {
            if number > 0 {
                std::process::exit(130);
            }
            PROGRESS.cancel();
        }
    };
    let _ = std::thread::Builder::new().stack_size(LISTENER_STACK_BYTES).spawn(listen);
}

const LISTENER_STACK_BYTES: usize = 64 << 10;

/// Runs `work`, with a bar on stderr once it has taken a second and if somebody is looking.
pub(crate) fn with_bar<T>(what: &'static str, work: impl FnOnce() -> T) -> T {
    if !std::io::stderr().is_terminal() {
        return work();
    }
    let (start_bytes, _) = progress().get();
    let (stop, stopped) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || draw(what, start_bytes, &stopped));
        let result = work();
        drop(stop);
        result
    })
}

fn draw(what: &'static str, start_bytes: u64, stopped: &mpsc::Receiver<()>) {
    let began = Instant::now();
    let mut bar: Option<ProgressBar> = None;
    while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(Duration::from_millis(100)) {
        let (done_bytes, total_bytes) = PROGRESS.get();
        if bar.is_none() && began.elapsed() >= Duration::from_secs(1) {
            bar = Some(ProgressBar::no_length().with_message(what).with_elapsed(began.elapsed()));
        }
        if let Some(bar) = &bar {
            // Work in another process, or that is not counted in bytes, still shows that it goes on.
            let template = if total_bytes > start_bytes { BYTES } else { TIME };
            bar.set_style(
                ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()),
            );
            bar.set_length(total_bytes.saturating_sub(start_bytes));
            bar.set_position(done_bytes.saturating_sub(start_bytes));
            bar.tick();
        }
    }
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
}

const BYTES: &str = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
const TIME: &str = "{msg} {spinner} {elapsed}";
