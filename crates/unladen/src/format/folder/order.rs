//! The order of names that people expect.

use std::cmp::Ordering;

/// Compares names as people do: `h.2` comes before `h.10`.
pub(in crate::format) fn natural(a: &str, b: &str) -> Ordering {
    let (mut left, mut right) = (a.as_bytes(), b.as_bytes());
    loop {
        let n_digits = |it: &[u8]| it.iter().take_while(|it| it.is_ascii_digit()).count();
        let (n_left, n_right) = (n_digits(left), n_digits(right));
        if n_left > 0 && n_right > 0 {
            let number = |it: &[u8]| it.iter().position(|&it| it != b'0').unwrap_or(it.len());
            let (digits_left, digits_right) =
                (&left[number(&left[..n_left])..n_left], &right[number(&right[..n_right])..n_right]);
            let order =
                digits_left.len().cmp(&digits_right.len()).then_with(|| digits_left.cmp(digits_right));
            if order.is_ne() {
                return order;
            }
            (left, right) = (&left[n_left..], &right[n_right..]);
            continue;
        }
        match (left.split_first(), right.split_first()) {
            // Equal but for leading zeros: any order that is always the same.
            (None, None) => return a.cmp(b),
            (Some((x, rest_left)), Some((y, rest_right))) if x == y => {
                (left, right) = (rest_left, rest_right)
            }
            (x, y) => return x.map(|it| it.0).cmp(&y.map(|it| it.0)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_names_sort_by_value() {
        let mut names = ["h.10.b", "h.2.b", "h.2.a", "h", "h.02.b", "i"];
        names.sort_by(|a, b| natural(a, b));
        assert_eq!(names, ["h", "h.2.a", "h.02.b", "h.2.b", "h.10.b", "i"]);
    }
}
