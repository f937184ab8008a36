//! Tensor names as file names, and back: a name may hold anything, a file name may not.

/// The file name (without extension) that stands for a tensor's name: `%XX` for `/`, NUL, `%` and a leading `.`.
pub fn encode_file_name(name: &str) -> String {
    let mut encoded = String::with_capacity(name.len());
    for (at, letter) in name.char_indices() {
        match letter {
            '/' => encoded.push_str("%2F"),
            '\0' => encoded.push_str("%00"),
            '%' => encoded.push_str("%25"),
            '.' if at == 0 => encoded.push_str("%2E"),
            other => encoded.push(other),
        }
    }
    encoded
}

/// The tensor's name that [`encode_file_name`] made `encoded` from. What no encoder writes stays as it is, so that
/// files that others named are found by their own names.
pub fn decode_file_name(encoded: &str) -> String {
    let mut name = String::with_capacity(encoded.len());
    let mut rest = encoded;
    while let Some(at) = rest.find('%') {
        name.push_str(&rest[..at]);
        let known = [("%2F", '/'), ("%00", '\0'), ("%25", '%'), ("%2E", '.')];
        let (letter, len) = known
            .into_iter()
            .find(|(code, _)| rest[at..].starts_with(code))
            .map_or(('%', 1), |(code, letter)| (letter, code.len()));
        name.push(letter);
        rest = &rest[at + len..];
    }
    name + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_survives_being_a_file_name() {
        for name in [
            "",
            "h.0.weight",
            ".hidden",
            "..",
            "../../etc/passwd",
            "a/b",
            "50%",
            "%2F",
            "nul\0",
            "ä/é",
            "a.b.",
        ] {
            let encoded = encode_file_name(name);
            assert!(!encoded.contains(['/', '\0']) && !encoded.starts_with('.'), "{encoded}");
            assert_eq!(decode_file_name(&encoded), name);
        }
    }

    #[test]
    fn plain_names_stay_readable() {
        assert_eq!(encode_file_name("trf_blocks.0.att.W_key.weight"), "trf_blocks.0.att.W_key.weight");
        assert_eq!(decode_file_name("100%.cotton"), "100%.cotton");
    }
}
