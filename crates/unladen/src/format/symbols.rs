//! Judges the names of code in a pickle: which are news, which are dangerous, which a strict reader refuses. None is ever
//! resolved, whatever the judgement.

mod allowed;
mod dangerous;

use super::pickle::{Arena, Meaning, Symbol, modern_module};
use crate::{
    checkpoint::Warning,
    error::{Fault, Result},
};
use std::collections::BTreeSet;

/// Symbols that a warning names; what comes after is counted.
const MAX_SYMBOLS: usize = 50;

/// Warns of what is unknown and of what is dangerous.
///
/// If `is_strict`, fails for what PyTorch's `weights_only` would refuse; it names the symbols.
pub(super) fn check(arena: &Arena<'_>, is_strict: bool, warnings: &mut Vec<Warning>) -> Result<()> {
    if is_strict {
        let refused = names_of(arena, |it| !is_listed(allowed::ALLOWED, it));
        if !refused.is_empty() {
            let expected = "only names that PyTorch's weights_only allows";
            return Err(Fault::new(expected, refused.join(", ").escape_debug().to_string())
                .hint("if you trust the file, open it without --strict: nothing of it is run either way")
                .unsupported());
        }
    }
    let unknown = names_of(arena, |it| it.meaning == Meaning::Unknown);
    if !unknown.is_empty() {
        warnings.push(Warning::UnknownSymbols(unknown));
    }
    let dangerous = names_of(arena, is_dangerous);
    if !dangerous.is_empty() {
        warnings.push(Warning::DangerousSymbols(dangerous));
    }
    Ok(())
}

/// The names of some symbols, sorted and each once; of many, the first and how many more.
fn names_of(arena: &Arena<'_>, is_meant: impl Fn(&Symbol<'_>) -> bool) -> Vec<String> {
    let names: BTreeSet<(&[u8], &[u8])> =
        arena.symbols.iter().filter(|it| is_meant(it)).map(|it| (it.module, it.name)).collect();
    let n_more = names.len().saturating_sub(MAX_SYMBOLS);
    let shown = names.into_iter().take(MAX_SYMBOLS).map(|(module, name)| {
        format!("{}.{}", String::from_utf8_lossy(module), String::from_utf8_lossy(name))
    });
    let more = (n_more > 0).then(|| format!("{n_more} more"));
    shown.chain(more).collect()
}

/// True if the table has the name, under the module's name of today.
fn is_listed(table: &[(&str, &[&str])], symbol: &Symbol<'_>) -> bool {
    let (Ok(module), Ok(name)) = (std::str::from_utf8(symbol.module), std::str::from_utf8(symbol.name))
    else {
        return false;
    };
    let module = modern_module(module);
    table.iter().any(|(known, names)| *known == module && names.contains(&name))
}

/// Of a name with dots, the first part says which object it leads through.
fn is_dangerous(symbol: &Symbol<'_>) -> bool {
    let module = String::from_utf8_lossy(symbol.module);
    let package = module.split('.').next().unwrap_or_default();
    let name = String::from_utf8_lossy(symbol.name);
    let first = name.split('.').next().unwrap_or_default();
    dangerous::PACKAGES.contains(&package)
        || dangerous::MODULES.contains(&&*module)
        || dangerous::FUNCTIONS
            .iter()
            .any(|(known, names)| *known == modern_module(&module) && names.contains(&first))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{Limits, pickle};

    fn judged(globals: &[u8], is_strict: bool) -> Result<Vec<Warning>> {
        let bytes = [b"\x80\x04(", globals, b"l."].concat();
        let pickle = pickle::read(&bytes, 0, &Limits::default()).unwrap();
        let mut warnings = Vec::new();
        check(&pickle.arena, is_strict, &mut warnings).map(|()| warnings)
    }

    #[test]
    fn what_could_do_harm_is_called_dangerous() {
        for global in [
            &b"cos\nsystem\n"[..],
            b"cnt\nsystem\n",
            b"csubprocess\nPopen\n",
            b"c__builtin__\neval\n",
            b"\x8c\x08builtins\x8c\x0cgetattr.name\x93",
            b"cimportlib.machinery\nSourceFileLoader\n",
            b"ctorch.hub\nload\n",
            b"coperator\nattrgetter\n",
        ] {
            let warnings = judged(global, false).unwrap();
            assert!(matches!(warnings[..], [.., Warning::DangerousSymbols(_)]), "{warnings:?}");
        }
        let warnings = judged(b"cmy.os\nsystem\ncbuiltins\nlist\ncargparse\nNamespace\n", false).unwrap();
        assert_eq!(warnings, [Warning::UnknownSymbols(vec!["my.os.system".to_owned()])]);
    }

    #[test]
    fn strictness_is_pytorchs_list() {
        let good = b"ctorch._utils\n_rebuild_tensor_v2\nccollections\nOrderedDict\nc__builtin__\nset\nctorch\nuint4\nctorch.cuda.sparse\nHalfTensor\n";
        assert_eq!(judged(good, true).unwrap(), []);
        for refused in [
            &b"cargparse\nNamespace\n"[..],
            b"ccollections\ndefaultdict\n",
            b"ctorch._utils\n_rebuild_nested_tensor\n",
            b"ctorch.storage\n_load_from_bytes\n",
            b"cbuiltins\nlist\n",
        ] {
            let error = judged(refused, true).unwrap_err().to_string();
            let name = std::str::from_utf8(refused).unwrap().lines().last().unwrap();
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn the_list_is_as_long_as_pytorchs() {
        assert_eq!(allowed::ALLOWED.iter().map(|(_, names)| names.len()).sum::<usize>(), 144);
    }
}
