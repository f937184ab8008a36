//! The free metadata of a safetensors file, which are strings.

use super::{Printed, Writer, json, root, text};
use std::collections::BTreeMap;

const NAME: &str = "__metadata__";

/// Prints them all, or what stands at a path: `__metadata__.format`.
pub(super) fn print(
    metadata: &BTreeMap<String, String>,
    path: Option<&str>,
    writer: &mut Writer<'_>,
) -> Printed {
    let style = writer.style;
    let names = || metadata.keys().map(|it| format!("{NAME}.{it}")).collect::<Vec<_>>();
    let missing = |path| Err(root::missing_among(path, names().iter().map(String::as_str)));
    let below_name = |path: &str| path.strip_prefix(NAME)?.strip_prefix('.').map(str::to_owned);
    let (key, indent) = match path {
        None => (None, 1),
        Some(NAME) => (None, 0),
        Some(path) => match below_name(path) {
            Some(key) => (Some(key), 0),
            None => return missing(path),
        },
    };
    if let Some(value) = key.as_ref().and_then(|it| metadata.get(it)) {
        match style.json {
            true => json::cut_string(value.as_bytes(), style.max_text_bytes(), &mut writer.text),
            false => text::string(value.as_bytes(), style.max_text_bytes(), &mut writer.text),
        }
        return Ok(());
    }
    let below = key.map(|it| format!("{it}."));
    let is_below = |name: &str| below.as_ref().is_none_or(|it| name.starts_with(it.as_str()));
    let mut items = metadata.iter().filter(|(name, _)| is_below(name)).peekable();
    if let (Some(_), Some(path), None) = (&below, path, items.peek()) {
        return missing(path);
    }
    let margin = "  ".repeat(indent);
    let text = &mut writer.text;
    text.push_str(match (style.json, indent) {
        (true, 0) | (false, 0) => "{",
        (true, _) => "{\"__metadata__\":{",
        (false, _) => "{\n  '__metadata__': {",
    });
    for (index, (key, value)) in items.enumerate() {
        if style.json {
            text.push_str(if index == 0 { "" } else { "," });
            json::string(key.as_bytes(), text);
            text.push(':');
            json::cut_string(value.as_bytes(), style.max_text_bytes(), text);
        } else {
            text.extend(["\n  ", &margin]);
            text::string(key.as_bytes(), usize::MAX, text);
            text.push_str(": ");
            text::string(value.as_bytes(), style.max_text_bytes(), text);
        }
    }
    match style.json {
        true => text.push_str(if indent == 0 { "}" } else { "}}" }),
        false => text.extend(["\n", &margin, if indent == 0 { "}" } else { "}\n}" }]),
    }
    Ok(())
}
