//! How much memory the processes of a cgroup hold.
//!
//! By the cgroup's own account where the memory controller is there for it: what cannot be had back by
//! dropping what was read of files. Else by their resident pages (RSS), in which those that are shared
//! are counted for each process: that is cheap, and never too little.
#![forbid(unsafe_code)]

use std::{fs, io};

use crate::cgroup::Cgroup;

/// In bytes. `None`: it cannot be read.
pub fn of(cgroup: &Cgroup) -> Option<u64> {
    by_controller(cgroup).or_else(|| Some(cgroup.members().ok()?.into_iter().map(resident).sum()))
}

/// What memory.current says, without the file pages that were not used lately. `None`: there is no
/// controller.
fn by_controller(cgroup: &Cgroup) -> Option<u64> {
    let read = |name: &str| fs::read_to_string(cgroup.path().join(name));
    let current: u64 = read("memory.current").ok()?.trim().parse().ok()?;
    let stat = read("memory.stat").unwrap_or_default();
    let inactive = stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.trim().parse().ok());
    Some(current.saturating_sub(inactive.unwrap_or(0)))
}

/// Field 2 of statm in proc(5), in pages. One that is gone has none.
fn resident(pid: u32) -> u64 {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    let pages: u64 = statm.split_whitespace().nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}

/// Has the controller account for the cgroups below this one, if it is there for this one.
pub fn enable(cgroup: &Cgroup) -> io::Result<()> {
    let controllers = fs::read_to_string(cgroup.path().join("cgroup.controllers"))?;
    match controllers.split_whitespace().any(|controller| controller == "memory") {
        true => fs::write(cgroup.path().join("cgroup.subtree_control"), "+memory"),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What looks like a cgroup, with these files.
    fn cgroup(name: &str, files: &[(&str, &str)]) -> Cgroup {
        let path = std::env::temp_dir().join(format!("dist-ctl-memory-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        for (file, text) in files {
            fs::write(path.join(file), text).unwrap();
        }
        Cgroup::at(path)
    }

    #[test]
    fn the_controller_is_asked_first() {
        let me = std::process::id().to_string();
        for (row, files, expected) in [
            ("a controller", vec![("memory.current", "5000\n")], Some(5000)),
            (
                "file pages",
                vec![("memory.current", "5000\n"), ("memory.stat", "anon 1\ninactive_file 3000\nfile 9\n")],
                Some(2000),
            ),
            ("nobody", vec![("cgroup.procs", "")], Some(0)),
        ] {
            let cgroup = cgroup("asked", &[&[("cgroup.procs", me.as_str())][..], &files].concat());
            assert_eq!(of(&cgroup), expected, "{row}");
            fs::remove_dir_all(cgroup.path()).unwrap();
        }
        let mine = cgroup("mine", &[("cgroup.procs", &me)]);
        let before = of(&mine).unwrap();
        let held = vec![1_u8; 64 << 20];
        let after = of(&mine).unwrap();
        fs::remove_dir_all(mine.path()).unwrap();
        // Other tests come and go meanwhile, but nothing here is so large.
        assert!(after > before + (32 << 20), "{before} {after} {}", held.len());
    }

    #[test]
    fn it_is_enabled_only_where_it_is() {
        for (controllers, expected) in [("cpu memory io\n", Some("+memory")), ("cpu hugetlb\n", None)] {
            let cgroup = cgroup("enabled", &[("cgroup.controllers", controllers)]);
            enable(&cgroup).unwrap();
            let written = fs::read_to_string(cgroup.path().join("cgroup.subtree_control")).ok();
            assert_eq!(written.as_deref(), expected);
            fs::remove_dir_all(cgroup.path()).unwrap();
        }
    }
}
