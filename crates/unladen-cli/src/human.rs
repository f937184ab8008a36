//! Numbers as people read them.

/// `652 MiB`, `6.29 GiB`.
pub(crate) fn bytes(n_bytes: u64) -> String {
    const UNITS: &[(&str, u64)] = &[("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match UNITS.iter().find(|(_, unit)| n_bytes >= *unit) {
        Some((name, unit)) => {
            let value = n_bytes as f64 / *unit as f64;
            let n_decimals = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
            format!("{value:.n_decimals$} {name}")
        }
        None => format!("{n_bytes} B"),
    }
}

/// A name that fits a table: of a long one, the beginning and the end.
pub(crate) fn shortened(name: &str) -> String {
    const KEPT_CHARS: usize = 60;
    if name.chars().nth(2 * KEPT_CHARS + 1).is_none() {
        return name.to_owned();
    }
    let start: String = name.chars().take(KEPT_CHARS).collect();
    let mut end: Vec<char> = name.chars().rev().take(KEPT_CHARS).collect();
    end.reverse();
    format!("{start}…{}", end.into_iter().collect::<String>())
}

/// `64MiB`, `512 m`, `1.5GiB`, `4096`, and `none` for no limit. All units are powers of 1024.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    if text == "none" {
        return Ok(u64::MAX);
    }
    let digits = text.find(|it: char| !it.is_ascii_digit() && it != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err("a size is a number with KiB, MiB, GiB or TiB, or `none`".to_owned()),
    };
    // Whole bytes stay whole: a float has too few digits for them.
    if let Ok(number) = number.parse::<u64>() {
        return number
            .checked_shl(shift)
            .filter(|it| it >> shift == number)
            .ok_or_else(|| "too large".to_owned());
    }
    let number: f64 = number.parse().map_err(|_| "a size begins with a number, or is `none`".to_owned())?;
    let bytes = number * (1u64 << shift) as f64;
    if bytes < u64::MAX as f64 { Ok(bytes as u64) } else { Err("too large".to_owned()) }
}

/// What [`parse_bytes`] reads again.
pub(crate) fn unparse_bytes(n_bytes: u64) -> String {
    if n_bytes == u64::MAX { "none".to_owned() } else { n_bytes.to_string() }
}

/// `0.123`, `12.3`.
pub(crate) fn seconds(seconds: f64) -> String {
    let n_decimals = if seconds < 10.0 { 3 } else { 1 };
    format!("{seconds:.n_decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_they_are_written() {
        let known = ["0", "4096", "64MiB", "64 m", "1.5GiB", "9007199254740993", "none"];
        let read: Vec<u64> = known.iter().map(|it| parse_bytes(it).unwrap()).collect();
        assert_eq!(read, [0, 4096, 64 << 20, 64 << 20, 3 << 29, 9_007_199_254_740_993, u64::MAX]);
        for n_bytes in [0, 4097, u64::MAX - 1, u64::MAX] {
            assert_eq!(parse_bytes(&unparse_bytes(n_bytes)), Ok(n_bytes));
        }
        for wrong in ["", "MiB", "-1", "1.2.3", "7 apples", "99999999999 TiB", "99999999999.5TiB"] {
            assert!(parse_bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn three_digits_count() {
        assert_eq!(
            [0, 1023, 1536, 683_671_552, 6_753_000_000].map(bytes).join(" "),
            "0 B 1023 B 1.50 KiB 652 MiB 6.29 GiB"
        );
    }
}
