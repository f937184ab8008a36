//! What archives of `torch.jit.save` hold besides a state dict: constants, which are listed as `constants.<number>`, and a
//! program, which is left out and never run.

use super::{
    OpenOptions, inline, pickle,
    pth::storages,
    rebuild::Rebuild,
    record::read,
    tree::{self, Listing},
    whole::prepare,
    zip::Records,
};
use crate::{
    checkpoint::Warning,
    error::{Fault, Result},
    source::ReadAt,
    stamp::FileStamp,
    tensor::{Backing, Storage, StorageId},
};
use std::collections::HashSet;

/// The record that tells such an archive, and that every version has.
const CONSTANTS: &str = "constants.pkl";
/// Records of archives of PyTorch 1.0 and 1.1.
const OLD: [&str; 2] = ["model.json", "attributes.pkl"];

/// Tensors that a program uses and no module owns.
#[derive(Debug)]
pub(super) struct Constants {
    storages: Vec<Storage>,
    listing: Listing,
}

/// Fails if the archive is of a version whose tensors are not known to be found.
pub(super) fn refuse_old(records: &Records<'_>, root: &[u8]) -> Result<()> {
    let has = |name: &str| records.get(&[root, name.as_bytes()].concat()).is_some();
    if let Some(record) = OLD.iter().find(|it| has(it)) {
        let found = format!("one of PyTorch 1.0 or 1.1 (record `{record}`)");
        return Err(Fault::new("a TorchScript archive of PyTorch 1.2 or newer", found)
            .hint("load it with torch.jit.load and save its state_dict()")
            .unsupported());
    }
    if has(".data/extern_modules") {
        return Err(Fault::new("a checkpoint of tensors", "a package of code (torch.package)")
            .hint("load it with torch.package, and save the state_dict() of what is in it")
            .unsupported());
    }
    Ok(())
}

/// Reads the constants of an archive; `None` if it has no program.
pub(super) fn constants(
    source: &dyn ReadAt,
    records: &Records<'_>,
    root: &[u8],
    swapped: bool,
    options: &OpenOptions,
    files: &mut Vec<FileStamp>,
    warnings: &mut Vec<Warning>,
) -> Result<Option<Constants>> {
    let Some(entry) = records.get(&[root, CONSTANTS.as_bytes()].concat()) else { return Ok(None) };
    let limits = &options.limits;
    pickle::check_len(entry.len_bytes, limits)?;
    let bytes = read(source, entry, CONSTANTS, limits.pickle_bytes)?;
    if entry.crc32 != 0 && crc32fast::hash(&bytes) != entry.crc32 {
        let fault = Fault::new(format!("{CONSTANTS} as it was written"), "another checksum");
        return Err(fault.at(entry.start_byte).corrupt());
    }
    let mut pickle = pickle::read(&bytes, entry.start_byte, limits)?;
    let (mut storages, refs) =
        storages(&pickle.arena, records, &[root, b"constants/"].concat(), files, swapped)?;
    prepare(&mut pickle, options, warnings)?;
    let inside = inline::Inside::of(Some(source).filter(|_| entry.is_stored()));
    let given = inline::find(&pickle.arena, inside, files, &mut storages, limits, warnings)?;
    let rebuild = Rebuild { arena: &pickle.arena, storages: &storages, refs: &refs, given: &given };
    let mut listing = tree::list(&rebuild, pickle.root, limits, warnings)?;
    let tensors = listing.tensors.iter_mut().map(|it| &mut it.name);
    for name in tensors.chain(listing.composites.iter_mut().map(|it| &mut it.name)) {
        name.insert_str(0, "constants.");
    }
    warnings.push(Warning::LeftOut("the TorchScript program itself, which is never run".to_owned()));
    Ok(Some(Constants { storages, listing }))
}

impl Constants {
    /// Adds the constants behind a program's parameters, buffers and other tensors. One whose name is taken gets a `~`.
    pub(super) fn add_to(self, storages: &mut Vec<Storage>, listing: &mut Listing) {
        let n_storages = storages.len() as u32;
        let n_tensors = listing.tensors.len() as u32;
        let composites = self.listing.composites.into_iter().map(|it| it.shifted(n_tensors));
        listing.composites.extend(composites);
        let mut taken: HashSet<String> = listing.tensors.iter().map(|it| it.name.clone()).collect();
        for mut tensor in self.listing.tensors {
            while taken.contains(&tensor.name) {
                tensor.name.push('~');
            }
            if let Backing::Storage(storage) = &mut tensor.backing {
                *storage = StorageId(n_storages + storage.0);
            }
            taken.insert(tensor.name.clone());
            listing.tensors.push(tensor);
        }
        storages.extend(self.storages);
    }
}
