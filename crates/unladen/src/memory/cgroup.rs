//! What the memory control group of this process allows and has seen, version 1 or 2, and what is free beside it.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The highest memory use that the kernel saw in this process's control group, page cache and neighbours in the group
/// included. `None` where it does not tell.
pub fn cgroup_peak_bytes() -> Option<u64> {
    let group = Group::of_this_process()?;
    number(&group.folder.join(group.names.peak))
}

/// Bytes that can still be had without pushing out anything but page cache: the machine's, or the control group's
/// where that has less. `None` where the kernel does not tell.
pub fn available_bytes() -> Option<u64> {
    let machine =
        line_number(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")?.saturating_mul(1024);
    let group = Group::of_this_process().and_then(|it| it.available_bytes());
    Some(machine.min(group.unwrap_or(u64::MAX)))
}

/// The files of one version.
#[derive(Debug, PartialEq, Eq)]
struct Names {
    peak: &'static str,
    limit: &'static str,
    usage: &'static str,
    /// Lines of `memory.stat` with the page cache, which the kernel gives back when asked for memory.
    cache: [&'static str; 2],
}

const V1: Names = Names {
    peak: "memory.max_usage_in_bytes",
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    cache: ["total_inactive_file ", "total_active_file "],
};

const V2: Names = Names {
    peak: "memory.peak",
    limit: "memory.max",
    usage: "memory.current",
    cache: ["inactive_file ", "active_file "],
};

/// A control group's folder.
#[derive(Debug, PartialEq, Eq)]
struct Group {
    folder: PathBuf,
    /// Where its tree is mounted: groups above this cannot be seen.
    top: PathBuf,
    names: &'static Names,
}

impl Group {
    fn of_this_process() -> Option<Group> {
        let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        let group = find(&groups, &mounts)?;
        // With version 2, the controller may be off.
        group.folder.join(group.names.usage).exists().then_some(group)
    }

    /// The least room up to the top of the tree: a limit counts for all groups below it.
    fn available_bytes(&self) -> Option<u64> {
        let groups = self.folder.ancestors().take_while(|it| it.starts_with(&self.top));
        groups.filter_map(|folder| self.room_bytes(folder)).min()
    }

    /// Limit minus use, the page cache not counted as used. `None` without a limit.
    fn room_bytes(&self, folder: &Path) -> Option<u64> {
        let limit_bytes = number(&folder.join(self.names.limit))?;
        let used_bytes = number(&folder.join(self.names.usage))?;
        let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
        let cache_bytes: u64 = self.names.cache.iter().filter_map(|name| line_number(&stat, name)).sum();
        Some(limit_bytes.saturating_sub(used_bytes.saturating_sub(cache_bytes)))
    }
}

/// Finds the memory group of a process in its `cgroup` and `mountinfo`. Version 1 comes first: where both are mounted,
/// it has the memory controller.
fn find(groups: &str, mounts: &str) -> Option<Group> {
    let path_where = |is_it: &dyn Fn(&str, &str) -> bool| {
        groups.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':');
            let (id, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            is_it(id, controllers).then_some(path)
        })
    };
    let v1 = || {
        let path = path_where(&|_, controllers| controllers.split(',').any(|it| it == "memory"))?;
        mounted(mounts, path, &V1, |kind, options| {
            kind == "cgroup" && options.split(',').any(|it| it == "memory")
        })
    };
    let v2 = || mounted(mounts, path_where(&|id, _| id == "0")?, &V2, |kind, _| kind == "cgroup2");
    v1().or_else(v2)
}

/// Where `path` of a group's tree can be seen.
fn mounted(
    mounts: &str,
    path: &str,
    names: &'static Names,
    is_it: impl Fn(&str, &str) -> bool,
) -> Option<Group> {
    mounts.lines().find_map(|line| {
        // `36 35 98:0 /root /mount/point rw,noatime master:1 - cgroup2 cgroup2 rw,memory`
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(3);
        let (root, point) = (left.next()?, unescape(left.next()?));
        let mut right = right.split(' ');
        let (kind, options) = (right.next()?, right.nth(1).unwrap_or_default());
        if !is_it(kind, options) {
            return None;
        }
        // In a container the mount may show only the container's own part of the tree.
        let inside = Path::new(path).strip_prefix(unescape(root)).unwrap_or(Path::new(""));
        let top = PathBuf::from(point);
        Some(Group { folder: top.join(inside), top, names })
    })
}

/// `\040` stands for a space, and three more for what else would break the line.
fn unescape(text: &str) -> String {
    text.replace(r"\040", " ").replace(r"\011", "\t").replace(r"\012", "\n").replace(r"\134", r"\")
}

/// The number that a file holds; `max`, which is no limit, is none.
fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The number behind `name` at the start of a line.
fn line_number(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(groups: &str, mounts: &str) -> Option<(String, &'static str)> {
        find(groups, mounts).map(|it| (it.folder.display().to_string(), it.names.peak))
    }

    const BOTH: &str = "14 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
                        20 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";

    #[test]
    fn the_version_that_has_the_memory_controller_is_taken() {
        let both = "4:cpu,memory:/job\n0::/other\n";
        assert_eq!(found(both, BOTH), Some(("/sys/fs/cgroup/memory/job".to_owned(), V1.peak)));
        let only_v2 = "30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(
            found("0::/user.slice\n", only_v2),
            Some(("/sys/fs/cgroup/user.slice".to_owned(), V2.peak))
        );
        assert_eq!(found("0::/\n", ""), None);
        assert_eq!(found("", BOTH), None);
    }

    #[test]
    fn a_container_sees_its_own_part_of_the_tree() {
        let mounts = r"30 23 0:26 /docker/12 /sys/fs/c\040group rw - cgroup2 cgroup2 rw";
        assert_eq!(found("0::/docker/12/a", mounts), Some(("/sys/fs/c group/a".to_owned(), V2.peak)));
        assert_eq!(found("0::/../elsewhere", mounts), Some(("/sys/fs/c group/".to_owned(), V2.peak)));
    }

    #[test]
    fn a_limit_further_up_counts_and_page_cache_is_not_in_the_way() {
        let top = tempfile::tempdir().unwrap();
        let folder = top.path().join("job");
        fs::create_dir(&folder).unwrap();
        let put = |folder: &Path, name: &str, text: &str| fs::write(folder.join(name), text).unwrap();
        let group = Group { folder: folder.clone(), top: top.path().to_owned(), names: &V2 };
        put(&folder, V2.limit, "max\n");
        put(&folder, V2.usage, "600\n");
        assert_eq!(group.available_bytes(), None);
        put(top.path(), V2.limit, "1000\n");
        put(top.path(), V2.usage, "900\n");
        assert_eq!(group.available_bytes(), Some(100));
        put(top.path(), "memory.stat", "anon 1\ninactive_file 200\nactive_file 50\n");
        assert_eq!(group.available_bytes(), Some(350));
    }

    #[test]
    fn some_memory_is_available_here() {
        assert!(available_bytes().is_some_and(|it| it > 1 << 20));
    }
}
