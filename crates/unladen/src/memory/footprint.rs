//! What work with checkpoints takes besides its buffers, and how long buffers have to be: facts for whoever keeps a budget.

use super::PAGE_BYTES;

/// The stack of each thread that works for a load, a hash or a conversion.
pub const STACK_BYTES: u64 = 128 << 10;

/// What any process takes for the first time while it works: pages of its allocator, of its libraries' data and of its own
/// stack, and what the kernel's counters are late by. Measured: 0.1 to 0.3 MiB, of which the counters may hide 0.5.
pub const PROCESS_BYTES: u64 = 1 << 20;

/// A buffer for so many bytes of a file, read in whole pages wherever they begin in one.
pub fn staging_bytes(len_bytes: u64) -> u64 {
    len_bytes.next_multiple_of(PAGE_BYTES) + 2 * PAGE_BYTES
}

/// What is read of a packed record at a time.
pub const PACKED_CHUNK_BYTES: u64 = 64 << 10;

/// What each thread takes while it unpacks a record: that much of it in a buffer, and the decoder with what it looks back
/// on, 32 KiB and tables.
pub const UNPACKING_BYTES: u64 = 128 << 10;
