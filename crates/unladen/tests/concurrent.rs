//! Loads at the same time share nothing: each gives what it gives alone, errors too.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Barrier,
    thread,
};
use unladen::{Error, Progress, Strategy, error::Limit, open, verify::digest_of};

/// The files of the fixtures, good ones and bad ones in turns.
fn files() -> Vec<PathBuf> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let list = |folder: &str| {
        let entries = fs::read_dir(fixtures.join(folder)).unwrap();
        let mut paths: Vec<_> = entries.map(|it| it.unwrap().path()).filter(|it| it.is_file()).collect();
        paths.sort();
        paths
    };
    let (good, bad) = (list("samples"), list("hostile"));
    let n_files = good.len().min(bad.len());
    good.into_iter().zip(bad).take(n_files).flat_map(|(good, bad)| [good, bad]).collect()
}

/// What every strategy makes of a file: a digest or an error, in words.
fn outcomes(path: &Path) -> Vec<String> {
    let load = |strategy| {
        let loaded = open(path)?.load(strategy)?;
        digest_of(&loaded.state, path, &Progress::default())
    };
    let words = |error| match error {
        // What is free changes all the time.
        Error::OverBudget { limit: Limit::FreeMemory, needed_bytes, .. } => format!("{needed_bytes} needed"),
        error => error.to_string(),
    };
    Strategy::all().map(|it| load(it).unwrap_or_else(words)).collect()
}

#[test]
fn threads_that_load_different_files_at_once_get_what_each_gets_alone() {
    let files = files();
    assert!(files.len() > 60, "{}", files.len());
    let alone: Vec<_> = files.iter().map(|it| outcomes(it)).collect();
    let n_digests = alone.iter().flatten().filter(|it| it.len() == 64).count();
    assert!(n_digests > 100 && n_digests < alone.len() * Strategy::all().count(), "{n_digests}");
    let start = Barrier::new(4);
    thread::scope(|scope| {
        for number in 0..4 {
            let (files, alone, start) = (&files, &alone, &start);
            scope.spawn(move || {
                start.wait();
                // Each goes through the files from another one on, so that different files meet.
                for index in (0..files.len()).map(|it| (it + number * files.len() / 4) % files.len()) {
                    assert_eq!(outcomes(&files[index]), alone[index], "{}", files[index].display());
                }
            });
        }
    });
}
