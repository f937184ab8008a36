//! A tree as JSON. Dictionaries whose keys are all strings are objects, lists are arrays; what JSON lacks is an object
//! whose keys start with `$`: `{"$tuple": [..]}`, `{"$tensor": "float32", "shape": [2, 3], "names": ["w"]}`.

use super::{
    TreeStyle,
    node::{Head, Label, Leaf, Node, Title},
    text::{MAX_BYTES, decimal, float, latin1_bytes, start},
};
use crate::format::pickle::{Arena, Piece, Value, Wide, pieces};
use std::fmt::Write as _;

pub(super) fn open(node: &Node<'_>, text: &mut String) {
    match node {
        Node::Leaf(_) => {}
        Node::List(_) | Node::Args(_) => text.push('['),
        Node::Tuple(_) => text.push_str("{\"$tuple\":["),
        Node::Dict { is_object: true, .. } => text.push('{'),
        Node::Dict { .. } => text.push_str("{\"$dict\":["),
        Node::Fields(head, _) => {
            text.push('{');
            title(head, text);
        }
    }
}

/// What comes before a child.
pub(super) fn before(node: &Node<'_>, index: usize, label: &Label, arena: &Arena<'_>, text: &mut String) {
    if index > 0 || matches!(node, Node::Fields(Head::Object(_) | Head::Tensor(_), _)) {
        text.push(',');
    }
    match (label, node) {
        (Label::Nothing, _) => {}
        (Label::Key(Value::Str(key)), Node::Dict { is_object: true, .. }) => {
            string(arena.bytes(*key), text);
            text.push(':');
        }
        (Label::Key(key), _) => {
            text.push('[');
            leaf(*key, arena, usize::MAX, text);
            text.push(',');
        }
        (Label::Field(field), _) => text.extend(["\"", field.name, "\":"]),
    }
}

/// What comes before a child whose name is no value of the pickle's.
pub(super) fn before_name(node: &Node<'_>, index: usize, name: &str, text: &mut String) {
    let is_object = matches!(node, Node::Dict { is_object: true, .. });
    text.push_str(if index > 0 { "," } else { "" });
    text.push_str(if is_object { "" } else { "[" });
    string(name.as_bytes(), text);
    text.push(if is_object { ':' } else { ',' });
}

/// What comes behind a child.
pub(super) fn after(node: &Node<'_>, text: &mut String) {
    if matches!(node, Node::Dict { is_object: false, .. }) {
        text.push(']');
    }
}

/// Says how many more there are.
pub(super) fn cut(node: &Node<'_>, n_more: usize, text: &mut String) {
    // Writing to a string cannot fail.
    let _ = match node {
        Node::Dict { is_object: true, .. } => write!(text, ",\"$cut\":{n_more}"),
        _ => write!(text, ",{{\"$cut\":{n_more}}}"),
    };
}

pub(super) fn close(node: &Node<'_>, text: &mut String) {
    text.push_str(match node {
        Node::Leaf(_) => "",
        Node::List(_) | Node::Args(_) => "]",
        Node::Tuple(_) | Node::Dict { is_object: false, .. } => "]}",
        Node::Dict { .. } | Node::Fields(..) => "}",
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
    match node {
        Node::Leaf(Leaf::Value(value)) => leaf(*value, arena, style.max_text_bytes(), text),
        Node::Leaf(Leaf::Numbers(numbers)) => numbers.json(style.max_items(), text),
        Node::Leaf(Leaf::Latin1(letters)) => {
            let (first, n_bytes) = latin1_bytes(arena.bytes(*letters));
            hexadecimal("$bytes", &first, n_bytes, text);
        }
        // Writing to a string cannot fail.
        _ if is_too_deep => drop(write!(text, "{{\"$deeper\":{}}}", node.len())),
        _ => {
            open(node, text);
            close(node, text);
        }
    }
}

pub(super) fn title(head: &Head<'_>, text: &mut String) {
    match head {
        Head::Items => {}
        Head::Object(name) => {
            text.push_str("\"$object\":");
            string(name.as_bytes(), text);
        }
        Head::Tensor(title) => {
            let Title { is_whole, what, shape, names } = &**title;
            text.push_str(if *is_whole { "\"$composite\":" } else { "\"$tensor\":" });
            string(what.as_bytes(), text);
            let sizes: Vec<String> = shape.iter().map(u64::to_string).collect();
            // Writing to a string cannot fail.
            let _ = write!(text, ",\"shape\":[{}],\"names\":[", sizes.join(","));
            for (index, name) in names.iter().enumerate() {
                text.push_str(if index == 0 { "" } else { "," });
                string(name.as_bytes(), text);
            }
            text.push(']');
        }
    }
}

/// A value without anything inside, or a key; of a container that is a key, its name.
fn leaf(value: Value, arena: &Arena<'_>, max_bytes: usize, text: &mut String) {
    // Writing to a string cannot fail.
    let _ = match value {
        Value::None => write!(text, "null"),
        Value::Bool(truth) => write!(text, "{truth}"),
        Value::Int(Wide(number)) => write!(text, "{number}"),
        Value::Long(bytes) => match decimal(arena.bytes(bytes)) {
            Some(digits) => write!(text, "{digits}"),
            None => {
                hexadecimal("$integer_bytes", arena.bytes(bytes), arena.bytes(bytes).len(), text);
                Ok(())
            }
        },
        Value::Float(Wide(number)) => match (number.is_finite(), float(number)) {
            (true, digits) => write!(text, "{digits}"),
            (false, word) => write!(text, "{{\"$float\":\"{word}\"}}"),
        },
        Value::Str(letters) => {
            cut_string(arena.bytes(letters), max_bytes, text);
            Ok(())
        }
        Value::Bytes(bytes) => {
            hexadecimal("$bytes", arena.bytes(bytes), arena.bytes(bytes).len(), text);
            Ok(())
        }
        Value::Symbol(symbol) => {
            text.push_str("{\"$symbol\":");
            string(arena.symbols[symbol as usize].to_string().as_bytes(), text);
            text.push('}');
            Ok(())
        }
        other => {
            if let Some(bytes) = arena.encoded(other) {
                hexadecimal("$bytes", &bytes, bytes.len(), text);
            } else {
                let mut name = String::new();
                arena.push_key(other, &mut name);
                text.push_str("{\"$key\":");
                string(name.as_bytes(), text);
                text.push('}');
            }
            Ok(())
        }
    };
}

/// A string, or if it is too long its start and its length.
pub(super) fn cut_string(bytes: &[u8], max_bytes: usize, text: &mut String) {
    let shown = start(bytes, max_bytes);
    if shown.len() == bytes.len() {
        return string(bytes, text);
    }
    text.push_str("{\"$text\":");
    string(shown, text);
    // Writing to a string cannot fail.
    let _ = write!(text, ",\"len_bytes\":{}}}", bytes.len());
}

/// `{"$bytes": 20, "first": "0001.."}`
fn hexadecimal(key: &str, first: &[u8], n_bytes: usize, text: &mut String) {
    let shown: String = first.iter().take(MAX_BYTES).map(|it| format!("{it:02x}")).collect();
    // Writing to a string cannot fail.
    let _ = write!(text, "{{\"{key}\":{n_bytes},\"first\":\"{shown}\"}}");
}

/// A string of JSON. A lone surrogate is what Python's own writer makes of it; a byte that is no UTF-8 is taken as the
/// letter of its number, as Python 2 wrote them.
pub(super) fn string(bytes: &[u8], text: &mut String) {
    text.push('"');
    for piece in pieces(bytes) {
        // Writing to a string cannot fail.
        let _ = match piece {
            Piece::Text(valid) => {
                for it in valid.chars() {
                    match it {
                        '"' => text.push_str("\\\""),
                        '\\' => text.push_str("\\\\"),
                        it if it.is_control() => drop(write!(text, "\\u{:04x}", u32::from(it))),
                        it => text.push(it),
                    }
                }
                Ok(())
            }
            Piece::Surrogate(unit) => write!(text, "\\u{unit:04x}"),
            Piece::Byte(byte) => write!(text, "\\u{byte:04x}"),
        };
    }
    text.push('"');
}
