//! `unladen inspect`: what a checkpoint holds, from its headers.

use crate::{
    args::{InspectArgs, Tree},
    human, out, watch,
};
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use std::time::Instant;
use unladen::{
    OpenCheckpoint, Result,
    checkpoint::{Composite, CompositeKind},
    contents::{self, ReadPlan},
    format::{self, TreeStyle},
    verify,
};

#[derive(Serialize)]
struct Listing<'a> {
    format: &'static str,
    open_s: f64,
    tensors: Vec<Listed<'a>>,
    composites: Vec<Made<'a>>,
    /// Where the state dict may be, the likeliest first.
    roots: &'a [String],
    warnings: Vec<String>,
}

#[derive(Serialize)]
struct Listed<'a> {
    name: &'a str,
    dtype: &'static str,
    shape: &'a [u64],
    stride: &'a [u64],
    #[serde(skip_serializing_if = "Option::is_none")]
    sha256: Option<String>,
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
    let mut hashes = vec![None; checkpoint.tensors.len()];
    if args.hash.is_some() {
        let plan = ReadPlan::new(&checkpoint, checkpoint.files(), args.host_budget, usize::MAX)?;
        let files = contents::files_of(checkpoint.files());
        let hashed = watch::with_bar("hashing", || {
            verify::hash_tensors(&checkpoint, &files, &plan, watch::progress())
        })?;
        for (id, hash) in hashed {
            hashes[id.0 as usize] = Some(hash);
        }
    }
    let tensors = checkpoint.tensors.iter().zip(hashes).map(|(tensor, sha256)| Listed {
        name: &tensor.name,
        dtype: tensor.layout.dtype().name(),
        shape: tensor.layout.shape(),
        stride: tensor.layout.stride(),
        sha256,
    });
    let warnings: Vec<_> = checkpoint.warnings.iter().map(ToString::to_string).collect();
    let listing = Listing {
        format: checkpoint.format.name(),
        open_s,
        tensors: tensors.collect(),
        composites: checkpoint.composites.iter().map(|it| made(&checkpoint, it)).collect(),
        roots: &checkpoint.roots,
        warnings,
    };
    if args.json {
        out::result(&serde_json::to_string(&listing).expect("strings and numbers"));
    } else {
        print(&checkpoint, &listing);
    }
    Ok(())
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
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(["tensor", "dtype", "shape", "stride", "size", "sha256"]);
    for (listed, tensor) in listing.tensors.iter().zip(&checkpoint.tensors) {
        // Strides that follow from the shape are no news.
        let stride =
            if tensor.layout.is_contiguous() { String::new() } else { format!("{:?}", listed.stride) };
        table.add_row([
            human::shortened(listed.name).escape_debug().to_string(),
            listed.dtype.to_owned(),
            format!("{:?}", listed.shape),
            stride,
            human::bytes(tensor.layout.len_bytes()),
            listed.sha256.clone().unwrap_or_default(),
        ]);
    }
    if let Some(column) = table.column_mut(4) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    for (index, is_empty) in [
        (5, listing.tensors.iter().all(|it| it.sha256.is_none())),
        (3, checkpoint.tensors.iter().all(|it| it.layout.is_contiguous())),
    ] {
        if let (true, Some(column)) = (is_empty, table.column_mut(index)) {
            column.set_constraint(comfy_table::ColumnConstraint::Hidden);
        }
    }
    out::result(&table.trim_fmt());
    for made in &listing.composites {
        let [name, what] = [made.name, &made.what].map(|it| human::shortened(it).escape_debug().to_string());
        let parts: Vec<_> = made.parts.iter().map(|it| human::shortened(it)).collect();
        let parts = parts.join(", ");
        out::result(&format!("`{name}` {:?}: {what}; made of {}", made.shape, parts.escape_debug()));
    }
    let n_storages = checkpoint.storages.len();
    out::words(&format!(
        "{}: {}, {} tensors on {} storages, {}, opened in {} ms",
        checkpoint.path.display(),
        listing.format,
        listing.tensors.len(),
        n_storages,
        human::bytes(checkpoint.len_bytes()),
        human::seconds(listing.open_s * 1e3),
    ));
    if let Some((root, others)) = listing.roots.split_first() {
        let also = if others.is_empty() { String::new() } else { format!("; also: {}", others.join(", ")) };
        out::words(&format!("the state dict is `{root}` (--root {root} opens it alone){also}"));
    }
    listing.warnings.iter().for_each(|it| out::words(&format!("warning: {it}")));
}
