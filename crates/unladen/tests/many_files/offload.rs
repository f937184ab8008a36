//! Tensors that Accelerate offloaded.

use super::{load, write::counting};
use std::fs;
use unladen::{DType, Format, open};

#[test]
fn offloaded_tensors_load_by_every_strategy() {
    let dir = tempfile::tempdir().unwrap();
    let index = r#"{"l.0.weight":{"dtype":"bfloat16","shape":[3,5]},"l.10.bias":{"dtype":"float32","shape":[]},
        "l.2.mask":{"dtype":"bool","shape":[4]},"empty":{"dtype":"float16","shape":[0,2]}}"#;
    fs::write(dir.path().join("index.json"), index).unwrap();
    for (name, bytes) in [
        ("l.0.weight.dat", counting(3, 30)),
        ("l.10.bias.dat", counting(7, 4)),
        ("l.2.mask.dat", vec![1, 0, 0, 1]),
        ("empty.dat", vec![0]),
    ] {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    let loaded = load(dir.path());
    assert_eq!(loaded.len(), 4);
    assert_eq!(loaded["l.0.weight"], (DType::BF16, vec![3, 5], counting(3, 30)));
    assert_eq!(loaded["l.10.bias"], (DType::F32, vec![], counting(7, 4)));
    assert_eq!(loaded["empty"], (DType::F16, vec![0, 2], vec![]));
    assert_eq!(load(&dir.path().join("index.json")), loaded);
    let checkpoint = open(dir.path()).unwrap();
    assert_eq!((checkpoint.format, checkpoint.files().len()), (Format::Offload, 4));
}
