//! safetensors files: tensors one behind the other, with lies in any field of the header.

use crate::{number, one_in, perhaps_lie};
use arbitrary::{Result, Unstructured};

/// Types and bytes of an element, of the first [`N_WHOLE`] at least.
pub const DTYPES: &[(&str, u64)] = &[
    ("F32", 4),
    ("F16", 2),
    ("BF16", 2),
    ("F64", 8),
    ("I64", 8),
    ("U8", 1),
    ("BOOL", 1),
    ("C64", 8),
    ("F8_E4M3", 1),
    ("F4", 1),
    ("F6_E2M3", 1),
    ("F6_E3M2", 1),
    ("f32", 4),
    ("F99", 4),
];

/// So many types of [`DTYPES`] are known and have whole bytes.
pub const N_WHOLE: usize = 9;

const NAMES: &[&str] = &["w", "a.b", "__metadata__", "", "\\u0000", "\\ud800", "\\\"", "../x", "é", "w", "x"];

/// A file.
pub fn file(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let mut header = String::from("{");
    let mut end_byte = 0u64;
    for index in 0..u.int_in_range(0..=6)? {
        if index > 0 {
            header.push(',');
        }
        let name = *u.choose(NAMES)?;
        let name = if one_in(u, 4)? { name.to_owned() } else { format!("t{index}") };
        if one_in(u, 12)? {
            let odd = [
                "{\"format\":\"pt\"}",
                "null",
                "3",
                "[\"F32\",[1],[0,4]]",
                "{}",
                "\"text\"",
                "[[[[[[[[]]]]]]]]",
            ];
            header += &format!("\"{name}\":{}", u.choose(&odd)?);
            continue;
        }
        header += &tensor(u, &name, &mut end_byte)?;
    }
    header += *u.choose(&["}", "}", "}", "}   ", "", "}}", ",}", "}\0"])?;
    let len = perhaps_lie(u, header.len() as u64)?;
    let mut out = len.to_le_bytes().to_vec();
    out.extend_from_slice(header.as_bytes());
    let data_bytes = perhaps_lie(u, end_byte.min(1 << 12))?.min(1 << 12);
    out.extend((0..data_bytes).map(|it| it as u8));
    Ok(out)
}

fn tensor(u: &mut Unstructured<'_>, name: &str, end_byte: &mut u64) -> Result<String> {
    let (dtype, elem_bytes) = *u.choose(DTYPES)?;
    let mut shape = Vec::new();
    for _ in 0..u.int_in_range(0..=3)? {
        shape.push(number(u)?);
    }
    let whole_bytes = shape.iter().fold(elem_bytes, |product, &it| product.wrapping_mul(it));
    let len_bytes = match dtype {
        "F4" => whole_bytes / 2,
        "F6_E2M3" | "F6_E3M2" => whole_bytes.wrapping_mul(6) / 8,
        _ => whole_bytes,
    };
    let start_byte = perhaps_lie(u, *end_byte)?;
    *end_byte = perhaps_lie(u, start_byte.wrapping_add(len_bytes))?;
    let mut fields = vec![
        format!("\"dtype\":\"{dtype}\""),
        format!("\"shape\":{shape:?}"),
        format!("\"data_offsets\":[{start_byte},{end_byte}]"),
    ];
    match u.int_in_range(0..=23)? {
        0 => drop(fields.remove(u.int_in_range(0..=2)?)),
        1 => fields.push(fields[u.int_in_range(0..=2)?].clone()),
        2 => fields.push("\"more\":[1,{\"deep\":null}]".to_owned()),
        3 => fields[1] = "\"shape\":[-1]".to_owned(),
        4 => fields[1] = "\"shape\":[1e0]".to_owned(),
        5 => fields[2] = format!("\"data_offsets\":[{start_byte}]"),
        6 => fields.swap(0, 2),
        _ => {}
    }
    Ok(format!("\"{name}\":{{{}}}", fields.join(",")))
}
