//! The tree of a distributed checkpoint: its state dict, flat as it is stored. Tensors come from the metadata, everything
//! else from an archive of its own in one of the files.

use super::{
    Frame, PIECE_BYTES, Writer, json,
    node::{Head, Node, Title},
    print_file, root, text,
};
use crate::{
    checkpoint::{Checkpoint, Root},
    error::Result,
    format::{
        OpenOptions,
        confine::Folder,
        dcp::{self, Item},
    },
    source::{ReadAt as _, Section},
    stamp::FileStamp,
    tensor::Tensor,
};
use std::path::Path;

/// Prints what the folder at `path` holds, which was opened as `checkpoint`.
pub(super) fn print(
    checkpoint: &Checkpoint,
    path: &Path,
    options: &OpenOptions,
    writer: &mut Writer<'_>,
) -> Result<()> {
    let mut items = dcp::items(path, checkpoint.tensors.len(), options)?;
    let folder = Folder::new(path, options);
    // Inside a value, the path goes on by itself.
    let inside = &OpenOptions { root: None, ..options.clone() };
    if let Some(wanted) = root::path_of(options) {
        let rest_of = |item: &Item| wanted.strip_prefix(name_of(item, checkpoint)).map(str::to_owned);
        let is_it = |item: &&Item| match item {
            Item::Tensor(_) => rest_of(item).is_some_and(|it| it.is_empty()),
            Item::Object { .. } => rest_of(item).is_some_and(|it| it.is_empty() || it.starts_with('.')),
        };
        if let Some(item) = items.iter().find(is_it) {
            let rest = rest_of(item).and_then(|it| it.strip_prefix('.').map(str::to_owned));
            let inside = &OpenOptions { root: rest.map(Root::At), ..options.clone() };
            print_item(item, checkpoint, &folder, (0, inside), writer)?;
            writer.text.push('\n');
            return Ok(());
        }
        let names: Vec<&str> = items.iter().map(|it| name_of(it, checkpoint)).collect();
        let below = format!("{wanted}.");
        if !names.iter().any(|it| it.starts_with(&below)) {
            return Err(root::missing_among(wanted, names.into_iter()).in_file(path));
        }
        items.retain(|it| name_of(it, checkpoint).starts_with(&below));
    }
    let json = writer.style.json;
    // As the dictionary that was saved, whose keys are all strings.
    let is_plain = |item: &Item| !name_of(item, checkpoint).starts_with('$');
    let node = Node::Dict { items: &[], is_object: items.iter().all(is_plain) };
    let frame = Frame { node, next: 0, is_inline: false, is_numbered: false, indent: 0 };
    match json {
        true => json::open(&frame.node, &mut writer.text),
        false => text::open(&frame.node, &mut writer.text),
    }
    for (index, item) in items.iter().enumerate() {
        if index == writer.style.max_items() {
            let n_more = items.len() - index;
            match json {
                true => json::cut(&frame.node, n_more, &mut writer.text),
                false => text::cut(&frame, n_more, &mut writer.text),
            }
            break;
        }
        let name = name_of(item, checkpoint);
        match json {
            true => json::before_name(&frame.node, index, name, &mut writer.text),
            false => text::before_name(&frame, name, &mut writer.text),
        }
        print_item(item, checkpoint, &folder, (1, inside), writer)?;
        if json {
            json::after(&frame.node, &mut writer.text);
        }
        writer.flush(PIECE_BYTES)?;
    }
    match json {
        true => json::close(&frame.node, &mut writer.text),
        false => text::close(&frame, &mut writer.text),
    }
    writer.text.push('\n');
    Ok(())
}

/// Prints what an item is, indented so far; of what is no tensor, what the options say.
fn print_item(
    item: &Item,
    checkpoint: &Checkpoint,
    folder: &Folder<'_>,
    (indent, options): (usize, &OpenOptions),
    writer: &mut Writer<'_>,
) -> Result<()> {
    match item {
        Item::Tensor(id) => {
            print_tensor(checkpoint.tensor(*id), writer);
            Ok(())
        }
        Item::Object { name, file, bytes } => {
            let source = folder.open(file)?;
            let section = Section::new(&source, bytes.clone())?;
            let stamp = FileStamp { len_bytes: section.len_bytes(), ..source.stamp().clone() };
            let printed = print_file(&section, stamp, Some(indent), options, writer)
                .map_err(|error| dcp::further(error, bytes.start));
            printed.and_then(|it| it).map_err(|error| error.in_tensor(name).in_file(source.path()))
        }
    }
}

fn name_of<'a>(item: &'a Item, checkpoint: &'a Checkpoint) -> &'a str {
    match item {
        Item::Tensor(id) => &checkpoint.tensor(*id).name,
        Item::Object { name, .. } => name,
    }
}

fn print_tensor(tensor: &Tensor, writer: &mut Writer<'_>) {
    let title = Title::of(&tensor.layout, vec![&tensor.name]);
    let head = Head::Tensor(Box::new(title));
    match writer.style.json {
        true => {
            writer.text.push('{');
            json::title(&head, &mut writer.text);
            writer.text.push('}');
        }
        false => text::title(&head, &mut writer.text),
    }
}
