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

/// `0.123`, `12.3`.
pub(crate) fn seconds(seconds: f64) -> String {
    let n_decimals = if seconds < 10.0 { 3 } else { 1 };
    format!("{seconds:.n_decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_count() {
        assert_eq!(
            [0, 1023, 1536, 683_671_552, 6_753_000_000].map(bytes).join(" "),
            "0 B 1023 B 1.50 KiB 652 MiB 6.29 GiB"
        );
    }
}
