//! A tree as people read it: Python's words for values, a line for each where they do not fit one. Nothing of the file can
//! steer a terminal: what is not plain is escaped.

use super::{
    Frame, TreeStyle,
    node::{Head, Label, Leaf, Node, Title},
};
use crate::format::pickle::{Arena, Piece, Value, Wide, pieces};
use std::fmt::Write as _;

/// Items that may stand in one line, and bytes of a string among them.
const MAX_INLINE: usize = 12;
const MAX_INLINE_TEXT: u32 = 24;
/// Deeper lines are indented no further: a thousand lists inside each other would be mostly blanks.
const MAX_INDENT: usize = 40;
/// Bytes that are shown of bytes.
pub(super) const MAX_BYTES: usize = 16;
/// Larger integers are shown as their bytes: turning them into digits takes the square of their length.
const MAX_INTEGER_BYTES: usize = 1024;

/// True if the values are few and short.
pub(super) fn fits_a_line(node: &Node<'_>, arena: &Arena<'_>) -> bool {
    let is_short = |value: Value| match value {
        Value::Str(text) | Value::Bytes(text) => arena.bytes(text).len() as u32 <= MAX_INLINE_TEXT,
        Value::None | Value::Bool(_) | Value::Int(_) | Value::Float(_) | Value::Symbol(_) => true,
        Value::Tuple(run) => run.len == 0,
        _ => false,
    };
    match node {
        Node::Leaf(_) => true,
        Node::List(items) | Node::Tuple(items) | Node::Args(items) => {
            items.len() <= MAX_INLINE && items.iter().all(|&it| is_short(it))
        }
        Node::Dict { items, .. } => {
            items.len() <= 1 && items.iter().all(|&(key, it)| is_short(key) && is_short(it))
        }
        Node::Fields(..) => false,
    }
}

pub(super) fn open(node: &Node<'_>, text: &mut String) {
    match node {
        Node::Leaf(_) | Node::Fields(Head::Items, _) => {}
        Node::List(_) => text.push('['),
        Node::Tuple(_) | Node::Args(_) => text.push('('),
        Node::Dict { .. } => text.push('{'),
        Node::Fields(head, _) => {
            title(head, text);
            if !node.is_glued() {
                text.push_str(" {");
            }
        }
    }
}

/// What comes before a child.
pub(super) fn before(frame: &Frame<'_>, index: usize, label: &Label, arena: &Arena<'_>, text: &mut String) {
    if !frame.node.is_glued() {
        if !frame.is_inline {
            new_line(frame.indent + 1, text);
        } else if index > 0 {
            text.push_str(", ");
        }
    }
    match label {
        Label::Nothing => {}
        Label::Key(key) => {
            leaf_or_key(*key, arena, usize::MAX, text);
            text.push_str(": ");
        }
        Label::Field(field) if frame.node.is_glued() => text.push_str(field.glue),
        Label::Field(field) => text.extend([field.name, ": "]),
    }
}

/// What comes before a child whose name is no value of the pickle's.
pub(super) fn before_name(frame: &Frame<'_>, name: &str, text: &mut String) {
    new_line(frame.indent + 1, text);
    string(name.as_bytes(), usize::MAX, text);
    text.push_str(": ");
}

/// Says how many more there are.
pub(super) fn cut(frame: &Frame<'_>, n_more: usize, text: &mut String) {
    if frame.is_inline {
        text.push_str(", ");
    } else {
        new_line(frame.indent + 1, text);
    }
    // Writing to a string cannot fail.
    let _ = write!(text, "... {n_more} more");
}

pub(super) fn close(frame: &Frame<'_>, text: &mut String) {
    if frame.node.is_glued() {
        return;
    }
    if !frame.is_inline {
        new_line(frame.indent, text);
    }
    text.push_str(match &frame.node {
        Node::List(_) => "]",
        Node::Tuple(items) if items.len() == 1 && frame.is_inline => ",)",
        Node::Tuple(_) | Node::Args(_) => ")",
        _ => "}",
    });
}

/// A node whose inside is not printed: it has none, or it is too deep.
pub(super) fn whole(
    node: &Node<'_>,
    arena: &Arena<'_>,
    style: TreeStyle,
    is_too_deep: bool,
    text: &mut String,
) {
    let inside = if is_too_deep { "..." } else { "" };
    match node {
        Node::Leaf(Leaf::Value(value)) => leaf_or_key(*value, arena, style.max_text_bytes(), text),
        Node::Leaf(Leaf::Numbers(numbers)) => numbers.text(style.max_items(), text),
        Node::Leaf(Leaf::Latin1(letters)) => {
            let (first, n_bytes) = latin1_bytes(arena.bytes(*letters));
            hexadecimal(&first, n_bytes, text);
        }
        Node::List(_) => text.extend(["[", inside, "]"]),
        Node::Tuple(_) | Node::Args(_) => text.extend(["(", inside, ")"]),
        Node::Dict { .. } | Node::Fields(Head::Items, _) => text.extend(["{", inside, "}"]),
        Node::Fields(head, _) => {
            title(head, text);
            if is_too_deep {
                text.push_str(" ...");
            }
        }
    }
}

pub(super) fn title(head: &Head<'_>, text: &mut String) {
    match head {
        Head::Items => {}
        Head::Object(name) => text.extend(name.escape_debug()),
        Head::Tensor(title) => {
            let Title { is_whole, what, shape, names } = &**title;
            text.push_str(if *is_whole { "" } else { "tensor " });
            text.extend(what.escape_debug());
            // Writing to a string cannot fail.
            let _ = write!(text, " {shape:?}");
            for (index, name) in names.iter().enumerate() {
                let _ = write!(text, "{}`{}`", if index == 0 { " " } else { ", " }, name.escape_debug());
            }
            if names.is_empty() && !is_whole {
                text.push_str(" (not listed)");
            }
        }
    }
}

fn new_line(indent: usize, text: &mut String) {
    text.push('\n');
    (0..indent.min(MAX_INDENT)).for_each(|_| text.push_str("  "));
}

/// A value without anything inside, or a key; of a container that is a key, its name.
fn leaf_or_key(value: Value, arena: &Arena<'_>, max_bytes: usize, text: &mut String) {
    // Writing to a string cannot fail.
    let _ = match value {
        Value::None => write!(text, "None"),
        Value::Bool(true) => write!(text, "True"),
        Value::Bool(false) => write!(text, "False"),
        Value::Int(Wide(number)) => write!(text, "{number}"),
        Value::Long(bytes) => match decimal(arena.bytes(bytes)) {
            Some(digits) => write!(text, "{digits}"),
            None => {
                text.push_str("an integer, ");
                hexadecimal(arena.bytes(bytes), arena.bytes(bytes).len(), text);
                Ok(())
            }
        },
        Value::Float(Wide(number)) => write!(text, "{}", float(number)),
        Value::Str(letters) => {
            string(arena.bytes(letters), max_bytes, text);
            Ok(())
        }
        Value::Bytes(place) => {
            bytes(arena.bytes(place), max_bytes, text);
            Ok(())
        }
        Value::Symbol(symbol) => {
            text.extend(arena.symbols[symbol as usize].to_string().escape_debug());
            Ok(())
        }
        other => match arena.encoded(other) {
            Some(encoded) => {
                bytes(&encoded, max_bytes, text);
                Ok(())
            }
            None => {
                let mut name = String::new();
                arena.push_key(other, &mut name);
                write!(text, "{}", name.escape_debug())
            }
        },
    };
}

/// Bytes as Python writes them; many, or such as are no letters, by their number and the first of them.
fn bytes(bytes: &[u8], max_bytes: usize, text: &mut String) {
    match bytes.iter().all(|it| (b' '..=b'~').contains(it)) && bytes.len() <= max_bytes.min(200) {
        // Writing to a string cannot fail.
        true => drop(write!(text, "b'{}'", bytes.escape_ascii())),
        false => hexadecimal(bytes, bytes.len(), text),
    }
}

/// The shortest digits that give the same number again.
pub(super) fn float(number: f64) -> String {
    if number.is_nan() { "nan".to_owned() } else { format!("{number:?}") }
}

/// A string in Python's quotes.
pub(super) fn string(bytes: &[u8], max_bytes: usize, text: &mut String) {
    let shown = start(bytes, max_bytes);
    text.push('\'');
    for piece in pieces(shown) {
        // Writing to a string cannot fail.
        let _ = match piece {
            Piece::Text(valid) => {
                text.extend(valid.chars().flat_map(|it| {
                    // Python's quotes are single ones.
                    let plain = (it == '"').then_some(it);
                    plain.into_iter().chain(it.escape_debug().filter(move |_| plain.is_none()))
                }));
                Ok(())
            }
            Piece::Surrogate(unit) => write!(text, "\\u{unit:04x}"),
            Piece::Byte(byte) => write!(text, "\\x{byte:02x}"),
        };
    }
    text.push('\'');
    if shown.len() < bytes.len() {
        let _ = write!(text, "... ({} bytes)", bytes.len());
    }
}

/// The first bytes, no letter cut in two.
pub(super) fn start(bytes: &[u8], max_bytes: usize) -> &[u8] {
    let mut end = bytes.len().min(max_bytes);
    while end < bytes.len() && end > 0 && bytes[end] & 0xC0 == 0x80 {
        end -= 1;
    }
    &bytes[..end]
}

/// `20 bytes: 00 01 ...`, of which the first are these.
fn hexadecimal(first: &[u8], n_bytes: usize, text: &mut String) {
    let shown: Vec<String> = first.iter().take(MAX_BYTES).map(|it| format!("{it:02x}")).collect();
    let more = if n_bytes > MAX_BYTES { " ..." } else { "" };
    // Writing to a string cannot fail.
    let _ = write!(text, "{n_bytes} bytes: {}{more}", shown.join(" "));
}

/// The first bytes of those that were written as letters, and how many they are.
pub(super) fn latin1_bytes(letters: &[u8]) -> (Vec<u8>, usize) {
    let first = String::from_utf8_lossy(start(letters, 4 * MAX_BYTES));
    let first = first.chars().take(MAX_BYTES).map(|it| u8::try_from(u32::from(it)).unwrap_or(b'?')).collect();
    // Each letter has one byte that does not continue another.
    (first, letters.iter().filter(|it| **it & 0xC0 != 0x80).count())
}

/// The digits of a little-endian integer; `None` if that would take too long.
pub(super) fn decimal(bytes: &[u8]) -> Option<String> {
    if bytes.len() > MAX_INTEGER_BYTES {
        return None;
    }
    let is_negative = bytes.last().is_some_and(|it| it & 0x80 != 0);
    // The magnitude, least byte first.
    let mut carry = is_negative;
    let magnitude = bytes.iter().map(|&byte| {
        if !is_negative {
            return byte;
        }
        let (sum, over) = (!byte).overflowing_add(u8::from(carry));
        carry = over;
        sum
    });
    let magnitude: Vec<u8> = magnitude.collect();
    // Groups of nine digits, least first.
    let mut groups: Vec<u64> = vec![0];
    for byte in magnitude.into_iter().rev() {
        let mut carry = u64::from(byte);
        for group in &mut groups {
            let sum = *group * 256 + carry;
            (*group, carry) = (sum % 1_000_000_000, sum / 1_000_000_000);
        }
        if carry > 0 {
            groups.push(carry);
        }
    }
    let mut digits = if is_negative { "-".to_owned() } else { String::new() };
    let mut groups = groups.into_iter().rev();
    digits.push_str(&groups.next().unwrap_or_default().to_string());
    groups.for_each(|it| digits.push_str(&format!("{it:09}")));
    Some(digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_of_any_size_have_their_digits() {
        assert_eq!(decimal(&[0, 1]).unwrap(), "256");
        assert_eq!(decimal(&[0xFF]).unwrap(), "-1");
        assert_eq!(decimal(&[0x80]).unwrap(), "-128");
        assert_eq!(decimal(&2i128.pow(70).to_le_bytes()).unwrap(), 2i128.pow(70).to_string());
        assert_eq!(decimal(&(-(10i128.pow(30))).to_le_bytes()).unwrap(), format!("-1{}", "0".repeat(30)));
        assert_eq!(decimal(&[0; 2000]), None);
    }

    #[test]
    fn bytes_that_were_written_as_letters_are_counted_as_bytes() {
        assert_eq!(latin1_bytes("aÿ".as_bytes()), (vec![b'a', 255], 2));
        let (first, n_bytes) = latin1_bytes("ÿ".repeat(20).as_bytes());
        let mut text = String::new();
        hexadecimal(&first, n_bytes, &mut text);
        assert_eq!(text, format!("20 bytes: {}...", "ff ".repeat(16)));
    }

    #[test]
    fn a_cut_string_ends_with_a_whole_letter() {
        assert_eq!(start("aÿb".as_bytes(), 2), b"a");
        assert_eq!(start("aÿb".as_bytes(), 3), "aÿ".as_bytes());
    }
}
