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

const INDEX: &str = "model.safetensors.index.json";

/// The files of a folder, the weight map first, and whether it opens, where that is known. `outside`: see [`outside`], an
/// absolute path.
pub fn folder(u: &mut Unstructured<'_>, outside: &str) -> Result<(Vec<Named>, Option<bool>)> {
    let names = if one_in(u, 2)? { ["one.bin", "two.bin"] } else { ["two.safetensors", "ten.safetensors"] };
    let mut lists: [Vec<&str>; 2] = Default::default();
    for tensor in TENSORS {
        lists[usize::from(one_in(u, 2)?)].push(tensor);
    }
    if one_in(u, 4)? {
        return led_astray(u, names, &lists, outside);
    }
    let entries = entries(u, names, &lists)?;
    let mut files = vec![(INDEX, index(u, &entries)?)];
    for (name, mut tensors) in names.into_iter().zip(lists) {
        if one_in(u, 12)? {
            tensors.push(u.choose(&TENSORS)?);
        }
        files.push((name, shard(u, name, &tensors)?));
    }
    if one_in(u, 4)? {
        let at = u.int_in_range(0..=files.len() - 1)?;
        damage(u, &mut files[at].1)?;
    }
    if one_in(u, 24)? {
        files.remove(u.int_in_range(1..=2)?);
    }
    Ok((files, None))
}

/// A folder where nothing is wrong but the name of one file, and that name leads to a good one with the tensor in it: what is
/// refused is the name. Now and then it is the right name.
fn led_astray(
    u: &mut Unstructured<'_>,
    names: [&'static str; 2],
    lists: &[Vec<&str>; 2],
    outside: &str,
) -> Result<(Vec<Named>, Option<bool>)> {
    // Without bytes to choose from, nothing is a lie.
    let mut truth = Unstructured::new(&[]);
    let mut entries = entries(&mut truth, names, lists)?;
    let at = u.int_in_range(0..=entries.len() - 1)?;
    let own = &entries[at].1;
    let ways = [
        own.clone(),
        "../input".to_owned(),
        outside.to_owned(),
        "link".to_owned(),
        "folder/inner".to_owned(),
        format!("./{own}"),
        format!("folder/../{own}"),
    ];
    let way = u.int_in_range(0..=ways.len() - 1)?;
    entries[at].1 = ways[way].clone();
    let mut files = vec![(INDEX, index(&mut truth, &entries)?)];
    for (name, tensors) in names.into_iter().zip(lists) {
        files.push((name, shard(&mut truth, name, tensors)?));
    }
    Ok((files, Some(way == 0)))
}

/// A good file with every tensor, where no weight map may find it.
pub fn outside() -> Vec<u8> {
    // Without bytes to choose from, nothing is a lie.
    safetensors_of(&mut Unstructured::new(&[]), &TENSORS).unwrap_or_default()
}

/// Which tensor is in which file.
fn entries(
    u: &mut Unstructured<'_>,
    names: [&str; 2],
    lists: &[Vec<&str>; 2],
) -> Result<Vec<(String, String)>> {
    let mut entries = Vec::new();
    for (own, list) in lists.iter().enumerate() {
        for tensor in list {
            let file = match u.int_in_range(0..=31)? {
                31 => u.choose(&STRAYS)?,
                30 => names[1 - own],
                _ => names[own],
            };
            entries.push(((*tensor).to_owned(), file.to_owned()));
        }
    }
    Ok(entries)
}

fn index(u: &mut Unstructured<'_>, entries: &[(String, String)]) -> Result<Vec<u8>> {
    let first_file = entries[0].1.clone();
    let mut entries: Vec<String> =
        entries.iter().map(|(tensor, file)| format!("\"{tensor}\":\"{file}\"")).collect();
    match u.int_in_range(0..=31)? {
        27 => entries.push(entries[0].clone()),
        28 => drop(entries.pop()),
        29 => entries.push("\"more\":3".to_owned()),
        30 => entries.push(format!("\"more\":\"{first_file}\"")),
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
    Ok(format!("{{{}}}", fields.into_iter().cloned().collect::<Vec<_>>().join(",\n")).into_bytes())
}

fn shard(u: &mut Unstructured<'_>, name: &str, tensors: &[&str]) -> Result<Vec<u8>> {
    let is_pickled = name.ends_with("bin") != one_in(u, 16)?;
    if is_pickled { archive_of(u, tensors) } else { safetensors_of(u, tensors) }
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
