//! `unladen inspect`: what a checkpoint holds, from its headers.

use crate::{args::InspectArgs, human, out, watch};
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use std::time::Instant;
use unladen::{
    OpenCheckpoint, Result,
    contents::{self, ReadPlan},
    verify,
};

#[derive(Serialize)]
struct Listing<'a> {
    format: &'static str,
    open_s: f64,
    tensors: Vec<Listed<'a>>,
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

pub(crate) fn run(args: &InspectArgs) -> Result<()> {
    let began = Instant::now();
    let checkpoint = unladen::open(&args.file)?;
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
    let listing = Listing { format: checkpoint.format.name(), open_s, tensors: tensors.collect(), warnings };
    if args.json {
        out::result(&serde_json::to_string(&listing).expect("strings and numbers"));
    } else {
        print(&checkpoint, &listing);
    }
    Ok(())
}

fn print(checkpoint: &OpenCheckpoint, listing: &Listing<'_>) {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(["tensor", "dtype", "shape", "stride", "size", "sha256"]);
    for (listed, tensor) in listing.tensors.iter().zip(&checkpoint.tensors) {
        // Strides that follow from the shape are no news.
        let stride =
            if tensor.layout.is_contiguous() { String::new() } else { format!("{:?}", listed.stride) };
        table.add_row([
            listed.name.escape_debug().to_string(),
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
    listing.warnings.iter().for_each(|it| out::words(&format!("warning: {it}")));
}
