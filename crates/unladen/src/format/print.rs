//! Prints everything that stands in a checkpoint's metadata, tensors by their names, as text or as JSON. Iterative: what is
//! shared is printed once and referred to, long and deep things are cut and counted.

mod distributed;
mod json;
mod metadata;
mod node;
mod numpy;
mod root;
mod text;

use super::{
    OpenOptions, open,
    rebuild::Visits,
    safetensors,
    sniff::{self, Container},
    tree::{self as listing, Listing},
    whole::Contents,
    with_contents,
};
use crate::{
    checkpoint::{Format, Root},
    error::{Error, Result},
    source::ReadAt,
    stamp::FileStamp,
};
use foldhash::{HashMap, HashMapExt as _};
use node::{Child, Node, Reader};
use root::Place;
use std::path::Path;

/// How [`tree`] writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TreeStyle {
    /// JSON in the place of text. What JSON lacks is an object whose keys start with `$`.
    pub json: bool,
    /// Cut nothing, however long it is.
    pub full: bool,
}

impl TreeStyle {
    /// Items of a container that are printed.
    fn max_items(self) -> usize {
        if self.full { usize::MAX } else { 20 }
    }

    /// Bytes of a string that are printed.
    fn max_text_bytes(self) -> usize {
        if self.full { usize::MAX } else { 200 }
    }

    /// Containers inside containers that are printed.
    fn max_depth(self, limit: usize) -> usize {
        if self.full { limit } else { limit.min(16) }
    }
}

/// What is written at once.
const PIECE_BYTES: usize = 32 << 10;
/// Bytes of text that cost as much as a visited value.
const TEXT_BYTES_PER_VISIT: usize = 8;

/// Passes a checkpoint's tree to `out`, piece after piece: what stands beside the tensors, such as epochs,
/// hyper-parameters and optimizer settings, and where the tensors stand in it. Of a safetensors file, its free metadata.
///
/// Of a distributed checkpoint it is one tree of the names in its state dict, each a tensor, or what is no tensor.
/// Another checkpoint of several files is several trees, each after its file's name; as JSON, one object of them. If the
/// options name a root, what stands at that path alone, whatever it is, of the files that have it. Nothing that a file
/// names is run.
///
/// Fails as [`open`] does, with [`Error::Mismatch`] if nothing stands at the root, and with the error that `out` returns.
pub fn tree(
    path: &Path,
    options: &OpenOptions,
    style: TreeStyle,
    out: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<()> {
    let (checkpoint, files) = open(path, &OpenOptions { root: None, ..options.clone() })?;
    let root = match &options.root {
        Some(Root::Auto) => checkpoint.root().map(|it| Root::At(it.to_owned())),
        root => root.clone(),
    };
    let options = &OpenOptions { root, ..options.clone() };
    let mut writer = Writer { style, text: String::new(), out };
    if checkpoint.format == Format::Dcp {
        distributed::print(&checkpoint, &checkpoint.path, options, &mut writer)?;
        return writer.flush(0);
    }
    // Packed records hold tensors alone.
    let files_of_its_own = || checkpoint.files.iter().enumerate().filter(|(_, it)| it.packed.is_none());
    let is_one = files_of_its_own().nth(1).is_none();
    let (mut n_printed, mut missing) = (0, None);
    for (index, file) in files_of_its_own() {
        let name = file.path.display().to_string();
        let before_bytes = writer.text.len();
        if !is_one && style.json {
            writer.text.push(if n_printed == 0 { '{' } else { ',' });
            json::string(name.as_bytes(), &mut writer.text);
            writer.text.push(':');
        } else if !is_one {
            writer.text.extend([&*name.escape_debug().to_string(), ":\n"]);
        }
        let source = files.get(index)?;
        let printed = print_file(&*source, file.clone(), None, options, &mut writer)
            .map_err(|error| error.in_file(&file.path))?;
        if let Err(error) = printed {
            writer.text.truncate(before_bytes);
            missing.get_or_insert(error.in_file(&file.path));
            continue;
        }
        n_printed += 1;
        if !style.json {
            writer.text.push('\n');
        }
    }
    if let (0, Some(error)) = (n_printed, missing) {
        return Err(error);
    }
    if style.json {
        writer.text.push_str(if is_one { "\n" } else { "}\n" });
    }
    writer.flush(0)
}

/// Nothing, or why nothing was printed: there is nothing at the path that is asked for.
type Printed = std::result::Result<(), Error>;

/// Prints what a file holds, or (`part`, with how far it is indented) what a part of one holds that is a file by itself.
fn print_file(
    source: &dyn ReadAt,
    stamp: FileStamp,
    part: Option<usize>,
    options: &OpenOptions,
    writer: &mut Writer<'_>,
) -> Result<Printed> {
    let head = sniff::head(source)?;
    match sniff::sniff(source, &head, &options.limits)? {
        Container::Pickled(kind) => {
            with_contents(kind, source, stamp, options, |contents| print(&contents, part, options, writer))
        }
        Container::Safetensors => {
            Ok(metadata::print(&safetensors::metadata(source, options)?, root::path_of(options), writer))
        }
    }
}

/// Prints what a pickle holds; that of a part is indented, and its tensors are not listed.
fn print(
    contents: &Contents<'_>,
    part: Option<usize>,
    options: &OpenOptions,
    writer: &mut Writer<'_>,
) -> Result<Printed> {
    let rebuild = contents.rebuild();
    let listed = match part {
        Some(_) => Listing::default(),
        None => listing::list(&rebuild, contents.root, &options.limits, &mut Vec::new())?,
    };
    let top = Child::Value(contents.root);
    let (root, among) = match root::path_of(options) {
        None => (top, Vec::new()),
        Some(path) => match root::find(&mut Reader::new(&rebuild, &listed, &[]), top, path)? {
            Ok(Place::At(child)) => (child, Vec::new()),
            Ok(Place::Among(items)) => (Child::Among, items),
            Err(error) => return Ok(Err(error)),
        },
    };
    let mut reader = Reader::new(&rebuild, &listed, &among);
    let shared = shared(&mut reader, root)?;
    let printer = Printer {
        reader,
        shared,
        numbers: HashMap::new(),
        frames: Vec::new(),
        indent: part.unwrap_or(0),
        max_depth: writer.style.max_depth(options.limits.depth),
        visits: Visits::new(contents.arena.bytes.len()),
        writer,
    };
    printer.run(root)?;
    Ok(Ok(()))
}

/// Which containers are met more than once, by their identity.
fn shared(reader: &mut Reader<'_>, root: Child) -> Result<Vec<bool>> {
    let n_identities = reader.arena.n_identities();
    let (mut seen, mut shared) = (vec![false; n_identities], vec![false; n_identities]);
    let mut waiting = vec![(reader.node(root)?, 0)];
    if let Some(identity) = reader.identity(root) {
        seen[identity] = true;
    }
    while let Some((node, next)) = waiting.last_mut() {
        let Some((_, child)) = node.get(*next) else {
            waiting.pop();
            continue;
        };
        *next += 1;
        if let Some(identity) = reader.identity(child) {
            shared[identity] |= seen[identity];
            if std::mem::replace(&mut seen[identity], true) {
                continue;
            }
        } else if !child.is_container() {
            continue;
        }
        waiting.push((reader.node(child)?, 0));
    }
    Ok(shared)
}

/// Collects pieces.
struct Writer<'o> {
    style: TreeStyle,
    text: String,
    out: &'o mut dyn FnMut(&str) -> Result<()>,
}

impl Writer<'_> {
    /// Passes on what is there, if it is more than this.
    fn flush(&mut self, min_bytes: usize) -> Result<()> {
        if self.text.len() > min_bytes {
            (self.out)(&self.text)?;
            self.text.clear();
        }
        Ok(())
    }
}

/// A container that is being printed.
struct Frame<'a> {
    node: Node<'a>,
    next: usize,
    /// It stands in one line.
    is_inline: bool,
    /// It is wrapped in an object that gives it a number.
    is_numbered: bool,
    /// How far its own lines are indented; its children's are once more.
    indent: usize,
}

struct Printer<'a, 'w, 'o> {
    reader: Reader<'a>,
    shared: Vec<bool>,
    /// The numbers of shared containers that were printed, by identity.
    numbers: HashMap<usize, usize>,
    frames: Vec<Frame<'a>>,
    /// How far the outermost container is indented.
    indent: usize,
    max_depth: usize,
    /// Text may be referred to many times, and is printed each time.
    visits: Visits,
    writer: &'w mut Writer<'o>,
}

impl Printer<'_, '_, '_> {
    fn run(mut self, root: Child) -> Result<()> {
        self.begin(root)?;
        while let Some(frame) = self.frames.last_mut() {
            let style = self.writer.style;
            let (index, n_children) = (frame.next, frame.node.len());
            frame.next += 1;
            // A tensor or an object has few fields, and none is cut.
            let is_cut = index >= style.max_items() && !matches!(frame.node, Node::Fields(..));
            let before_bytes = self.writer.text.len();
            let text = &mut self.writer.text;
            if style.json && index > 0 {
                json::after(&frame.node, text);
            }
            match frame.node.get(index) {
                Some((label, child)) if !is_cut => {
                    match style.json {
                        true => json::before(&frame.node, index, &label, self.reader.arena, text),
                        false => text::before(frame, index, &label, self.reader.arena, text),
                    }
                    let n_bytes = self.writer.text.len() - before_bytes;
                    self.visits.spend((n_bytes / TEXT_BYTES_PER_VISIT) as u64)?;
                    self.begin(child)?;
                }
                rest => {
                    if rest.is_some() {
                        let n_more = n_children - index;
                        match style.json {
                            true => json::cut(&frame.node, n_more, text),
                            false => text::cut(frame, n_more, text),
                        }
                    }
                    match style.json {
                        true => json::close(&frame.node, text),
                        false => text::close(frame, text),
                    }
                    if style.json && frame.is_numbered {
                        text.push('}');
                    }
                    self.frames.pop();
                }
            }
            self.writer.flush(PIECE_BYTES)?;
        }
        Ok(())
    }

    /// Prints a value, or its beginning.
    fn begin(&mut self, child: Child) -> Result<()> {
        let json = self.writer.style.json;
        let identity = self.reader.identity(child);
        let number = identity.filter(|it| self.shared[*it]);
        if let Some(number) = number.and_then(|it| self.numbers.get(&it)) {
            let text = &mut self.writer.text;
            text.push_str(&if json { format!("{{\"$ref\":{number}}}") } else { format!("*{number}") });
            return Ok(());
        }
        if let Some(identity) = number {
            let number = self.numbers.len() + 1;
            self.numbers.insert(identity, number);
            let text = &mut self.writer.text;
            text.push_str(&match json {
                true => format!("{{\"$shared\":{number},\"$value\":"),
                false => format!("&{number} "),
            });
        }
        let node = self.reader.node(child)?;
        let before_bytes = self.writer.text.len();
        let text = &mut self.writer.text;
        let is_too_deep = self.frames.len() >= self.max_depth;
        if node.len() == 0 || is_too_deep {
            match json {
                true => json::whole(&node, self.reader.arena, self.writer.style, is_too_deep, text),
                false => text::whole(&node, self.reader.arena, self.writer.style, is_too_deep, text),
            }
            if json && number.is_some() {
                text.push('}');
            }
            let n_bytes = self.writer.text.len() - before_bytes;
            return self.visits.spend((n_bytes / TEXT_BYTES_PER_VISIT) as u64);
        }
        let parent = self.frames.last();
        let indent = parent.map_or(self.indent, |it| it.indent + usize::from(it.indents()));
        let is_inline = text::fits_a_line(&node, self.reader.arena);
        match json {
            true => json::open(&node, text),
            false => text::open(&node, text),
        }
        let n_bytes = self.writer.text.len() - before_bytes;
        self.visits.spend((n_bytes / TEXT_BYTES_PER_VISIT) as u64)?;
        let is_numbered = number.is_some();
        self.frames.push(Frame { node, next: 0, is_inline, is_numbered, indent });
        Ok(())
    }
}

impl Frame<'_> {
    /// True if its children stand in lines of their own.
    fn indents(&self) -> bool {
        !self.is_inline && !self.node.is_glued()
    }
}

#[cfg(test)]
mod tests;
