use super::*;
use crate::checkpoint::Format;
use std::fs;

#[test]
fn folders_without_a_checkpoint_say_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    assert!(matches!(open(folder.path(), &OpenOptions::default()).unwrap_err(), Error::Corrupt(_)));
    fs::write(folder.path().join("a.safetensors"), b"\x02\0\0\0\0\0\0\0{}").unwrap();
    fs::write(folder.path().join("b.safetensors"), b"\x02\0\0\0\0\0\0\0{}").unwrap();
    let error = open(folder.path(), &OpenOptions::default()).unwrap_err();
    assert!(matches!(error, Error::Unsupported(_)) && error.hint().contains("weight map"), "{error}");
}

#[test]
fn no_tensor_file_of_a_folder_is_left_out_in_silence() {
    use std::os::unix::ffi::OsStrExt;
    let samples = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/samples/per_tensor"));
    let folder = tempfile::tempdir().unwrap();
    let tensor = fs::read_dir(samples).unwrap().map(|it| it.unwrap().path()).next().unwrap();
    fs::copy(&tensor, folder.path().join("w.pt")).unwrap();
    fs::copy(&tensor, folder.path().join(".w.pt")).unwrap();
    let (checkpoint, _) = open(folder.path(), &OpenOptions::default()).unwrap();
    assert_eq!(checkpoint.tensors.len(), 1);
    let warnings: String = checkpoint.warnings.iter().map(ToString::to_string).collect();
    assert!(warnings.contains("`.w.pt`"), "{warnings}");

    let name = std::ffi::OsStr::from_bytes(b"w\xff.pt");
    fs::copy(&tensor, folder.path().join(name)).unwrap();
    assert!(matches!(open(folder.path(), &OpenOptions::default()).unwrap_err(), Error::Unsupported(_)));
}

#[test]
fn models_split_by_rank_are_named() {
    for name in [
        "mp_rank_00_model_states.pt",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "layer_03-model_00-model_states.pt",
        "mp_rank_01",
        "global_step1200",
        "latest_checkpointed_iteration.txt",
        "__0.metadata",
    ] {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(name), "").unwrap();
        let error = open(folder.path(), &OpenOptions::default()).unwrap_err();
        assert!(matches!(error, Error::Unsupported(_)) && error.to_string().contains(name), "{error}");
        assert!(error.hint().contains("rank"), "{}", error.hint());
    }
    // A tensor of this name is no step.
    assert!(refuse_ranks(&["global_step.pt".to_owned()]).is_ok());
}

#[test]
fn of_two_variants_none_is_chosen_and_what_is_passed_over_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str| fs::write(folder.path().join(name), b"\x02\0\0\0\0\0\0\0{}").unwrap();
    write("model.fp16.safetensors");
    assert!(open(folder.path(), &OpenOptions::default()).unwrap().0.warnings.is_empty());
    write("model.bf16.safetensors");
    let error = open(folder.path(), &OpenOptions::default()).unwrap_err().to_string();
    assert!(error.contains("fp16") && error.contains("bf16"), "{error}");
    write("model.safetensors");
    let (checkpoint, _) = open(folder.path(), &OpenOptions::default()).unwrap();
    let warning = checkpoint.warnings[0].to_string();
    assert!(warning.contains("`model.fp16.safetensors`") && warning.contains("comes first"), "{warning}");
}

#[test]
fn a_folder_with_one_model_opens_as_the_model() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), "{}").unwrap();
    fs::write(folder.path().join("optimizer.pt"), "no checkpoint").unwrap();
    fs::write(folder.path().join("model.safetensors"), b"\x02\0\0\0\0\0\0\0{}").unwrap();
    let (checkpoint, files) = open(folder.path(), &OpenOptions::default()).unwrap();
    assert_eq!((checkpoint.format, files.len()), (Format::Safetensors, 1));
    assert_eq!(checkpoint.path, folder.path());
}

#[test]
fn a_folder_around_checkpoints_names_them() {
    let folder = tempfile::tempdir().unwrap();
    let hint = || open(folder.path(), &OpenOptions::default()).unwrap_err().hint().to_owned();
    fs::write(folder.path().join("config.yaml"), "").unwrap();
    assert!(hint().contains(".pth file for each"), "{}", hint());
    fs::create_dir(folder.path().join("checkpoint-500")).unwrap();
    assert!(hint().contains("open the one that you mean: `checkpoint-500`"), "{}", hint());
    fs::write(folder.path().join("last.ckpt"), "").unwrap();
    assert!(hint().contains("open the file itself: `last.ckpt`"), "{}", hint());
    fs::write(folder.path().join("best.ckpt"), "").unwrap();
    assert!(hint().contains("one of `best.ckpt`, `last.ckpt`"), "{}", hint());
}
