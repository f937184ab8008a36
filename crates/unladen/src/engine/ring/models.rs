//! The ring in every order in which its threads can meet, when all goes well and when one of them does not:
//! `RUSTFLAGS="--cfg loom" cargo test -p unladen --lib models`.
//!
//! Fillers take their work from the queue that the engine has, and the roles are the ring's own. Only what they do with a
//! buffer is a model's: it has a number in it, which must be the same from when it was filled until its copy has run.

use super::{Flights, Ring};
use crate::{
    engine::queue::Queue,
    error::{Error, Result},
};
use loom::{
    sync::{Arc, atomic::AtomicBool},
    thread,
};
use std::{
    collections::VecDeque,
    ops::Range,
    path::PathBuf,
    sync::{
        Arc as Plain, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
};

/// What a model is about.
#[derive(Clone, Copy, Debug)]
struct Course {
    n_buffers: u32,
    n_pieces: u32,
    n_fillers: u32,
    /// Copies run at once; else as late as they can: when somebody waits for them.
    is_quick: bool,
    fails: Fails,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fails {
    Nothing,
    /// The first of the buffers is there, the others cannot be had.
    Preparing,
    /// A filler, with the buffer for this piece.
    Filling(u32),
    /// The driver, when this piece is handed to it.
    HandingOver(u32),
    /// The driver, when this piece has arrived.
    Landing(u32),
    /// Somebody cancels, at any time.
    Cancelled,
}

/// What is counted. Nothing that another thread might look at, so loom needs not know of it.
#[derive(Debug, Default)]
struct Tally {
    /// Pieces whose copies have run.
    arrived: Vec<u32>,
    /// Buffers that are no more.
    dropped: Vec<u32>,
}

type Tallied = Plain<Mutex<Tally>>;

/// Held for a moment in which loom lets no other thread run.
fn tally(of: &Tallied, add: impl FnOnce(&mut Tally)) {
    add(&mut of.lock().unwrap_or_else(PoisonError::into_inner));
}

/// A staging buffer.
struct Buffer {
    number: u32,
    /// The piece that it holds: what a copy out of it reads, whoever owns the buffer by then.
    memory: Plain<AtomicU32>,
    tally: Tallied,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        tally(&self.tally, |it| it.dropped.push(self.number));
    }
}

/// A copy, and the buffer that it reads when it runs.
struct Copy {
    piece: u32,
    memory: Plain<AtomicU32>,
    /// `None`: it has run, and the buffer was given back.
    buffer: Option<Buffer>,
    tally: Tallied,
}

impl Copy {
    fn wait(&mut self) -> Option<Buffer> {
        let buffer = self.buffer.take()?;
        let found = self.memory.load(SeqCst);
        assert_eq!(found, self.piece, "buffer {} was filled before its copy had run", buffer.number);
        tally(&self.tally, |it| it.arrived.push(self.piece));
        Some(buffer)
    }
}

/// Whoever drops a copy waits for it, as `cuda::InFlight` does.
impl Drop for Copy {
    fn drop(&mut self) {
        drop(self.wait());
    }
}

struct Copies {
    course: Course,
    copies: VecDeque<Copy>,
}

impl Flights<Buffer, ()> for Copies {
    fn is_empty(&self) -> bool {
        self.copies.is_empty()
    }

    fn is_first_done(&self) -> Result<bool> {
        Ok(self.course.is_quick && !self.copies.is_empty())
    }

    fn hand_over(&mut self, buffer: Buffer, (): (), _: &Ring<Buffer, ()>) -> Result<()> {
        let piece = buffer.memory.load(SeqCst);
        let (memory, tally) = (Plain::clone(&buffer.memory), Plain::clone(&buffer.tally));
        let copy = Copy { piece, memory, buffer: Some(buffer), tally };
        // The driver may say so with a part of it on its way.
        if self.course.fails == Fails::HandingOver(piece) {
            return Err(failed("cuMemcpyHtoDAsync"));
        }
        self.copies.push_back(copy);
        Ok(())
    }

    fn land(&mut self, ring: &Ring<Buffer, ()>) -> Result<()> {
        let Some(mut copy) = self.copies.pop_front() else { return Ok(()) };
        let buffer = copy.wait();
        if self.course.fails == Fails::Landing(copy.piece) {
            return Err(failed("cuEventSynchronize"));
        }
        buffer.into_iter().for_each(|it| ring.give_empty(it));
        Ok(())
    }
}

fn failed(what: &str) -> Error {
    Error::Device { device: "cuda:0".to_owned(), message: what.to_owned() }
}

/// What one thread fills, until there is nothing to fill, or something failed.
fn fill(
    course: Course,
    ring: &Ring<Buffer, ()>,
    pieces: &Queue<Range<u32>>,
    is_cancelled: &AtomicBool,
    has_failed: &AtomicU32,
) -> Result<()> {
    while let Some(piece) = pieces.take() {
        let is_filled = ring.fill(|buffer| {
            // The only buffer comes back from a failure when the ring has stopped, and goes to nobody.
            assert!(course.n_buffers > 1 || has_failed.load(SeqCst) == 0, "filled after a failure");
            if is_cancelled.load(SeqCst) {
                return Err(Error::Cancelled { path: PathBuf::new() });
            }
            if course.fails == Fails::Filling(piece) {
                has_failed.store(1, SeqCst);
                return Err(failed("a file"));
            }
            buffer.memory.store(piece, SeqCst);
            Ok(())
        });
        // As the engine's threads do, whatever they work on.
        if !is_filled.inspect_err(|_| pieces.stop())? {
            return Ok(());
        }
    }
    Ok(())
}

/// Fills and empties as an upload does, and checks what must be true however it goes: the threads end, what was handed over
/// has arrived as it was filled, and each buffer is dropped once, after its copy. What failed is an error of its side.
fn goes(course: Course) {
    let tallied = Tallied::default();
    let buffer = |number| Buffer { number, memory: Plain::default(), tally: Plain::clone(&tallied) };
    let buffers: Vec<Buffer> = (0..course.n_buffers).map(buffer).collect();
    let ring = Arc::new(Ring::with_room(buffers.len()));
    let is_cancelled = Arc::new(AtomicBool::new(false));
    let has_failed = Plain::new(AtomicU32::new(0));
    let cancelling = (course.fails == Fails::Cancelled).then(|| {
        let is_cancelled = Arc::clone(&is_cancelled);
        thread::spawn(move || is_cancelled.store(true, SeqCst))
    });
    let filling = {
        let (ring, is_cancelled) = (Arc::clone(&ring), Arc::clone(&is_cancelled));
        thread::spawn(move || {
            let pieces = Arc::new(Queue::new(0..course.n_pieces));
            ring.fill_all(|| {
                let others: Vec<_> = (1..course.n_fillers)
                    .map(|_| {
                        let (ring, pieces) = (Arc::clone(&ring), Arc::clone(&pieces));
                        let (is_cancelled, has_failed) =
                            (Arc::clone(&is_cancelled), Plain::clone(&has_failed));
                        thread::spawn(move || fill(course, &ring, &pieces, &is_cancelled, &has_failed))
                    })
                    .collect();
                let mine = fill(course, &ring, &pieces, &is_cancelled, &has_failed);
                others.into_iter().fold(mine, |result, it| result.and(it.join().unwrap()))
            })
        })
    };
    let emptied = ring.empty_all(|| {
        for buffer in buffers {
            if course.fails == Fails::Preparing && buffer.number > 0 {
                return Err(failed("cuMemHostRegister"));
            }
            ring.give_empty(buffer);
        }
        Ok(Copies { course, copies: VecDeque::new() })
    });
    let filled = filling.join().unwrap();
    cancelling.into_iter().for_each(|it| it.join().unwrap());

    match course.fails {
        Fails::Nothing => assert!(filled.is_ok() && emptied.is_ok(), "{filled:?}, {emptied:?}"),
        Fails::Filling(_) => assert!(matches!(filled, Err(Error::Device { .. })) && emptied.is_ok()),
        Fails::Preparing | Fails::HandingOver(_) | Fails::Landing(_) => {
            assert!(filled.is_ok() && emptied.is_err())
        }
        // It may come when all is filled.
        Fails::Cancelled => {
            assert!(matches!(filled, Ok(()) | Err(Error::Cancelled { .. })) && emptied.is_ok())
        }
    }
    let is_whole = filled.is_ok() && emptied.is_ok();
    let given_back = |it: &Tally| it.dropped.is_empty();
    let ring = Arc::try_unwrap(ring).ok().expect("a thread has the ring still");
    if is_whole {
        // Everything came, and every buffer is back.
        tally(&tallied, |it| assert!(given_back(it), "{it:?}"));
        assert_eq!(ring.into_empty().len() as u32, course.n_buffers);
    } else {
        // Who fills gives no buffer up, whatever happens to him.
        let is_the_fillers = matches!(course.fails, Fails::Filling(_) | Fails::Cancelled);
        tally(&tallied, |it| assert!(!is_the_fillers || given_back(it), "{it:?}"));
        drop(ring);
    }
    tally(&tallied, |it| {
        it.arrived.sort_unstable();
        it.dropped.sort_unstable();
        let all: Vec<u32> = (0..course.n_pieces).collect();
        assert!(it.arrived.windows(2).all(|two| two[0] != two[1]), "a piece arrived twice: {it:?}");
        assert!(if is_whole { it.arrived == all } else { it.arrived.len() <= all.len() }, "{it:?}");
        assert_eq!(it.dropped, (0..course.n_buffers).collect::<Vec<_>>(), "each buffer once");
    });
}

/// All orders in which threads are interrupted a few times each where they could have gone on: without a bound they are too
/// many to try, and what goes wrong does with few. `LOOM_MAX_PREEMPTIONS` sets another.
fn in_every_order(course: Course) {
    // A fourth thread makes some twenty times as many.
    let n_interruptions = if course.fails == Fails::Cancelled { 2 } else { 3 };
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(n_interruptions));
    let n_orders = Plain::new(AtomicU32::new(0));
    let counted = Plain::clone(&n_orders);
    builder.check(move || {
        counted.fetch_add(1, SeqCst);
        goes(course);
    });
    assert!(n_orders.load(SeqCst) > 1000, "{course:?}: so few orders are not all");
}

/// Two fillers wait for one of two buffers, or for the only one.
const FEW: Course =
    Course { n_buffers: 2, n_pieces: 3, n_fillers: 2, is_quick: false, fails: Fails::Nothing };
const ONE: Course = Course { n_buffers: 1, ..FEW };

#[test]
fn every_piece_comes_round_once_and_all_threads_end() {
    in_every_order(FEW);
    in_every_order(ONE);
    in_every_order(Course { is_quick: true, ..FEW });
}

#[test]
fn a_driver_that_gives_no_buffers_ends_those_who_fill_the_first() {
    in_every_order(Course { fails: Fails::Preparing, ..FEW });
}

#[test]
fn a_filler_that_fails_ends_those_who_wait_for_a_buffer_and_who_waits_for_a_full_one() {
    for piece in [0, 1] {
        in_every_order(Course { fails: Fails::Filling(piece), ..FEW });
        in_every_order(Course { fails: Fails::Filling(piece), ..ONE });
    }
}

#[test]
fn a_driver_that_takes_nothing_more_ends_those_who_fill() {
    for piece in [0, 1] {
        in_every_order(Course { fails: Fails::HandingOver(piece), ..FEW });
        in_every_order(Course { fails: Fails::HandingOver(piece), ..ONE });
    }
}

#[test]
fn a_copy_that_fails_ends_those_who_fill_and_the_others_are_waited_for() {
    in_every_order(Course { fails: Fails::Landing(0), ..FEW });
    in_every_order(Course { fails: Fails::Landing(1), ..ONE });
    in_every_order(Course { fails: Fails::Landing(0), is_quick: true, ..FEW });
}

#[test]
fn a_cancel_at_any_time_ends_everybody() {
    in_every_order(Course { n_pieces: 2, fails: Fails::Cancelled, ..FEW });
    in_every_order(Course { n_pieces: 2, fails: Fails::Cancelled, ..ONE });
}
