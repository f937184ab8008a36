//! What opening a checkpoint of many tiny tensors takes, by the kernel's count. One test, so that nothing else in the
//! process is measured with it.

use std::{fmt::Write as _, fs, path::Path};
use unladen::{
    Format,
    memory::{Measured, Method, measure},
    progress::Progress,
    save::{self, Output},
};

const N_TENSORS: usize = 100_000;

/// A safetensors file of tensors with a byte each, and every fifth with more dimensions than are kept inline.
fn write_tiny_tensors(path: &Path) {
    let mut header = String::from("{");
    for index in 0..N_TENSORS {
        let comma = if index == 0 { "" } else { "," };
        let shape = if index % 5 == 0 { "1,1,1,1,1,1" } else { "1,1" };
        let (layer, part) = (index / 10, index % 10);
        let name = format!("model.layers.{layer}.block.{part}.weight");
        let (start, end) = (index, index + 1);
        write!(
            header,
            r#"{comma}"{name}":{{"dtype":"U8","shape":[{shape}],"data_offsets":[{start},{end}]}}"#
        )
        .unwrap();
    }
    header.push('}');
    let length = (header.len() as u64).to_le_bytes();
    fs::write(path, [&length[..], header.as_bytes(), &vec![7; N_TENSORS]].concat()).unwrap();
}

#[test]
fn metadata_bytes_are_what_the_tables_take_and_opening_peaks_near_what_is_predicted() {
    let folder = tempfile::tempdir().unwrap();
    let [safetensors, pth] = ["tiny.safetensors", "tiny.pth"].map(|it| folder.path().join(it));
    write_tiny_tensors(&safetensors);
    let source = unladen::open(&safetensors).unwrap();
    let output = Output { path: &pth, format: Format::Pth, overwrite: false, inputs: &[] };
    save::convert(&source, source.files(), &output, u64::MAX, &Progress::default()).unwrap();
    // The program's own code is touched for the first time here, not where it would be measured.
    drop((source, unladen::open(&pth).unwrap()));
    for path in [&safetensors, &pth] {
        let (checkpoint, opening) = measure(Method::HighWater, || unladen::open(path).unwrap());
        // A copy allocates what the checkpoint holds and nothing else.
        let (copy, copying) = measure(Method::HighWater, || unladen::Checkpoint::clone(&checkpoint));
        let held_bytes = copying.peak_anon_bytes;
        let claimed_bytes = copy.metadata_bytes();
        let report = |what: &str, it: &Measured| format!("{what} of {}: {it:?}", path.display());
        // The kernel's own counts are this coarse.
        let slack_bytes = 512 << 10;
        assert!(
            claimed_bytes + slack_bytes >= held_bytes && claimed_bytes <= held_bytes * 5 / 4 + slack_bytes,
            "{claimed_bytes} claimed, {}",
            report("copy", &copying)
        );
        let predicted_bytes = checkpoint.opening_peak_bytes();
        assert!(
            opening.peak_anon_bytes <= predicted_bytes + slack_bytes
                && opening.peak_anon_bytes >= predicted_bytes / 2,
            "{predicted_bytes} predicted, {}",
            report("opening", &opening)
        );
    }
}
