//! Which driver this is: the version of its part in the system's kernel, as `nvidia-smi` shows it.

use std::fs;

/// `550.54.15`. `None` where the system does not tell, as under WSL.
pub(super) fn driver_version() -> Option<String> {
    fs::read_to_string("/proc/driver/nvidia/version").ok().and_then(|it| version_in(&it))
}

/// The first word of the kernel module's line that is numbers with points between them. What stands before it depends on
/// which module it is, what comes after it on who built it.
fn version_in(text: &str) -> Option<String> {
    let line = text.lines().find_map(|it| it.trim_start().strip_prefix("NVRM version:"))?;
    line.split_whitespace().find(|it| is_version(it)).map(str::to_owned)
}

fn is_version(word: &str) -> bool {
    let is_number = |it: &str| !it.is_empty() && it.bytes().all(|byte| byte.is_ascii_digit());
    word.contains('.') && word.split('.').all(is_number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_found_whichever_kernel_module_it_is() {
        for (text, version) in [
            (
                "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\n\
                 GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04) \n",
                "535.129.03",
            ),
            (
                "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build  \
                 (dvs-builder@U16-I3-B08-02-1)  Tue Mar  5 22:23:56 UTC 2024\nGCC version:  gcc version 12.3.0\n",
                "550.54.15",
            ),
            (
                "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build  \
                 (buildbrain@mobile-u64-6336-d8000)  Tue Jan  7 17:35:12 PST 2025\n",
                "540.4.0",
            ),
            (
                "NVRM version: NVIDIA UNIX x86_64 Kernel Module  390.157  Wed Oct 12 09:19:07 UTC 2022\n\
                 GCC version:  gcc version 10.2.1 20210110 (Debian 10.2.1-6) \n",
                "390.157",
            ),
            ("GCC version:  gcc version 12.3.0\n  NVRM version:\tNVIDIA 580.65.06", "580.65.06"),
        ] {
            assert_eq!(version_in(text).as_deref(), Some(version), "{text}");
        }
    }

    #[test]
    fn what_tells_no_version_has_none() {
        for text in [
            "",
            "NVRM version:",
            "GCC version:  gcc version 12.3.0\n",
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  Thu Oct 19 18:56:32 UTC 2023\nGCC version: 12.3.0",
            "NVRM version: a.b 1. .2 1..2 535 18:56",
        ] {
            assert_eq!(version_in(text), None, "{text}");
        }
    }
}
