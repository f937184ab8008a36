//! Says whether bytes are what they should be: hashes and digests, records against their checksums, tensors against a
//! manifest, and one checkpoint against another. Each reads everything once, within a budget.

mod archives;
mod check;
mod compare;
mod difference;
mod hashes;
mod indices;
mod jobs;
mod made;
mod manifest;
mod threads;
mod tree_hash;
mod value;

pub use check::{Check, Checked, Finding, Kind, check};
pub use compare::{Comparison, Difference, compare};
pub use difference::Elements;
pub use hashes::{digest, digest_of, hash_tensors};
pub use made::Made;
pub use manifest::{Fingerprint, Manifest};
