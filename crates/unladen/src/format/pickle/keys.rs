//! Keys of dictionaries as parts of names.

use super::{
    arena::{Arena, Value, Wide},
    symbol::Meaning,
};
use crate::format::latin1;
use std::fmt::Write as _;

/// A tuple that is a key is not written out further than this.
const MAX_TUPLE_BYTES: usize = 4096;

impl Arena<'_> {
    /// Appends a key of a dictionary as a part of a name.
    pub(crate) fn push_key(&self, key: Value, name: &mut String) {
        // Writing to a string cannot fail.
        let _ = match key {
            Value::Str(text) => {
                name.push_str(&self.text(text));
                Ok(())
            }
            Value::Bytes(text) => {
                push_bytes(self.bytes(text), name);
                Ok(())
            }
            Value::Int(Wide(number)) => write!(name, "{number}"),
            Value::Bool(true) => write!(name, "True"),
            Value::Bool(false) => write!(name, "False"),
            Value::None => write!(name, "None"),
            Value::Float(Wide(number)) => write!(name, "{number:?}"),
            Value::Tuple(run) => {
                let start_bytes = name.len();
                name.push('(');
                for (index, &item) in self.run(run).iter().enumerate() {
                    name.push_str(if index == 0 { "" } else { ", " });
                    // One long string may stand in it many times.
                    if name.len() - start_bytes > MAX_TUPLE_BYTES {
                        name.push_str("..");
                        break;
                    }
                    match item {
                        // One level is what keys are made of; more could go on for ever.
                        Value::Tuple(_) => name.push_str("(..)"),
                        item => self.push_key(item, name),
                    }
                }
                name.push(')');
                Ok(())
            }
            Value::Symbol(symbol) => write!(name, "<{}>", self.symbols[symbol as usize]),
            key => match self.encoded(key) {
                Some(bytes) => {
                    push_bytes(&bytes, name);
                    Ok(())
                }
                None => write!(name, "<object>"),
            },
        };
    }

    /// True for keys that are text or bytes.
    pub(crate) fn is_text_key(&self, key: Value) -> bool {
        matches!(key, Value::Str(_) | Value::Bytes(_)) || self.encoded(key).is_some()
    }

    /// Bytes as the protocols write them that have none: text, a character of Latin-1 for each.
    pub(crate) fn encoded(&self, value: Value) -> Option<Vec<u8>> {
        let Value::Call(call) = value else { return None };
        let call = &self.calls[call as usize];
        match (self.meaning(call.function), self.run(call.args)) {
            (Meaning::Encode, &[Value::Str(letters), Value::Str(encoding) | Value::Bytes(encoding)])
                if latin1::is_name(self.bytes(encoding)) =>
            {
                let letters = std::str::from_utf8(self.bytes(letters)).ok()?;
                letters.chars().map(|it| u8::try_from(it).ok()).collect()
            }
            (Meaning::ByteArray, []) => Some(Vec::new()),
            _ => None,
        }
    }
}

/// Appends bytes that are a name: UTF-8, or what Python 2 wrote, which is Latin-1.
fn push_bytes(bytes: &[u8], name: &mut String) {
    match std::str::from_utf8(bytes) {
        Ok(text) => name.push_str(text),
        Err(_) => name.extend(bytes.iter().map(|&byte| char::from(byte))),
    }
}
