//! Text to GPT-2's token ids and back, with the vocabulary built in.

use std::collections::HashSet;
use unladen::error::{Fault, Result};

/// The id of `<|endoftext|>`, which stands between the texts that GPT-2 was trained on.
pub const END_OF_TEXT: u32 = 50256;

/// The ids of a text's tokens. `<|endoftext|>` in the text is text like any other.
///
/// Fails with `Unsupported` if the tokenizer gives up on the text.
pub fn encode(text: &str) -> Result<Vec<u32>> {
    let tokens = tiktoken_rs::r50k_base_singleton().encode(text, &HashSet::new());
    let gave_up = |error: tiktoken_rs::EncodeError| {
        let fault = Fault::new("a text that the tokenizer splits", error.to_string());
        fault.hint("give a shorter text, with shorter runs of spaces").unsupported()
    };
    Ok(tokens.map_err(gave_up)?.0)
}

/// The text of token ids. Bytes that are no UTF-8, as at a cut through a character, become `U+FFFD`.
///
/// Fails with `Mismatch` if an id is not in GPT-2's vocabulary.
pub fn decode(ids: &[u32]) -> Result<String> {
    let bytes = tiktoken_rs::r50k_base_singleton().decode_bytes(ids).map_err(|error| {
        let expected = format!("token ids up to {END_OF_TEXT}, GPT-2's vocabulary");
        Fault::new(expected, error.token.to_string()).hint("the model has another vocabulary").mismatch()
    })?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_has_gpt2s_ids_and_comes_back() {
        assert_eq!(encode("Every effort moves you").unwrap(), [6109, 3626, 6100, 345]);
        for text in ["", "Hello, I am", "naïve — 漢字 🙂\n\n  tab\t<|endoftext|>"] {
            assert_eq!(decode(&encode(text).unwrap()).unwrap(), text);
        }
        assert_eq!(decode(&[END_OF_TEXT]).unwrap(), "<|endoftext|>");
    }

    #[test]
    fn an_id_outside_the_vocabulary_is_named() {
        let error = decode(&[1, 50257]).unwrap_err();
        assert!(error.kind() == "Mismatch" && error.to_string().contains("50257"), "{error}");
    }

    #[test]
    fn a_text_too_hard_to_split_is_an_error() {
        let spaces = " ".repeat(3_000_000) + "x";
        match encode(&spaces) {
            Ok(ids) => assert_eq!(decode(&ids).unwrap(), spaces),
            Err(error) => assert_eq!(error.kind(), "Unsupported"),
        }
    }
}
