//! How much staging some reads need: as much as they will touch, so that what is reserved is what is used.

use super::steps::{Change, Gather, Read, Rooms, Way};
use crate::{
    memory::{PAGE_BYTES, staging_bytes},
    tensor::Side,
};

/// How many bytes of a file go through the processor's cache at a time.
pub const PLACED_BYTES: u64 = 256 << 10;

/// What a staging buffer takes of a file at least: reads below this are slow.
pub(super) const MIN_CHUNK_BYTES: u64 = 64 << 10;

/// What it takes at most from the page cache: more does not make strided copies faster.
const MAX_CHUNK_BYTES: u64 = 1 << 20;

/// What it takes at most from a disk, several being in flight.
const MAX_DIRECT_CHUNK_BYTES: u64 = 4 << 20;

/// What it takes at most on the way to a GPU: the bus is as fast as it gets from 4 MiB a copy on.
const MAX_UPLOAD_CHUNK_BYTES: u64 = 8 << 20;

/// Buffers that are on their way to a GPU while the threads fill others: the bus is never idle between two of them.
const MAX_IN_FLIGHT: usize = 4;

/// What a staging buffer may take of a file, from the fastest to the leanest. `is_direct`: from a disk.
pub fn chunk_sizes(is_direct: bool) -> impl Iterator<Item = u64> {
    let largest = if is_direct { MAX_DIRECT_CHUNK_BYTES } else { MAX_CHUNK_BYTES };
    std::iter::successors(Some(largest), |it| Some(it / 2)).take_while(|it| *it >= MIN_CHUNK_BYTES)
}

/// What a staging buffer for a GPU may take of a file, with the number of buffers that may be on their way, from the
/// fastest to the leanest.
pub(super) fn upload_sizes() -> impl Iterator<Item = (u64, usize)> {
    let sizes = std::iter::successors(Some(MAX_UPLOAD_CHUNK_BYTES), |it| Some(it / 2));
    let sizes = sizes.take_while(|it| *it >= MIN_CHUNK_BYTES);
    sizes.flat_map(|chunk_bytes| [(chunk_bytes, MAX_IN_FLIGHT), (chunk_bytes, 1)])
}

/// So many threads, then half of them, down to one.
pub fn fewer(n_threads: usize) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(n_threads), |it| Some(it / 2)).take_while(|it| *it >= 1)
}

/// How the staging of a plan is cut.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ring {
    /// Threads, each with a buffer.
    pub(super) n_threads: usize,
    /// For a GPU there are more buffers: so many can be on their way while the threads fill theirs.
    pub(super) n_in_flight: usize,
    /// Bytes of a file that a buffer takes.
    pub(super) chunk_bytes: u64,
    /// Pages are put in place, by way of the buffers.
    pub(super) places_pages: bool,
    /// All files come from the page cache: elements are changed while they are in the processor's.
    pub(super) is_cached: bool,
    /// What a cast makes wider for a GPU is cast in the buffers, and not behind the bus: more bytes cross it, and no memory
    /// of the GPU is needed on the way.
    pub(super) widens_on_host: bool,
}

/// Buffers for some reads.
pub(super) struct Room {
    /// Bytes of a file that a buffer takes at a time.
    pub(super) chunk_bytes: u64,
    /// What it is as a whole.
    pub(super) buffer_bytes: u64,
    pub(super) n_buffers: usize,
}

/// The buffers for some reads. `is_placed`: pages of large tensors are put in place.
pub(super) fn room(reads: &[Read], ring: Ring, is_placed: bool) -> Room {
    let limit_bytes = |read: &Read| match &read.way {
        Way::Plain if !is_placed => 0,
        Way::Plain => ring.chunk_bytes.min(PLACED_BYTES),
        Way::Elements(_) if ring.is_cached => ring.chunk_bytes.min(PLACED_BYTES),
        Way::Elements(_) | Way::Parts(_) | Way::Gather(_) | Way::Boxes(_) => ring.chunk_bytes,
    };
    let used_bytes = |read: &Read| limit_bytes(read).min(span_bytes(read));
    let used = reads.iter().map(used_bytes).max().unwrap_or(0);
    // No less than an element, which no cut divides.
    let chunk_bytes = used.next_multiple_of(PAGE_BYTES);
    let cast_bytes =
        reads.iter().map(|read| cast_bytes(read, used_bytes(read), is_placed)).max().unwrap_or(0);
    let is_all_staged = is_placed || reads.iter().all(|it| it.way != Way::Plain);
    let n_pieces: u64 = { reads.chunk_by(Read::goes_with) }
        .map(|run| match run {
            [read, ..] if !read.is_in_order => n_pieces(read, limit_bytes(read)),
            _ => 1,
        })
        .sum();
    let n_buffers = match used {
        0 => 0,
        // A thread without a buffer could not take what another needs one for.
        _ if !is_all_staged => ring.n_threads,
        _ => ring.n_threads.min(n_pieces as usize),
    };
    let buffer_bytes = staging_bytes(chunk_bytes) + cast_bytes.next_multiple_of(PAGE_BYTES);
    Room { chunk_bytes, buffer_bytes, n_buffers }
}

/// Buffers for reads that go to a GPU.
pub(super) struct UploadRoom {
    pub(super) rooms: Rooms,
    /// What one is as a whole.
    pub(super) buffer_bytes: u64,
    pub(super) n_buffers: usize,
}

/// The buffers for some reads that go to GPUs.
pub(super) fn upload_room(reads: &[Read], ring: Ring) -> UploadRoom {
    let used_bytes = |read: &Read| ring.chunk_bytes.min(span_bytes(read));
    let most =
        |of: &dyn Fn(&Read) -> u64| reads.iter().map(of).max().unwrap_or(0).next_multiple_of(PAGE_BYTES);
    let rooms = Rooms {
        chunk_bytes: most(&used_bytes),
        cast_bytes: most(&|read| match &read.way {
            // Elements that stand together are no more in a box than it has bytes.
            Way::Boxes(gather) if gather.block.axes.is_empty() => gather.boxes(ring.chunk_bytes).max_bytes(),
            Way::Gather(_) | Way::Boxes(_) => cast_bytes(read, used_bytes(read), false),
            Way::Plain | Way::Elements(_) | Way::Parts(_) => 0,
        }),
        target_bytes: most(&|read| match &read.way {
            Way::Plain => 0,
            Way::Elements(change) if change.from == change.to || change.widens() => 0,
            // No less than an element, which no cut divides.
            Way::Elements(change) => change.target_bytes(used_bytes(read).next_multiple_of(PAGE_BYTES)),
            Way::Parts(_) | Way::Gather(_) => read.target.len_bytes,
            Way::Boxes(gather) => gather.boxes(ring.chunk_bytes).max_bytes(),
        }),
    };
    let n_pieces: u64 = { reads.chunk_by(Read::goes_with) }
        .map(|run| run.iter().map(|read| n_pieces(read, ring.chunk_bytes)).sum::<u64>())
        .sum();
    UploadRoom {
        rooms,
        buffer_bytes: staging_bytes(rooms.chunk_bytes) + rooms.cast_bytes + rooms.target_bytes,
        n_buffers: (ring.n_threads + ring.n_in_flight).min(n_pieces.max(1) as usize),
    }
}

fn span_of(gather: &Gather) -> u64 {
    gather.change.source_bytes(gather.block.span_bytes(Side::Source))
}

/// The most that a read would take at once if there were no limit.
fn span_bytes(read: &Read) -> u64 {
    match &read.way {
        Way::Plain | Way::Elements(_) | Way::Parts(_) => read.len_bytes,
        Way::Gather(gathers) => gathers.iter().map(span_of).max().unwrap_or(0),
        // Elements that are repeated span less than they fill.
        Way::Boxes(gather) => span_of(gather).max(read.len_bytes),
    }
}

/// The part of a staging buffer for elements that were cast: none if they are cast straight to where they stay.
fn cast_bytes(read: &Read, used_bytes: u64, is_placed: bool) -> u64 {
    let room = |change: &Change| match change.from == change.to {
        true => 0,
        // A piece that is placed is whole pages.
        false => change.target_bytes(used_bytes + change.from.size_bytes()).next_multiple_of(PAGE_BYTES),
    };
    match &read.way {
        Way::Elements(change) if is_placed => room(change),
        Way::Plain | Way::Elements(_) | Way::Parts(_) => 0,
        Way::Gather(gathers) => gathers.iter().map(|it| room(&it.change)).max().unwrap_or(0),
        Way::Boxes(gather) => room(&gather.change),
    }
}

/// Pieces that different threads may take.
fn n_pieces(read: &Read, limit_bytes: u64) -> u64 {
    match &read.way {
        Way::Plain | Way::Elements(_) => read.len_bytes.div_ceil(limit_bytes.max(1)),
        Way::Parts(_) | Way::Gather(_) => 1,
        Way::Boxes(gather) => gather.boxes(limit_bytes).count(),
    }
}
