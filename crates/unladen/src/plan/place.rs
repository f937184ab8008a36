//! Where tensors lie in memory, and the reads that bring them there.
//!
//! A state dict has two arenas. In `pages` lies what is large, each run of neighbouring tensors in pages of its own and
//! like in the file (address ≡ place in the file, modulo a page): reads land in place, past the page cache too, and whole
//! pages can be put in place instead of being touched. In `rest` lies everything else, close together.

use super::{
    items::{Item, PlainRun, place_of, plain_run},
    steps::{Change, Gather, Part, Read, SlotId, Span, Way},
};
use crate::{
    checkpoint::Checkpoint,
    dtype::{DType, Resolve},
    error::Result,
    io_path::IoPath,
    memory::PAGE_BYTES,
    tensor::{Block, FileId, Piece, Window},
};

/// Bytes between two tensors of a file that are read along rather than skipped: archive headers and padding.
pub(super) const MAX_GAP_BYTES: u64 = 4096;

/// What is at least this long has pages of its own, of which it wastes at most two.
const OWN_PAGES_BYTES: u64 = 1 << 20;

/// Tensors that must be changed on their way and are at most this long share reads with their neighbours.
const SMALL_BYTES: u64 = 32 << 10;

/// What tensors are aligned to where the file does not say: a cache line, and what PyTorch aligns to.
pub(super) const ALIGN_BYTES: u64 = 64;

/// Bytes as they are, cut anywhere, but by way of a staging buffer.
const VERBATIM: Change =
    Change { from: DType::U8, to: DType::U8, resolve: Resolve { swap: false, conj: false, neg: false } };

/// Where a tensor lies.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) slot: SlotId,
    pub(super) start_byte: u64,
}

/// Items one after the other in one slot, in the checkpoint's order: their places, and the bytes of all.
pub(super) fn packed(items: &[Item], slot: SlotId, align_bytes: u64) -> (Vec<Place>, u64) {
    let mut end_byte = 0u64;
    let places = items.iter().map(|item| {
        let start_byte = end_byte;
        end_byte = (end_byte + item.len_bytes()).next_multiple_of(align_bytes);
        Place { slot, start_byte }
    });
    (places.collect(), end_byte)
}

/// A state dict to be read.
pub(super) struct StateDict {
    /// By position in the items.
    pub(super) places: Vec<Place>,
    /// Bytes of the arena for runs in pages of their own.
    pub(super) pages_bytes: u64,
    /// True if nothing in `pages` is read from the disk in place, which needs memory that can be touched.
    pub(super) can_be_placed: bool,
    /// Bytes of the arena for the rest.
    pub(super) rest_bytes: u64,
    /// Ascending in the files and in both arenas.
    pub(super) reads: Vec<Read>,
}

/// Items that come with one read.
struct Group {
    file: FileId,
    /// Of the file.
    start_byte: u64,
    end_byte: u64,
    /// In memory.
    len_bytes: u64,
    way: Way,
}

/// Lays items out for reading, `pages` and `rest` being the slots of the two arenas. A read of several tensors takes at
/// most `chunk_bytes` of a file.
pub(super) fn state_dict(
    checkpoint: &Checkpoint,
    items: &[Item],
    io: &[IoPath],
    chunk_bytes: u64,
    [pages, rest]: [SlotId; 2],
) -> Result<StateDict> {
    let (groups, members) = groups(checkpoint, items, chunk_bytes)?;
    let mut state = StateDict {
        places: Vec::new(),
        pages_bytes: 0,
        can_be_placed: true,
        rest_bytes: 0,
        reads: Vec::with_capacity(groups.len()),
    };
    let starts: Vec<Place> =
        groups.into_iter().map(|group| state.put(group, checkpoint, io, [pages, rest])).collect();
    let place = |(group, offset_bytes): Member| {
        let start = starts.get(group).copied().unwrap_or(Place { slot: rest, start_byte: 0 });
        Place { start_byte: start.start_byte + offset_bytes, ..start }
    };
    state.places = members.into_iter().map(place).collect();
    Ok(state)
}

impl StateDict {
    /// Gives a group its place and its read.
    fn put(
        &mut self,
        group: Group,
        checkpoint: &Checkpoint,
        io: &[IoPath],
        [pages, rest]: [SlotId; 2],
    ) -> Place {
        let Group { file, start_byte, end_byte, len_bytes, way } = group;
        let path = io.get(file.0 as usize).copied().unwrap_or_default();
        // Records that are unpacked have no pages that could lie like theirs, and take their time for other things.
        let is_in_order = is_in_order(checkpoint, file, &way);
        let is_paged =
            len_bytes >= OWN_PAGES_BYTES && matches!(way, Way::Plain | Way::Elements(_)) && !is_in_order;
        if !is_paged {
            // Like in the file, so that every tensor of a run is aligned, wherever the first of them starts.
            let in_line = if way == Way::Plain { start_byte % ALIGN_BYTES } else { 0 };
            let start_of_line = self.rest_bytes.next_multiple_of(ALIGN_BYTES);
            let place = Place { slot: rest, start_byte: start_of_line + in_line };
            self.rest_bytes = place.start_byte + len_bytes;
            // Past the page cache come whole pages only, which cannot land here.
            let way = if way == Way::Plain && path.is_past_cache() { Way::Elements(VERBATIM) } else { way };
            let target = Span { slot: rest, start_byte: place.start_byte, len_bytes };
            let len_bytes = end_byte - start_byte;
            self.reads.push(Read { file, start_byte, len_bytes, target, way, is_in_order });
            return place;
        }
        self.can_be_placed &= path != IoPath::Direct;
        let page_byte = self.pages_bytes;
        let in_page = if way == Way::Plain { start_byte % PAGE_BYTES } else { 0 };
        let (first_byte, last_byte) = match way {
            Way::Plain => {
                let last_byte = end_byte.next_multiple_of(PAGE_BYTES).min(checkpoint.file(file).len_bytes);
                (start_byte - in_page, last_byte)
            }
            _ => (start_byte, end_byte),
        };
        let room_bytes = (in_page + len_bytes).next_multiple_of(PAGE_BYTES);
        self.pages_bytes += room_bytes;
        let target = Span { slot: pages, start_byte: page_byte, len_bytes: room_bytes };
        self.reads.push(Read {
            file,
            start_byte: first_byte,
            len_bytes: last_byte - first_byte,
            target,
            way,
            is_in_order,
        });
        Place { slot: pages, start_byte: page_byte + in_page }
    }
}

/// The group that an item comes with, and where it lies in it.
type Member = (usize, u64);

/// Which items come together, in file order; and for each item its group and its place in it. Empty items are in none.
fn groups(checkpoint: &Checkpoint, items: &[Item], chunk_bytes: u64) -> Result<(Vec<Group>, Vec<Member>)> {
    let mut in_order: Vec<(FileId, u64, usize)> = Vec::with_capacity(items.len());
    for (index, item) in items.iter().enumerate().filter(|(_, item)| item.len_bytes() > 0) {
        let first = checkpoint.pieces(item.tensor).next();
        let (file, start_byte) = first.map_or((FileId(0), 0), |piece| place_of(checkpoint, &piece));
        in_order.push((file, start_byte, index));
    }
    in_order.sort_unstable();

    let mut groups: Vec<Group> = Vec::new();
    let mut members = vec![(usize::MAX, 0); items.len()];
    // The groups that may grow still: a run of tensors as they are, and small ones to be changed.
    let (mut open_run, mut open_parts) = (usize::MAX, usize::MAX);
    for (_, _, index) in in_order {
        let item = &items[index];
        let Some(run) = plain_run(checkpoint, item) else {
            let target = Span { slot: SlotId(0), start_byte: 0, len_bytes: item.len_bytes() };
            if let Some(read) = gather(checkpoint, item, &Window::whole(item.layout.shape()), target)? {
                let Read { file, start_byte, len_bytes, way, .. } = read;
                members[index] = (groups.len(), 0);
                let end_byte = start_byte + len_bytes;
                groups.push(Group { file, start_byte, end_byte, len_bytes: item.len_bytes(), way });
            }
            continue;
        };
        let end_byte = run.start_byte + run.len_bytes;
        let follows = |group: &Group, max_gap_bytes: u64| {
            group.file == run.file
                && run.start_byte.checked_sub(group.end_byte).is_some_and(|gap| gap <= max_gap_bytes)
        };
        let new =
            |len_bytes, way| Group { file: run.file, start_byte: run.start_byte, end_byte, len_bytes, way };
        if run.is_verbatim() {
            // Overlapping tensors are private copies: those that do not follow the run begin another.
            match groups.get_mut(open_run).filter(|group| follows(group, MAX_GAP_BYTES)) {
                Some(group) => {
                    members[index] = (open_run, run.start_byte - group.start_byte);
                    group.end_byte = end_byte;
                    group.len_bytes = end_byte - group.start_byte;
                }
                None => {
                    open_run = groups.len();
                    members[index] = (open_run, 0);
                    groups.push(new(run.len_bytes, Way::Plain));
                }
            }
        } else if run.len_bytes > SMALL_BYTES || item.len_bytes() > SMALL_BYTES {
            members[index] = (groups.len(), 0);
            groups.push(new(item.len_bytes(), Way::Elements(run.change)));
        } else {
            let part =
                Part { source_byte: 0, len_bytes: run.len_bytes as u32, target_byte: 0, change: run.change };
            let fits =
                |group: &Group| follows(group, MAX_GAP_BYTES) && end_byte - group.start_byte <= chunk_bytes;
            match groups.get_mut(open_parts).filter(|group| fits(group)) {
                Some(Group {
                    start_byte, end_byte: group_end, len_bytes, way: Way::Parts(parts), ..
                }) => {
                    let target_byte = len_bytes.next_multiple_of(ALIGN_BYTES);
                    let source_byte = (run.start_byte - *start_byte) as u32;
                    parts.push(Part { source_byte, target_byte: target_byte as u32, ..part });
                    members[index] = (open_parts, target_byte);
                    (*group_end, *len_bytes) = (end_byte, target_byte + item.len_bytes());
                }
                _ => {
                    open_parts = groups.len();
                    members[index] = (open_parts, 0);
                    groups.push(new(item.len_bytes(), Way::Parts(vec![part])));
                }
            }
        }
    }
    Ok((groups, members))
}

/// The read of a window of an item whose elements have to be brought into order.
pub(super) fn gather(
    checkpoint: &Checkpoint,
    item: &Item,
    window: &Window,
    target: Span,
) -> Result<Option<Read>> {
    let gathers = checkpoint
        .pieces(item.tensor)
        .filter_map(|piece| gather_piece(checkpoint, item, &piece, window).transpose());
    let gathers = gathers.collect::<Result<Vec<Gather>>>()?;
    // What arrives: reads may span more, for elements of others that lie between.
    let len_bytes = gathers.iter().map(|it| it.change.source_bytes(it.block.len_bytes())).sum();
    let first = gathers.first().map(|it| (it.file, it.start_byte));
    let way = Way::Gather(gathers);
    Ok(first.map(|(file, start_byte)| {
        let is_in_order = is_in_order(checkpoint, file, &way);
        Read { file, start_byte, len_bytes, target, way, is_in_order }
    }))
}

/// What a piece of an item has of a window. Fails for a view that makes gigabytes of a few bytes.
pub(super) fn gather_piece(
    checkpoint: &Checkpoint,
    item: &Item,
    piece: &Piece<'_>,
    window: &Window,
) -> Result<Option<Gather>> {
    piece
        .layout
        .check_expansion()
        .map_err(|error| error.in_tensor(&checkpoint.tensor(item.tensor).name).in_file(&checkpoint.path))?;
    let change = item.change(piece);
    // A cast comes first: the block counts in bytes of the type in memory.
    let layout = piece.layout.with_dtype(change.to)?;
    let Some(mut block) = Block::within(&layout, piece.at, window) else { return Ok(None) };
    let storage = checkpoint.storage_of(piece);
    let start_byte = storage.start_byte + change.source_bytes(block.source_byte);
    block.source_byte = 0;
    Ok(Some(Gather { file: storage.file, start_byte, block, change }))
}

/// True if the bytes that a read starts with come from a packed record, and no other bytes from elsewhere.
pub(super) fn is_in_order(checkpoint: &Checkpoint, file: FileId, way: &Way) -> bool {
    let is_of_one_file = match way {
        Way::Gather(gathers) => gathers.iter().all(|it| it.file == file),
        Way::Plain | Way::Elements(_) | Way::Parts(_) | Way::Boxes(_) => true,
    };
    is_of_one_file && checkpoint.is_packed(file)
}

/// The read that brings one item to a place of its own, which is as long as it.
pub(super) fn read_of(
    checkpoint: &Checkpoint,
    item: &Item,
    io: &[IoPath],
    target: Span,
) -> Result<Option<Read>> {
    if target.len_bytes == 0 {
        return Ok(None);
    }
    let Some(run) = plain_run(checkpoint, item) else {
        return gather(checkpoint, item, &Window::whole(item.layout.shape()), target);
    };
    let path = io.get(run.file.0 as usize).copied().unwrap_or_default();
    let way =
        if run.change.is_nothing() && !path.is_past_cache() { Way::Plain } else { Way::Elements(run.change) };
    let PlainRun { file, start_byte, len_bytes, .. } = run;
    let is_in_order = checkpoint.is_packed(file);
    Ok(Some(Read { file, start_byte, len_bytes, target, way, is_in_order }))
}
