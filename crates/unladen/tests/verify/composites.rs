//! Tensors that are made of others: two that mean something else differ, and their indices lie within their bounds.

use super::*;
use unladen::checkpoint::CompositeKind;

/// A sample with its composites changed.
fn changed(name: &str, change: impl Fn(&mut Checkpoint)) -> OpenCheckpoint {
    let opened = open(sample(name)).unwrap();
    let mut checkpoint = Checkpoint::clone(&opened);
    change(&mut checkpoint);
    let mut files = FileSet::default();
    checkpoint.files.iter().for_each(|it| files.push(FileSource::open(&it.path).unwrap()));
    OpenCheckpoint::new(checkpoint, files)
}

fn differences(one: &OpenCheckpoint, other: &OpenCheckpoint) -> Vec<(String, Difference)> {
    let sides = [(&**one, one.files()), (&**other, other.files())];
    let comparison = compare(sides, BUDGET_BYTES, &Progress::default()).unwrap();
    assert_eq!(comparison.is_same(), comparison.different.is_empty());
    comparison.different
}

/// Both ways of comparing tell the same: the names, and what is there on either side.
fn told(one: &OpenCheckpoint, other: &OpenCheckpoint) -> Vec<(String, [String; 2])> {
    let told: Vec<(String, [String; 2])> = { differences(one, other).into_iter() }
        .map(|(name, difference)| match difference {
            Difference::Made { made } => {
                (name, made.map(|it| it.map_or("plain tensors".to_owned(), |it| it.to_string())))
            }
            other => panic!("{name}: {other:?}"),
        })
        .collect();
    let manifest = check(one, None).unwrap().manifest.unwrap();
    let findings = check(other, Some(&manifest)).unwrap().findings;
    assert!(
        findings.iter().all(|it| (it.kind, it.kind.name()) == (Kind::Composite, "composite")),
        "{findings:?}"
    );
    let found: Vec<(String, [String; 2])> =
        { findings.into_iter() }.map(|it| (it.tensors[0].clone(), [it.expected, it.found])).collect();
    assert_eq!(found, told);
    told
}

#[test]
fn the_same_integers_with_another_scale_or_zero_point_are_other_tensors() {
    let good = open(sample("quant.pt")).unwrap();
    let other = changed("quant.pt", |it| {
        for composite in &mut it.composites {
            if let CompositeKind::Quantised { scale: Some(scale), .. } = &mut composite.kind {
                *scale *= 2.0;
            }
        }
    });
    let n_with_scale = good.composites.iter().filter(|it| it.kind.to_string().contains("scale ")).count();
    let told_scales = told(&good, &other);
    assert!(n_with_scale > 0 && told_scales.len() == n_with_scale, "{told_scales:?}");
    assert!(told_scales[0].1.iter().all(|it| it.contains(", scale ") && it.contains(", zero point ")));
    let other = changed("quant.pt", |it| {
        for composite in &mut it.composites {
            if let CompositeKind::Quantised { zero_point: Some(zero_point), .. } = &mut composite.kind {
                *zero_point += 1;
            }
        }
    });
    assert_eq!(told(&good, &other).len(), n_with_scale);
}

#[test]
fn a_sparse_tensor_of_another_size_and_plain_tensors_of_the_parts_are_other_tensors() {
    let good = open(sample("sparse.pt")).unwrap();
    let n_composites = good.composites.len();
    let larger = changed("sparse.pt", |it| it.composites.iter_mut().for_each(|it| it.shape[0] += 1));
    let told_sizes = told(&good, &larger);
    assert_eq!(told_sizes.len(), n_composites);
    for (name, [one, other]) in &told_sizes {
        assert!(one.starts_with("sparse_") && one.contains(&format!("`{name}.values`")), "{one}");
        assert_ne!(one, other);
    }
    let plain = changed("sparse.pt", |it| it.composites.clear());
    for told in [
        told(&good, &plain),
        told(&plain, &good).into_iter().map(|(name, [one, other])| (name, [other, one])).collect(),
    ] {
        assert_eq!(told.len(), n_composites);
        assert!(
            told.iter().all(|it| it.1[0].starts_with("sparse_") && it.1[1] == "plain tensors"),
            "{told:?}"
        );
    }
    let folder = TempDir::new().unwrap();
    let converted = folder.path().join("sparse.safetensors");
    assert!(convert(&sample("sparse.pt"), &converted, Format::Safetensors));
    assert_eq!(told(&good, &open(&converted).unwrap()).len(), n_composites);
}

#[test]
fn a_manifest_knows_what_is_made_of_several_tensors_and_one_of_version_1_says_that_it_does_not() {
    let folder = TempDir::new().unwrap();
    for name in ["sparse.pt", "quant.pt", "nested.pt", "state_dict.pt"] {
        let path = folder.path().join(format!("{name}.json"));
        let checkpoint = open(sample(name)).unwrap();
        let manifest = manifest_of(&sample(name));
        manifest.write(&path, false, &[]).unwrap();
        assert_eq!(Manifest::read(&path).unwrap(), manifest, "{name}");
        assert_eq!(manifest.composites().unwrap().len(), checkpoint.composites.len());

        let mut old: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(old["unladen_manifest"], 2);
        old["unladen_manifest"] = 1.into();
        fs::write(&path, old.to_string()).unwrap();
        let old_manifest = Manifest::read(&path).unwrap();
        assert!(old_manifest.composites().is_none());
        let plain = changed(name, |it| it.composites.clear());
        assert_eq!(check(&plain, Some(&old_manifest)).unwrap().findings, []);
        old_manifest.write(&path, true, &[]).unwrap();
        assert!(Manifest::read(&path).unwrap().composites().is_none(), "what is not known is not made up");

        old["unladen_manifest"] = 2.into();
        old.as_object_mut().unwrap().remove("composites");
        fs::write(&path, old.to_string()).unwrap();
        let error = Manifest::read(&path).unwrap_err();
        assert!(matches!(error, Error::Corrupt(_)) && error.to_string().contains("composites"), "{error}");
    }
}

#[test]
fn an_index_that_is_out_of_bounds_is_found_with_and_without_hashes() {
    let path = sample("../hostile/p50_sparse_oob.pt");
    let checkpoint = open(&path).unwrap();
    for checked in [check_records(&checkpoint), check(&checkpoint, None).unwrap()] {
        let [finding] = &checked.findings[..] else { panic!("{:?}", checked.findings) };
        assert_eq!((finding.kind, finding.kind.name(), &finding.path), (Kind::Parts, "parts", &path));
        assert_eq!(finding.tensors, ["w.indices"]);
        assert!(
            finding.expected.contains("below 3") && finding.expected.contains("`w` is sparse_coo [3]"),
            "{finding:?}"
        );
        assert_eq!(finding.found, "1000000, of value 0");
    }
    assert!(compared(&path, &path).is_same());
}

#[test]
fn views_that_repeat_indices_without_end_are_refused_and_ties_are_read_once() {
    let huge = |n_composites: u32, is_tied: bool| {
        changed("../hostile/p50_sparse_oob.pt", |it| {
            // Each a hundred million times the one index that is stored.
            let (mut composite, indices, values) =
                (it.composites[0].clone(), it.tensors[0].clone(), it.tensors[1].clone());
            (it.tensors, it.composites) = (Vec::new(), Vec::new());
            composite.shape[0] = 2_000_000;
            for number in 0..n_composites {
                let n_elems = 100_000_000 + if is_tied { 0 } else { u64::from(number) };
                let layout = Layout::strided(DType::I64, &[1, n_elems], &[1, 0], 0).unwrap();
                let name = format!("{number}.indices");
                it.tensors.push(Tensor { name, layout, ..indices.clone() });
                it.tensors.push(Tensor { name: format!("{number}.values"), ..values.clone() });
                composite.parts = 2 * number..2 * number + 2;
                it.composites.push(composite.clone());
            }
        })
    };
    let findings = check_records(&huge(1000, false)).findings;
    assert_eq!(findings.len(), 1000);
    assert!(
        findings.iter().all(|it| it.kind == Kind::Parts && it.expected.contains("repeat")),
        "{:?}",
        findings[0]
    );
    assert_eq!(check_records(&huge(1000, true)).findings.len(), 1);
}

#[test]
fn a_sparse_tensor_whose_sizes_shrink_has_indices_out_of_bounds() {
    let smaller = changed("sparse.pt", |it| {
        it.composites.iter_mut().for_each(|it| it.shape.iter_mut().for_each(|it| *it = 0))
    });
    let findings = check_records(&smaller).findings;
    assert_eq!(findings.len(), smaller.composites.len(), "{findings:?}");
    assert!(findings.iter().all(|it| it.kind == Kind::Parts), "{findings:?}");
}
