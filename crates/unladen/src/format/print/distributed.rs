//! The tree of a distributed checkpoint: its state dict, flat as it is stored. Tensors come from the metadata, everything
//! else from an archive of its own in one of the files.

use super::{
    Frame, PIECE_BYTES, Writer, json,
    node::{Head, Node, Title},
    print_file, text,
};
use crate::{
    checkpoint::Checkpoint,
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
    let items = dcp::items(path, checkpoint.tensors.len(), options)?;
    let folder = Folder::new(path, options);
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
        match item {
            Item::Tensor(id) => print_tensor(checkpoint.tensor(*id), writer),
            Item::Object { file, bytes, .. } => {
                let source = folder.open(file)?;
                let section = Section::new(&source, bytes.clone())?;
                let stamp = FileStamp { len_bytes: section.len_bytes(), ..source.stamp().clone() };
                print_file(&section, stamp, true, options, writer).map_err(|error| {
                    dcp::further(error, bytes.start).in_tensor(name).in_file(source.path())
                })?;
            }
        }
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

fn name_of<'a>(item: &'a Item, checkpoint: &'a Checkpoint) -> &'a str {
    match item {
        Item::Tensor(id) => &checkpoint.tensor(*id).name,
        Item::Object { name, .. } => name,
    }
}

fn print_tensor(tensor: &Tensor, writer: &mut Writer<'_>) {
    let title = Title {
        is_whole: false,
        what: tensor.layout.dtype().to_string(),
        shape: tensor.layout.shape().into(),
        names: vec![&tensor.name],
    };
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
