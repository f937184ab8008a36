//! Values as protocols 0 and 1 write them: a line of text each, with escapes. Numbers are decimal, and nothing else.

use super::{Machine, Value, Wide, arena::Text};
use crate::error::Result;
use std::fmt::Write as _;

/// Digits of a decimal number; Python refuses longer ones, too.
const MAX_DIGITS: usize = 4_300;

impl Machine<'_> {
    /// The value of an opcode whose operand is a line.
    pub(super) fn line_of_value(&mut self, opcode: u8) -> Result<Value> {
        let start = self.at;
        let line = self.line()?;
        let in_place = |skip: usize, len: usize| Text { start: (start + skip) as u32, len: len as u32 };
        match opcode {
            // Python 2 wrote truth values so.
            b'I' if line == b"00" => Ok(Value::Bool(false)),
            b'I' if line == b"01" => Ok(Value::Bool(true)),
            b'I' => self.decimal(line),
            b'L' => self.decimal(line.strip_suffix(b"L").unwrap_or(line)),
            b'F' => match std::str::from_utf8(line).ok().and_then(|it| it.parse::<f64>().ok()) {
                Some(number) => Ok(Value::Float(Wide(number))),
                None => Err(self.unreadable("a decimal fraction", line)),
            },
            b'S' => {
                let inner = match line {
                    [b'\'', inner @ .., b'\''] | [b'"', inner @ .., b'"'] => inner,
                    _ => return Err(self.unreadable("a string in quotes", line)),
                };
                if !inner.contains(&b'\\') {
                    return Ok(Value::Bytes(in_place(1, inner.len())));
                }
                let first = self.arena.decoded.len();
                if unescape(inner, &mut self.arena.decoded).is_none() {
                    return Err(self.unreadable("the escapes of a string", line));
                }
                Ok(Value::Bytes(self.decoded_from(first)?))
            }
            b'V' => {
                if line.is_ascii() && !line.contains(&b'\\') {
                    return Ok(Value::Str(in_place(0, line.len())));
                }
                let first = self.arena.decoded.len();
                if unescape_unicode(line, &mut self.arena.decoded).is_none() {
                    return Err(self.unreadable("the escapes of a text", line));
                }
                Ok(Value::Str(self.decoded_from(first)?))
            }
            // A persistent id.
            _ => Ok(Value::Str(in_place(0, line.len()))),
        }
    }

    /// A number of the memo.
    pub(super) fn line_of_number(&mut self) -> Result<u32> {
        let line = self.line()?;
        let digits = Some(line).filter(|it| !it.is_empty() && it.iter().all(u8::is_ascii_digit));
        let number = digits.and_then(|it| std::str::from_utf8(it).ok()?.parse().ok());
        number.ok_or_else(|| self.unreadable("a number of the pickle's memo", line))
    }

    fn decimal(&mut self, line: &[u8]) -> Result<Value> {
        let (is_negative, digits) = match line {
            [b'-', digits @ ..] => (true, digits),
            digits => (false, digits),
        };
        if digits.is_empty() || digits.len() > MAX_DIGITS || !digits.iter().all(u8::is_ascii_digit) {
            return Err(self.unreadable("a decimal number", line));
        }
        let number = std::str::from_utf8(line).ok().and_then(|it| it.parse().ok());
        if let Some(number) = number {
            return Ok(Value::Int(Wide(number)));
        }
        let first = self.arena.decoded.len();
        self.arena.decoded.extend(little_endian(is_negative, digits));
        Ok(Value::Long(self.decoded_from(first)?))
    }

    /// What was decoded last.
    fn decoded_from(&self, first: usize) -> Result<Text> {
        let start = self.arena.bytes.len() + first;
        let len = self.arena.decoded.len() - first;
        match (u32::try_from(start), u32::try_from(start + len)) {
            (Ok(start), Ok(_)) => Ok(Text { start, len: len as u32 }),
            _ => Err(self.fault("less than 4 GiB of text", "more of it").unsupported()),
        }
    }

    #[cold]
    fn unreadable(&self, expected: &str, line: &[u8]) -> crate::Error {
        let mut found = String::new();
        let shown = &line[..line.len().min(40)];
        // Writing to a string cannot fail.
        let _ = write!(found, "`{}`", String::from_utf8_lossy(shown).escape_debug());
        self.fault(expected, found).corrupt()
    }
}

/// The two's complement of a decimal number, the least byte first.
fn little_endian(is_negative: bool, digits: &[u8]) -> Vec<u8> {
    let mut limbs: Vec<u32> = Vec::new();
    for chunk in digits.chunks(9) {
        // Nine digits and the factor for them fit into 32 bits.
        let value = chunk.iter().fold(0u64, |value, digit| value * 10 + u64::from(digit - b'0'));
        let mut carry = value;
        for limb in &mut limbs {
            carry += u64::from(*limb) * 10u64.pow(chunk.len() as u32);
            *limb = carry as u32;
            carry >>= 32;
        }
        if carry > 0 {
            limbs.push(carry as u32);
        }
    }
    let mut bytes: Vec<u8> = limbs.iter().flat_map(|it| it.to_le_bytes()).collect();
    // Room for the sign.
    bytes.push(0);
    if is_negative {
        let mut carry = true;
        for byte in &mut bytes {
            let (sum, over) = (!*byte).overflowing_add(u8::from(carry));
            (*byte, carry) = (sum, over);
        }
    }
    let fill = if is_negative { 0xFF } else { 0 };
    while let [.., before, last] = bytes[..]
        && last == fill
        && (before & 0x80 != 0) == is_negative
    {
        bytes.pop();
    }
    bytes
}

/// Python's escapes in a string of bytes. An unknown one stands for itself.
fn unescape(text: &[u8], target: &mut Vec<u8>) -> Option<()> {
    let mut rest = text;
    while let [first, after @ ..] = rest {
        rest = after;
        if *first != b'\\' {
            target.push(*first);
            continue;
        }
        let [escape, after @ ..] = rest else { return None };
        rest = after;
        match escape {
            b'\\' | b'\'' | b'"' => target.push(*escape),
            b'n' => target.push(b'\n'),
            b'r' => target.push(b'\r'),
            b't' => target.push(b'\t'),
            b'a' => target.push(7),
            b'b' => target.push(8),
            b'v' => target.push(11),
            b'f' => target.push(12),
            b'x' => target.push(hex(&mut rest, 2)? as u8),
            b'0'..=b'7' => {
                let mut value = u32::from(escape - b'0');
                for _ in 0..2 {
                    let [digit @ b'0'..=b'7', after @ ..] = rest else { break };
                    value = value * 8 + u32::from(digit - b'0');
                    rest = after;
                }
                target.push(value as u8);
            }
            other => target.extend([b'\\', *other]),
        }
    }
    Some(())
}

/// Text in Latin-1 with `\uXXXX` and `\UXXXXXXXX`, as UTF-8; lone surrogates in three bytes, as Python lets them pass.
fn unescape_unicode(text: &[u8], target: &mut Vec<u8>) -> Option<()> {
    let mut rest = text;
    while let [first, after @ ..] = rest {
        rest = after;
        let unit = match (first, rest) {
            (b'\\', [escape @ (b'u' | b'U'), after @ ..]) => {
                rest = after;
                hex(&mut rest, if *escape == b'u' { 4 } else { 8 })?
            }
            (b'\\', [other, after @ ..]) => {
                rest = after;
                target.push(b'\\');
                u32::from(*other)
            }
            (byte, _) => u32::from(*byte),
        };
        match char::from_u32(unit) {
            Some(it) => target.extend_from_slice(it.encode_utf8(&mut [0; 4]).as_bytes()),
            None if unit <= 0xFFFF => {
                target.extend([0xED, 0x80 | (unit >> 6 & 0x3F) as u8, 0x80 | (unit & 0x3F) as u8]);
            }
            None => return None,
        }
    }
    Some(())
}

/// Takes a number of so many hexadecimal digits.
fn hex(rest: &mut &[u8], n_digits: usize) -> Option<u32> {
    let digits = rest.get(..n_digits)?;
    *rest = &rest[n_digits..];
    digits.iter().try_fold(0, |value, digit| Some(value << 4 | char::from(*digit).to_digit(16)?))
}

#[cfg(test)]
mod tests {
    use super::super::{Limits, read};
    use super::*;

    fn value(bytes: &[u8]) -> Value {
        read(bytes, 0, &Limits::default()).unwrap().root
    }

    fn bytes(pickle: &[u8]) -> Vec<u8> {
        let pickle = read(pickle, 0, &Limits::default()).unwrap();
        let (Value::Str(text) | Value::Bytes(text) | Value::Long(text)) = pickle.root else {
            panic!("{:?}", pickle.root)
        };
        pickle.arena.bytes(text).to_vec()
    }

    #[test]
    fn numbers_are_decimal_and_of_any_size() {
        assert_eq!(value(b"I42\n."), Value::Int(Wide(42)));
        assert_eq!(value(b"I-7\n."), Value::Int(Wide(-7)));
        assert_eq!([value(b"I01\n."), value(b"I00\n.")], [Value::Bool(true), Value::Bool(false)]);
        assert_eq!(value(b"L9223372036854775807L\n."), Value::Int(Wide(i64::MAX)));
        assert_eq!(bytes(b"L9223372036854775808L\n."), [0, 0, 0, 0, 0, 0, 0, 0x80, 0]);
        assert_eq!(
            bytes(b"L-9223372036854775809\n."),
            [0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F, 0xFF]
        );
        assert_eq!(bytes(b"L119547037146038801333356L\n."), *b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19");
        assert_eq!(bytes(&[b"L1", &[b'0'; 100][..], b"\n."].concat()).len(), 42);
        assert_eq!(value(b"F-1.5e3\n."), Value::Float(Wide(-1500.0)));
        for refused in
            [&b"I0x10\n."[..], b"I\n.", b"I+1\n.", b"I1 \n.", b"L1_0\n.", b"LL\n.", b"F1,5\n.", b"I--1\n."]
        {
            let error = read(refused, 0, &Limits::default()).unwrap_err();
            assert!(matches!(error, crate::Error::Corrupt(_)), "{refused:?}: {error}");
        }
        assert!(read(&[b"I", &[b'9'; 5000][..], b"\n."].concat(), 0, &Limits::default()).is_err());
    }

    #[test]
    fn strings_keep_what_their_escapes_stand_for() {
        assert_eq!(bytes(b"S'conv.weight'\n."), b"conv.weight");
        assert_eq!(bytes(b"S\"it's\"\n."), b"it's");
        assert_eq!(bytes(b"S'\\x00\\xff\\n\\\\\\'\\101\\q'\n."), b"\x00\xff\n\\'A\\q");
        assert_eq!(bytes(b"Vgr\xfc\\u00df\\U0001f600\\u005cn\n."), "gr\u{fc}\u{df}\u{1f600}\\n".as_bytes());
        assert_eq!(bytes(b"V\\ud800\n."), b"\xed\xa0\x80");
        assert_eq!(bytes(b"V\\\\u0041\n."), b"\\\\u0041");
        assert_eq!(bytes(b"S''\n."), b"");
        for refused in
            [&b"Sabc\n."[..], b"S'abc\n.", b"S'\n.", b"S'\\x4'\n.", b"V\\u12\n.", b"V\\Uffffffff\n.", b"S'a"]
        {
            assert!(read(refused, 0, &Limits::default()).is_err(), "{refused:?}");
        }
    }

    #[test]
    fn the_memo_of_text_protocols_is_the_same_memo() {
        let pickle = read(b"(dp0\nS'a'\np1\nI1\nsg0\n.", 0, &Limits::default()).unwrap();
        let Value::Dict(dict) = pickle.root else { panic!("{:?}", pickle.root) };
        assert_eq!(pickle.arena.get(dict, "a"), Some(Value::Int(Wide(1))));
        for refused in [&b"Np-1\n."[..], b"Np\n.", b"Np4294967296\n.", b"Ng0\n."] {
            assert!(read(refused, 0, &Limits::default()).is_err(), "{refused:?}");
        }
    }
}
