//! Damage in records and on disks: what verification tells of it, and that no way of loading hands it out.

#[path = "../common/faulty.rs"]
#[expect(dead_code, reason = "of its faults only the disk that cannot read a place is needed here")]
mod faulty;

use super::*;
use faulty::{Fault, Faulty};
use std::sync::Arc;
use unladen::{Strategy, source::RawRead};

#[test]
fn a_flipped_bit_is_found_with_its_record_and_its_tensors() {
    let folder = TempDir::new().unwrap();
    let good = open(sample("tied.pt")).unwrap();
    let manifest = manifest_of(&sample("tied.pt"));
    for storage in good.storages.iter().filter(|it| it.len_bytes > 0) {
        let mut bytes = fs::read(sample("tied.pt")).unwrap();
        bytes[(storage.start_byte + storage.len_bytes - 1) as usize] ^= 0x10;
        let path = folder.path().join("bad.pt");
        fs::write(&path, bytes).unwrap();
        let bad = open(&path).unwrap();
        let findings = check_records(&bad).findings;
        let [finding] = &findings[..] else { panic!("{findings:?}") };
        assert_eq!((finding.kind, &finding.path), (Kind::Checksum, &path));
        assert!(finding.record.as_ref().is_some_and(|it| it.contains("/data/")), "{finding:?}");
        assert!(finding.expected.starts_with("CRC-32 ") && !finding.tensors.is_empty(), "{finding:?}");

        let findings = check(&bad, Some(&manifest)).unwrap().findings;
        assert_eq!(findings[0], *finding);
        let told = findings[1..].iter().map(|it| (it.kind, it.tensors[0].clone()));
        assert!(
            findings.len() > 1 && { told }
                .all(|(kind, name)| { kind == Kind::Bytes && finding.tensors.contains(&name) })
        );
        let comparison = compared(&sample("tied.pt"), &path);
        let differ: Vec<&str> = comparison.different.iter().map(|(name, _)| &**name).collect();
        let told: Vec<&str> = findings[1..].iter().map(|it| &*it.tensors[0]).collect();
        assert_eq!(sorted(differ), sorted(told));
    }
}

fn sorted(mut names: Vec<&str>) -> Vec<&str> {
    names.sort_unstable();
    names
}

/// Changes the checksum of a record wherever the archive says it.
fn with_other_checksum(archive: &[u8], crc32: u32) -> Vec<u8> {
    let mut bytes = archive.to_vec();
    let (wanted, other) = (crc32.to_le_bytes(), (crc32 ^ 1).to_le_bytes());
    let places: Vec<usize> = (0..bytes.len() - 3).filter(|&it| bytes[it..it + 4] == wanted).collect();
    assert!(places.len() >= 2, "in front of the record or behind it, and in the directory");
    places.into_iter().for_each(|it| bytes[it..it + 4].copy_from_slice(&other));
    bytes
}

#[test]
fn packed_records_are_compared_whether_a_tensor_is_in_them_or_not() {
    let path = sample("rezip_deflated.pt");
    let checkpoint = open(&path).unwrap();
    let records = unladen::format::records(&*checkpoint.files().get(0).unwrap(), &Limits::default()).unwrap();
    let n_packed = records.iter().filter(|it| it.packed.is_some()).count();
    assert!(n_packed > checkpoint.storages.len(), "other records are packed, too");
    let n_records = records.len() as u64;
    for checked in [check_records(&checkpoint), check(&checkpoint, None).unwrap()] {
        assert_eq!(
            (checked.n_compared, checked.n_packed, &checked.findings[..]),
            (n_records, n_packed as u64, &[][..])
        );
    }
    let folder = TempDir::new().unwrap();
    let changed = folder.path().join("changed.pt");
    let good = manifest_of(&path);
    for (name, is_tensor) in [("data/0", true), ("serialization_id", false)] {
        let record = records.iter().find(|it| it.name.ends_with(name)).unwrap();
        fs::write(&changed, with_other_checksum(&fs::read(&path).unwrap(), record.crc32.unwrap())).unwrap();
        let checkpoint = open(&changed).unwrap();
        let checked = check(&checkpoint, Some(&good)).unwrap();
        let [finding] = &checked.findings[..] else { panic!("{:?}", checked.findings) };
        assert_eq!((finding.kind, finding.record.as_deref()), (Kind::Checksum, Some(&*record.name)));
        assert_eq!(finding.tensors.is_empty(), !is_tensor, "{finding:?}");
        assert_eq!(finding.path, changed);
    }
}

#[test]
fn a_place_that_the_disk_cannot_read_is_a_finding_and_the_rest_is_checked() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.safetensors");
    safetensors(&path, &[("a", &[3], &floats(&[1.0; 3])), ("b", &[2], &floats(&[2.0; 2]))]);
    let good = open(&path).unwrap();
    let manifest = manifest_of(&path);
    let broken_at = good.storages.iter().map(|it| it.start_byte).max().unwrap();
    let mut files = FileSet::default();
    let wrap = |inner: Box<dyn RawRead>| -> Box<dyn RawRead> {
        Box::new(Faulty::new(inner, Fault::BrokenAt(broken_at), Arc::new(|_, _, _| {})))
    };
    files.push(FileSource::open(&path).unwrap().with_raw(wrap));
    for (hashes, manifest) in [(false, None), (true, Some(&manifest))] {
        let limits = Limits::default();
        let what = Check { host_budget_bytes: BUDGET_BYTES, limits, hashes, manifest };
        let checked = verify::check(&good, &files, &what, &Progress::default()).unwrap();
        let [finding] = &checked.findings[..] else { panic!("{:?}", checked.findings) };
        assert_eq!((finding.kind, &finding.tensors[..]), (Kind::Unreadable, &["b".to_owned()][..]));
        assert!(finding.found.contains("Input/output error"), "{finding:?}");
        assert_eq!(checked.manifest, None, "a manifest that lacks a tensor would be wrong");
    }
}

/// A file of the corpus of hostile ones.
fn hostile(name: &str) -> OpenCheckpoint {
    open(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hostile").join(name)).unwrap()
}

#[test]
fn a_packed_record_that_is_damaged_is_a_finding_and_no_way_of_loading_gives_its_bytes() {
    for (name, kind) in
        [("z45_deflated_damaged.pt", Kind::Unreadable), ("z46_deflated_crc_mismatch.pt", Kind::Checksum)]
    {
        let checkpoint = hostile(name);
        for checked in [check_records(&checkpoint), check(&checkpoint, None).unwrap()] {
            let [finding] = &checked.findings[..] else { panic!("{name}: {:?}", checked.findings) };
            let told = (finding.kind, finding.record.as_deref(), &finding.tensors[..]);
            assert_eq!(told, (kind, Some("x/data/0"), &["w".to_owned()][..]), "{name}");
        }
        let loads = Strategy::all().map(|it| (it.name(), checkpoint.load(it).map(|_| ())));
        let sides = [(&*checkpoint, checkpoint.files()); 2];
        // Equal bytes that no load would give are no equal tensors.
        let compared = compare(sides, BUDGET_BYTES, &Progress::default()).map(|_| ());
        for (way, result) in loads.chain([("compare", compared)]) {
            let Err(Error::Corrupt(fault)) = &result else { panic!("{name} by {way}: {result:?}") };
            assert_eq!(fault.tensor.as_deref(), Some("w"), "{name} by {way}: {fault}");
            assert!(
                fault.expected.contains("record `x/data/0`") && fault.path.ends_with(name),
                "{way}: {fault}"
            );
        }
    }
}

#[test]
fn a_packed_record_that_is_damaged_behind_what_tensors_view_is_a_finding_and_loads_what_they_view() {
    for name in ["z48_deflated_junk_behind_end.pt", "z49_deflated_without_end.pt"] {
        let checkpoint = hostile(name);
        for checked in [check_records(&checkpoint), check(&checkpoint, None).unwrap()] {
            let [finding] = &checked.findings[..] else { panic!("{name}: {:?}", checked.findings) };
            let told = (finding.kind, finding.record.as_deref(), &finding.tensors[..]);
            assert_eq!(told, (Kind::Unreadable, Some("x/data/0"), &["w".to_owned()][..]), "{name}");
            assert!(finding.found.contains("end"), "{name}: {finding:?}");
        }
        for strategy in Strategy::all() {
            let loaded = checkpoint.load(strategy).unwrap();
            let bytes = loaded.state.get("w").unwrap().host_bytes().unwrap();
            assert_eq!(bytes, floats(&[1.0; 3]), "{name} by {}", strategy.name());
        }
    }
}

#[test]
fn comparing_checksums_takes_no_room_for_views_that_repeat_a_packed_record_to_petabytes() {
    let checkpoint = hostile("z50_deflated_repeated.pt");
    let checked = check_records(&checkpoint);
    assert_eq!((checked.n_compared, checked.n_packed, &checked.findings[..]), (4, 1, &[][..]));
    // What has to be written out for its hash is refused, and only that.
    let findings = check(&checkpoint, None).unwrap().findings;
    let [finding] = &findings[..] else { panic!("{findings:?}") };
    assert_eq!((finding.kind, &finding.tensors[..]), (Kind::Unreadable, &["w".to_owned()][..]));
    assert!(finding.found.contains("at most 1024 times its 16 stored bytes"), "{finding:?}");
}

#[test]
fn a_packed_record_that_looks_like_an_archive_is_a_tensor_like_any_other() {
    let checkpoint = hostile("z47_deflated_looks_like_zip.pt");
    let checked = check(&checkpoint, None).unwrap();
    assert_eq!((checked.n_compared, checked.n_packed, &checked.findings[..]), (4, 1, &[][..]));
    let loaded = checkpoint.load(Strategy::Stream).unwrap();
    assert!(loaded.state.get("w").unwrap().host_bytes().unwrap().starts_with(b"PK\x03\x04"));
}
