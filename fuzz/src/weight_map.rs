//! Weight maps with two shards beside them, safetensors or archives, and lies in the map: names of files that are none of
//! the folder's, tensors in the wrong file, keys twice.

use crate::{
    archive, damage, number, one_in, perhaps_lie,
    pickle::{self, Ids, Pickle},
};
use arbitrary::{Result, Unstructured};

/// A file of a folder: its name, and its bytes.
pub type Named = (&'static str, Vec<u8>);

const TENSORS: [&str; 5] = ["w", "a.b", "layers.0.weight", "é", "z"];
const STRAYS: [&str; 16] = [
    "..",
    ".",
    "",
    "/",
    "../input",
    "/etc/passwd",
    "link",
    "link_inside",
    "pipe",
    "folder",
    "missing",
    "one.bin\\u0000",
    "./one.bin",
    "\\ud800",
    "model.safetensors.index.json",
    "folder/one.bin",
];

/// The files of a folder, the weight map first.
pub fn folder(u: &mut Unstructured<'_>) -> Result<Vec<Named>> {
    let names = if one_in(u, 2)? { ["one.bin", "two.bin"] } else { ["two.safetensors", "ten.safetensors"] };
    let mut lists: [Vec<&str>; 2] = Default::default();
    for tensor in TENSORS {
        lists[usize::from(one_in(u, 2)?)].push(tensor);
    }
    let index = index(u, names, &lists)?;
    let mut files = vec![("model.safetensors.index.json", index.into_bytes())];
    for (name, mut tensors) in names.into_iter().zip(lists) {
        if one_in(u, 12)? {
            tensors.push(u.choose(&TENSORS)?);
        }
        let is_pickled = name.ends_with("bin") != one_in(u, 16)?;
        files.push((name, if is_pickled { archive_of(u, &tensors)? } else { safetensors_of(u, &tensors)? }));
    }
    if one_in(u, 4)? {
        let at = u.int_in_range(0..=files.len() - 1)?;
        damage(u, &mut files[at].1)?;
    }
    if one_in(u, 24)? {
        files.remove(u.int_in_range(1..=2)?);
    }
    Ok(files)
}

/// A good file with every tensor, where no weight map may find it.
pub fn outside() -> Vec<u8> {
    // Without bytes to choose from, nothing is a lie.
    safetensors_of(&mut Unstructured::new(&[]), &TENSORS).unwrap_or_default()
}

fn index(u: &mut Unstructured<'_>, names: [&str; 2], lists: &[Vec<&str>; 2]) -> Result<String> {
    let mut entries = Vec::new();
    for (own, list) in lists.iter().enumerate() {
        for tensor in list {
            let file = match u.int_in_range(0..=31)? {
                31 => u.choose(&STRAYS)?,
                30 => names[1 - own],
                _ => names[own],
            };
            entries.push(format!("\"{tensor}\":\"{file}\""));
        }
    }
    match u.int_in_range(0..=31)? {
        27 => entries.push(entries[0].clone()),
        28 => drop(entries.pop()),
        29 => entries.push("\"more\":3".to_owned()),
        30 => entries.push(format!("\"more\":\"{}\"", names[0])),
        31 => entries.reverse(),
        _ => {}
    }
    let map = format!("\"weight_map\":{{{}}}", entries.join(","));
    let metadata = format!("\"metadata\":{{\"total_size\":{}}}", number(u)?);
    let fields = match u.int_in_range(0..=31)? {
        28 => vec![&metadata, &map, &map],
        29 => vec![&metadata, &metadata, &map],
        30 => vec![&metadata],
        31 => vec![&map],
        _ => vec![&metadata, &map],
    };
    Ok(format!("{{{}}}", fields.into_iter().cloned().collect::<Vec<_>>().join(",\n")))
}

fn safetensors_of(u: &mut Unstructured<'_>, tensors: &[&str]) -> Result<Vec<u8>> {
    let (mut fields, mut end_byte) = (Vec::new(), 0);
    for name in tensors {
        let n_elems: u64 = u.int_in_range(0..=6)?;
        let start_byte = end_byte;
        end_byte += 4 * n_elems;
        let claimed = perhaps_lie(u, n_elems)?;
        fields.push(format!(
            "\"{name}\":{{\"dtype\":\"F32\",\"shape\":[{claimed}],\"data_offsets\":[{start_byte},{end_byte}]}}"
        ));
    }
    let header = format!("{{{}}}", fields.join(","));
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend_from_slice(header.as_bytes());
    out.extend((0..end_byte).map(|it| it as u8));
    Ok(out)
}

fn archive_of(u: &mut Unstructured<'_>, tensors: &[&str]) -> Result<Vec<u8>> {
    let mut out = Pickle::new(Ids::Zip);
    out.extend_from_slice(b"\x80\x02}(");
    for name in tensors {
        pickle::text(&mut out, name);
        pickle::tensor(u, &mut out)?;
    }
    out.extend_from_slice(b"u.");
    let records = archive::records_of(out.bytes);
    if one_in(u, 4)? { archive::write(&records, u) } else { Ok(archive::honest(&records)) }
}
