//! `unladen inspect`: what a checkpoint holds, from its headers.

mod shared;
mod table;

use crate::{
    args::{InspectArgs, Tree},
    human, out, watch,
};
use serde::{Serialize, Serializer};
use std::{
    io::{self, Write},
    time::Instant,
};
use unladen::{
    OpenCheckpoint, Result,
    checkpoint::{Composite, CompositeKind},
    contents::{self, ReadPlan},
    format::{self, TreeStyle},
    tensor::{Backing, Tensor, TensorId},
    verify,
};

/// What is printed at once.
const PIECE_BYTES: usize = 32 << 10;

#[derive(Serialize)]
struct Listing<'a> {
    format: &'static str,
    open_s: f64,
    tensors: Tensors<'a>,
    composites: Vec<Made<'a>>,
    /// Where the state dict may be, the likeliest first.
    roots: &'a [String],
    warnings: Vec<String>,
}

/// The tensors, which are many: each is looked at when it is printed.
struct Tensors<'a> {
    checkpoint: &'a OpenCheckpoint,
    /// By tensor; empty without.
    hashes: &'a [Option<String>],
    /// By tensor, the first one that has the same bytes.
    first: Vec<TensorId>,
}

impl Serialize for Tensors<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_seq(self.checkpoint.iter().map(|(id, tensor)| self.listed(id, tensor)))
    }
}

impl Tensors<'_> {
    fn listed<'t>(&'t self, id: TensorId, tensor: &'t Tensor) -> Listed<'t> {
        let layout = &tensor.layout;
        let storage = match &tensor.backing {
            Backing::Storage(storage) => Some(storage.0),
            Backing::Meta | Backing::Extents(_) => None,
        };
        let offset_bytes = || layout.offset_elems().saturating_mul(layout.dtype().size_bytes());
        let first = self.first.get(id.0 as usize).filter(|it| **it != id);
        Listed {
            name: &tensor.name,
            dtype: layout.dtype().name(),
            shape: layout.shape(),
            stride: layout.stride(),
            storage,
            offset_bytes: storage.map(|_| offset_bytes()),
            n_extents: match &tensor.backing {
                Backing::Extents(range) => Some(range.len()),
                Backing::Meta | Backing::Storage(_) => None,
            },
            has_data: (tensor.backing == Backing::Meta).then_some(false),
            same_bytes_as: first.map(|it| self.checkpoint.tensor(*it).name.as_str()),
            sha256: self.hashes.get(id.0 as usize).and_then(Option::as_deref),
        }
    }
}

#[derive(Serialize)]
struct Listed<'a> {
    name: &'a str,
    dtype: &'static str,
    shape: &'a [u64],
    stride: &'a [u64],
    /// Tensors with one number view one run of bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    storage: Option<u32>,
    /// Where the first element stands in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    offset_bytes: Option<u64>,
    /// In how many parts it is stored, each in a storage of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    n_extents: Option<usize>,
    /// False for a tensor on the meta device.
    #[serde(skip_serializing_if = "Option::is_none")]
    has_data: Option<bool>,
    /// The first tensor with exactly these bytes, if that is another one.
    #[serde(skip_serializing_if = "Option::is_none")]
    same_bytes_as: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sha256: Option<&'a str>,
}

/// A tensor that is made of others.
#[derive(Serialize)]
struct Made<'a> {
    name: &'a str,
    kind: &'static str,
    /// What is known of it besides, as text prints it.
    what: String,
    shape: &'a [u64],
    /// Names of listed tensors.
    parts: Vec<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    axis: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scale: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    zero_point: Option<i64>,
}

pub(crate) fn run(args: &InspectArgs) -> Result<()> {
    if let Some(tree) = args.tree {
        return print_tree(args, tree == Tree::Full);
    }
    let began = Instant::now();
    let checkpoint = unladen::open_with(&args.file, &args.open.options())?;
    let open_s = began.elapsed().as_secs_f64();
    let mut hashes = Vec::new();
    if args.hash.is_some() {
        hashes.resize(checkpoint.tensors.len(), None);
        let plan = ReadPlan::new(&checkpoint, checkpoint.files(), args.host_budget, usize::MAX)?;
        let files = contents::files_of(checkpoint.files());
        let hashed = watch::with_bar("hashing", || {
            verify::hash_tensors(&checkpoint, &files, &plan, watch::progress())
        })?;
        for (id, hash) in hashed {
            hashes[id.0 as usize] = Some(hash);
        }
    }
    let listing = Listing {
        format: checkpoint.format.name(),
        open_s,
        tensors: Tensors {
            checkpoint: &checkpoint,
            hashes: &hashes,
            first: checkpoint.first_with_same_bytes(),
        },
        composites: checkpoint.composites.iter().map(|it| made(&checkpoint, it)).collect(),
        roots: &checkpoint.roots,
        warnings: checkpoint.warnings.iter().map(ToString::to_string).collect(),
    };
    if !args.json {
        print(&checkpoint, &listing);
        return Ok(());
    }
    let mut pieces = Pieces::default();
    serde_json::to_writer(&mut pieces, &listing).expect("strings and numbers");
    pieces.text.push(b'\n');
    pieces.pass_on();
    Ok(())
}

/// Collects pieces of JSON, and passes them on when they are long: a list of 300,000 tensors is never held.
#[derive(Default)]
struct Pieces {
    text: Vec<u8>,
}

impl Pieces {
    fn pass_on(&mut self) {
        // A letter that is not whole yet waits for its rest.
        let whole = match std::str::from_utf8(&self.text) {
            Ok(text) => text,
            Err(error) => std::str::from_utf8(&self.text[..error.valid_up_to()]).unwrap_or_default(),
        };
        out::result_piece(whole);
        let n_bytes = whole.len();
        self.text.drain(..n_bytes);
    }
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.text.extend_from_slice(bytes);
        if self.text.len() > PIECE_BYTES {
            self.pass_on();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn made<'a>(checkpoint: &'a OpenCheckpoint, composite: &'a Composite) -> Made<'a> {
    let mut made = Made {
        name: &composite.name,
        kind: "subclass",
        what: composite.kind.to_string(),
        shape: &composite.shape,
        parts: composite.part_ids().map(|it| checkpoint.tensor(it).name.as_str()).collect(),
        axis: None,
        scale: None,
        zero_point: None,
    };
    match composite.kind {
        CompositeKind::Sparse { .. } => made.kind = "sparse",
        CompositeKind::Nested => made.kind = "nested",
        CompositeKind::Quantised { axis, scale, zero_point, .. } => {
            made.kind = "quantised";
            (made.axis, made.scale, made.zero_point) = (axis, scale, zero_point);
        }
        _ => {}
    }
    made
}

/// Prints what stands beside the tensors.
fn print_tree(args: &InspectArgs, full: bool) -> Result<()> {
    let style = TreeStyle { json: args.json, full };
    format::tree(&args.file, &args.open.options(), style, &mut |piece| {
        out::result_piece(piece);
        watch::progress().check(&args.file)
    })
}

fn print(checkpoint: &OpenCheckpoint, listing: &Listing<'_>) {
    if !checkpoint.tensors.is_empty() {
        table::print(checkpoint, listing.tensors.hashes);
    }
    for made in &listing.composites {
        let [name, what] = [made.name, &made.what].map(|it| human::shortened(it).escape_debug().to_string());
        let parts: Vec<_> = made.parts.iter().map(|it| human::shortened(it)).collect();
        let parts = parts.join(", ");
        out::result(&format!("`{name}` {:?}: {what}; made of {}", made.shape, parts.escape_debug()));
    }
    shared::lines(checkpoint, &listing.tensors.first).iter().for_each(|it| out::result(it));
    let n_storages = checkpoint.storages.len();
    out::words(&format!(
        "{}: {}, {} tensors on {} storages, {}, opened in {} ms",
        checkpoint.path.display(),
        listing.format,
        checkpoint.tensors.len(),
        n_storages,
        human::bytes(checkpoint.len_bytes()),
        human::seconds(listing.open_s * 1e3),
    ));
    if checkpoint.tensors.is_empty() {
        out::words("it holds no tensors; `unladen inspect --tree` shows what it holds");
    }
    if let Some((root, others)) = listing.roots.split_first() {
        let also = if others.is_empty() { String::new() } else { format!("; also: {}", others.join(", ")) };
        out::words(&format!("the state dict is `{root}` (--root {root} opens it alone){also}"));
    }
    listing.warnings.iter().for_each(|it| out::words(&format!("warning: {it}")));
}
