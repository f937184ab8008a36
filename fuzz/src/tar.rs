//! Checkpoints of PyTorch 0.1.1 to 0.1.9: a tar archive of four members, with lies in the headers and in the tables of
//! storages and tensors.

use crate::{
    number, one_in, perhaps_lie,
    pickle::{self, Ids, global, long, text},
};
use arbitrary::{Result, Unstructured};

const CLASSES: [(&str, &str, u64); 4] = [
    ("FloatStorage", "FloatTensor", 4),
    ("HalfStorage", "HalfTensor", 2),
    ("ByteStorage", "ByteTensor", 1),
    ("DoubleStorage", "DoubleTensor", 8),
];

/// A file: storages have the numbers from 1 on, parts of them the next, tensors the next.
pub fn file(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let mut numbers = 1..;
    let (storages, known) = storages(u, &mut numbers)?;
    let tensors = tensors(u, &known, &mut numbers)?;
    let object = pickle::write(u, Ids::Tar)?.bytes;
    let mut members = vec![
        ("sys_info", b"\x80\x02}.".to_vec()),
        ("pickle", object),
        ("tensors", tensors),
        ("storages", storages),
    ];
    match u.int_in_range(0..=31)? {
        28 => drop(members.remove(u.int_in_range(0..=3)?)),
        29 => members.push(members[u.int_in_range(0..=3)?].clone()),
        30 => members.push(("other", b"other".to_vec())),
        31 => members.reverse(),
        _ => {}
    }
    let mut out = Vec::new();
    for (name, content) in members {
        member(u, &mut out, name, &content)?;
    }
    out.resize(out.len() + if one_in(u, 8)? { 0 } else { 1024 }, 0);
    Ok(out)
}

/// Number, position in [`CLASSES`], number of elements.
type Known = (i64, usize, u64);

fn storages(
    u: &mut Unstructured<'_>,
    numbers: &mut impl Iterator<Item = i64>,
) -> Result<(Vec<u8>, Vec<Known>)> {
    let n_storages: u64 = u.int_in_range(1..=3)?;
    let mut out = count(u, n_storages)?;
    let mut known: Vec<Known> = Vec::new();
    for _ in 0..n_storages {
        let (class, n_elems): (usize, u64) = (u.int_in_range(0..=3)?, u.int_in_range(0..=6)?);
        let (storage, _, elem_bytes) = CLASSES[class];
        let Some(id) = numbers.next() else { break };
        out.extend_from_slice(b"\x80\x02(");
        long(&mut out, perhaps_lie(u, id as u64)?);
        text(&mut out, "cpu");
        global(&mut out, ("torch", storage));
        out.extend_from_slice(b"t.");
        out.extend(perhaps_lie(u, n_elems)?.to_le_bytes());
        out.extend((0..n_elems * elem_bytes).map(|it| it as u8 ^ id as u8));
        known.push((id, class, n_elems));
    }
    out.extend_from_slice(b"\x80\x02](");
    for _ in 0..u.int_in_range(0..=2)? {
        let (root, class, n_elems) = *u.choose(&known)?;
        let offset = u.int_in_range(0..=n_elems)?;
        let Some(id) = numbers.next() else { break };
        out.push(b'(');
        for it in [id as u64, root as u64, offset, n_elems - offset] {
            long(&mut out, perhaps_lie(u, it)?);
        }
        out.push(b't');
        known.push((id, class, n_elems - offset));
    }
    out.extend_from_slice(b"e.");
    Ok((out, known))
}

fn tensors(
    u: &mut Unstructured<'_>,
    known: &[Known],
    numbers: &mut impl Iterator<Item = i64>,
) -> Result<Vec<u8>> {
    let n_tensors: u64 = u.int_in_range(1..=5)?;
    let mut out = count(u, n_tensors)?;
    for _ in 0..n_tensors {
        let (storage, class, n_elems) = *u.choose(known)?;
        let Some(id) = numbers.next() else { break };
        out.extend_from_slice(b"\x80\x02(");
        long(&mut out, perhaps_lie(u, id as u64)?);
        match one_in(u, 16)? {
            true => out.push(b'N'),
            false => long(&mut out, perhaps_lie(u, storage as u64)?),
        }
        global(&mut out, ("torch", CLASSES[class].1));
        out.extend_from_slice(b"t.");
        layout(u, &mut out, n_elems)?;
    }
    Ok(out)
}

/// The numbers behind a tensor: whole, in two dimensions, or any.
fn layout(u: &mut Unstructured<'_>, out: &mut Vec<u8>, n_elems: u64) -> Result<()> {
    let (shape, stride, offset) = match u.int_in_range(0..=3)? {
        0 => (vec![n_elems], vec![1], 0),
        1 => (vec![2, n_elems / 2], vec![1, 2], 0),
        2 => (vec![n_elems / 2, 2], vec![2, 1], n_elems % 2),
        _ => {
            let n_dims = u.int_in_range(0..=3)?;
            let mut numbers = || (0..n_dims).map(|_| number(u)).collect::<Result<Vec<u64>>>();
            (numbers()?, numbers()?, number(u)?)
        }
    };
    out.extend(perhaps_lie(u, shape.len() as u32)?.to_le_bytes());
    out.extend([0; 4]);
    for it in shape.into_iter().chain(stride).chain([offset]) {
        out.extend(perhaps_lie(u, it)?.to_le_bytes());
    }
    Ok(())
}

/// The pickle of a number of entries.
fn count(u: &mut Unstructured<'_>, n_entries: u64) -> Result<Vec<u8>> {
    let mut out = b"\x80\x02".to_vec();
    long(&mut out, perhaps_lie(u, n_entries)?);
    out.push(b'.');
    Ok(out)
}

fn member(u: &mut Unstructured<'_>, out: &mut Vec<u8>, name: &str, content: &[u8]) -> Result<()> {
    let mut name = name.as_bytes().to_vec();
    if one_in(u, 16)? {
        // What an extended header says goes for the next one.
        let size = perhaps_lie(u, content.len() as u64)?;
        let odd = [
            format!("11 path={}\n", String::from_utf8_lossy(&name)),
            format!("{} size={size}\n", 7 + size.to_string().len() + 1),
            "22 GNU.sparse.major=1\n".to_owned(),
            "99999999999999999999 x=\n".to_owned(),
            "5 x=".to_owned(),
        ];
        let (text, kind) = (u.choose(&odd)?.clone(), *u.choose(b"xgLK")?);
        header(u, out, b"ext", kind, text.as_bytes())?;
    }
    if one_in(u, 24)? {
        name = u.choose(&[&b"storage"[..], b"../pickle", b"pickle\xff", b"", b"data.pkl"])?.to_vec();
    }
    let kind = if one_in(u, 24)? { u.arbitrary()? } else { b'0' };
    header(u, out, &name, kind, content)
}

fn header(u: &mut Unstructured<'_>, out: &mut Vec<u8>, name: &[u8], kind: u8, content: &[u8]) -> Result<()> {
    let mut header = [0; 512];
    header[..name.len()].copy_from_slice(name);
    let size = perhaps_lie(u, content.len() as u64)?;
    if size < 1 << 33 && !one_in(u, 16)? {
        header[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
    } else {
        header[124] = 0x80;
        header[128..136].copy_from_slice(&size.to_be_bytes());
    }
    header[156] = kind;
    if !one_in(u, 8)? {
        header[257..265].copy_from_slice(b"ustar\x0000");
    }
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|&it| u32::from(it)).sum();
    header[148..155].copy_from_slice(format!("{:06o}\0", perhaps_lie(u, sum)? & 0o777_777).as_bytes());
    out.extend_from_slice(&header);
    out.extend_from_slice(content);
    out.resize(out.len().next_multiple_of(512), 0);
    Ok(())
}
