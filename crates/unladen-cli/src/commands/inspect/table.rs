//! The table of tensors, a line each, in two passes: how wide the columns are, then the lines. It is never held.

use super::PIECE_BYTES;
use crate::{human, out};
use std::fmt::Write as _;
use unicode_width::UnicodeWidthStr as _;
use unladen::{
    Checkpoint,
    tensor::{Backing, Tensor},
};

const TITLES: [&str; 6] = ["tensor", "dtype", "shape", "stride", "size", "sha256"];
const STRIDE: usize = 3;
const SIZE: usize = 4;
const HASH: usize = 5;

/// Prints a table; `hashes` are by tensor, or empty.
pub(super) fn print(checkpoint: &Checkpoint, hashes: &[Option<String>]) {
    let mut cells: [String; 6] = Default::default();
    let mut widths = TITLES.map(str::len);
    for (index, tensor) in checkpoint.tensors.iter().enumerate() {
        fill(&mut cells, tensor, hash_of(hashes, index));
        for (width, cell) in widths.iter_mut().zip(&cells) {
            *width = (*width).max(cell.width());
        }
    }
    let is_hidden = |column| match column {
        STRIDE => checkpoint.tensors.iter().all(|it| it.layout.is_contiguous()),
        HASH => hashes.iter().all(Option::is_none),
        _ => false,
    };
    let columns: Vec<(usize, usize)> =
        widths.into_iter().enumerate().filter(|(column, _)| !is_hidden(*column)).collect();
    let mut text = String::new();
    line(&columns, &TITLES, &mut text);
    for (index, tensor) in checkpoint.tensors.iter().enumerate() {
        fill(&mut cells, tensor, hash_of(hashes, index));
        line(&columns, &cells, &mut text);
        if text.len() > PIECE_BYTES {
            out::result_piece(&text);
            text.clear();
        }
    }
    out::result_piece(&text);
}

fn hash_of(hashes: &[Option<String>], index: usize) -> &str {
    hashes.get(index).and_then(Option::as_deref).unwrap_or_default()
}

fn fill(cells: &mut [String; 6], tensor: &Tensor, hash: &str) {
    cells.iter_mut().for_each(String::clear);
    let [name, dtype, shape, stride, size, sha256] = cells;
    let layout = &tensor.layout;
    name.extend(human::shortened(&tensor.name).escape_debug());
    dtype.push_str(layout.dtype().name());
    // Writing to a string cannot fail.
    let _ = write!(shape, "{:?}", layout.shape());
    // Strides that follow from the shape are no news.
    if !layout.is_contiguous() {
        let _ = write!(stride, "{:?}", layout.stride());
    }
    match tensor.backing {
        Backing::Meta => size.push_str("meta"),
        _ => size.push_str(&human::bytes(layout.len_bytes())),
    }
    sha256.push_str(hash);
}

/// A line of some columns with their widths.
fn line(columns: &[(usize, usize)], cells: &[impl AsRef<str>; 6], text: &mut String) {
    for &(column, width) in columns {
        let cell = cells[column].as_ref();
        let blanks = " ".repeat(width.saturating_sub(cell.width()));
        text.push(' ');
        match column {
            SIZE => text.extend([&blanks, cell]),
            _ => text.extend([cell, &blanks]),
        }
        text.push(' ');
    }
    text.truncate(text.trim_end_matches(' ').len());
    text.push('\n');
}
