//! Why the driver would not pin the host's memory: its words, and what to look at.

/// What to look at, by the name that the driver has for its error.
const HINTS: &[(&str, &str)] = &[(
    "CUDA_ERROR_OUT_OF_MEMORY",
    "look at `ulimit -l` (RLIMIT_MEMLOCK), and at the memory limit of this control group",
)];

/// A warning: the driver would not pin `what`, and what that does to the copies.
pub(crate) fn warning(what: &str, consequence: &str, why: &str) -> String {
    let hint = HINTS.iter().find(|(name, _)| why.contains(name));
    let hint = hint.map_or("`dmesg` may say more", |(_, hint)| hint);
    format!("warning: the driver would not pin {what}, so {consequence}: {why}; {hint}")
}

/// The warning of a load.
pub(crate) fn warning_of_load(why: &str) -> String {
    warning("the staging buffers", "the copies took longer", why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_on_memory_are_named_where_memory_was_short_and_nowhere_else() {
        let full = warning_of_load("cuMemHostRegister: CUDA_ERROR_OUT_OF_MEMORY (out of memory)");
        assert!(full.contains("CUDA_ERROR_OUT_OF_MEMORY (out of memory); look at `ulimit -l`"), "{full}");
        let other = warning_of_load("cuMemHostRegister: CUDA_ERROR_NOT_SUPPORTED (operation not supported)");
        assert!(other.contains("CUDA_ERROR_NOT_SUPPORTED") && !other.contains("ulimit"), "{other}");
    }
}
