//! Fresh pages can be small, put in place one by one or touched, or huge. Which is faster depends on what memory the system
//! has to give at the moment, and may change while a load runs: so both are tried, all the time.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// A way to fill fresh pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Touch {
    /// Small pages, put in place if that is allowed, else touched by the read.
    Small,
    /// Huge pages, touched by the read.
    Huge,
}

const WAYS: [Touch; 2] = [Touch::Small, Touch::Huge];

/// Pieces in the beginning that go by either way in turns.
const N_TRIALS: u64 = 8;

/// One piece of so many goes by the slower way, to see whether it still is.
const TRIAL_EVERY: u64 = 64;

/// Pieces below this say little.
const MIN_PIECE_BYTES: u64 = 1 << 20;

/// What either way took of late. Shared by all threads, which may overwrite each other's figures: any of them will do.
#[derive(Debug, Default)]
pub(super) struct Chooser {
    n_pieces: AtomicU64,
    ns_per_mib: [AtomicU64; 2],
}

impl Chooser {
    /// The way for the next piece.
    pub(super) fn next(&self) -> Touch {
        let number = self.n_pieces.fetch_add(1, Relaxed);
        let [small, huge] = [&self.ns_per_mib[0], &self.ns_per_mib[1]].map(|it| it.load(Relaxed));
        let best = usize::from(huge < small);
        match number {
            0..N_TRIALS => WAYS[number as usize % 2],
            _ if number.is_multiple_of(TRIAL_EVERY) => WAYS[1 - best],
            _ => WAYS[best],
        }
    }

    /// What a piece took.
    pub(super) fn learn(&self, way: Touch, len_bytes: u64, took: Duration) {
        if len_bytes < MIN_PIECE_BYTES {
            return;
        }
        let new = (took.as_nanos() as u64 / (len_bytes >> 20)).max(1);
        let figure = &self.ns_per_mib[usize::from(way == Touch::Huge)];
        let old = figure.load(Relaxed);
        figure.store(if old == 0 { new } else { (3 * old + new) / 4 }, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of the next 640 pieces go by huge pages, if each way takes so many microseconds a piece.
    fn n_huge(chooser: &Chooser, [small_us, huge_us]: [u64; 2]) -> usize {
        let pieces = (0..640).map(|_| {
            let way = chooser.next();
            let took = if way == Touch::Huge { huge_us } else { small_us };
            chooser.learn(way, 4 << 20, Duration::from_micros(took));
            way
        });
        pieces.filter(|way| *way == Touch::Huge).count()
    }

    #[test]
    fn the_faster_way_is_taken_and_a_change_is_noticed() {
        let chooser = Chooser::default();
        assert!(n_huge(&chooser, [1000, 3000]) < 20);
        assert!(n_huge(&chooser, [3000, 1000]) > 300, "it takes a few trials to notice");
        assert!(n_huge(&chooser, [3000, 1000]) > 620);
    }

    #[test]
    fn short_pieces_teach_nothing() {
        let chooser = Chooser::default();
        chooser.learn(Touch::Huge, 100, Duration::from_nanos(1));
        assert_eq!(chooser.ns_per_mib[1].load(Relaxed), 0);
    }
}
