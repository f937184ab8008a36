//! Tensor names as file names: percent-encoding, so that no name can leave the folder or collide with another.

use std::fmt::Write as _;

/// The file stem for a tensor's name: `/`, NUL, control bytes, `%` and a leading `.` become `%XX`.
///
/// An empty name becomes `%`, which no other name does.
pub fn encode_file_name(name: &str) -> String {
    if name.is_empty() {
        return "%".to_owned();
    }
    let mut encoded = String::with_capacity(name.len());
    for (index, it) in name.char_indices() {
        if matches!(it, '/' | '\\' | '%') || it.is_ascii_control() || (it == '.' && index == 0) {
            // Every character of this list is one byte long.
            let _ = write!(encoded, "%{:02X}", u32::from(it));
        } else {
            encoded.push(it);
        }
    }
    encoded
}

/// The tensor's name for a file stem. A stem that is no valid encoding (somebody else wrote it) is the name itself.
pub fn decode_file_name(stem: &str) -> String {
    if stem == "%" {
        return String::new();
    }
    let bytes = stem.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        if bytes[at] != b'%' {
            decoded.push(bytes[at]);
            at += 1;
            continue;
        }
        let digits = bytes.get(at + 1..at + 3).filter(|it| it.iter().all(u8::is_ascii_hexdigit));
        let digits = digits.and_then(|it| std::str::from_utf8(it).ok());
        match digits.and_then(|it| u8::from_str_radix(it, 16).ok()) {
            Some(byte) => decoded.push(byte),
            None => return stem.to_owned(),
        }
        at += 3;
    }
    String::from_utf8(decoded).unwrap_or_else(|_| stem.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_that_are_paths_become_plain_file_names() {
        assert_eq!(encode_file_name("../../x"), "%2E.%2F..%2Fx");
        assert_eq!(encode_file_name("wte.weight"), "wte.weight");
        assert_eq!(encode_file_name("100%\0"), "100%25%00");
    }

    #[test]
    fn stems_that_nobody_encoded_stay_as_they_are() {
        assert_eq!(decode_file_name("50%"), "50%");
        assert_eq!(decode_file_name("50%zz"), "50%zz");
        assert_eq!(decode_file_name("%+1"), "%+1");
        assert_eq!(decode_file_name("%FF"), "%FF");
    }

    proptest! {
        #[test]
        fn every_name_survives_the_round_trip(name in any::<String>()) {
            let stem = encode_file_name(&name);
            prop_assert!(!stem.contains(['/', '\0']) && !stem.starts_with('.') && !stem.is_empty());
            prop_assert_eq!(decode_file_name(&stem), name);
        }
    }
}
