//! A machine that lacks something: rights, mounts.
//!
//! For the calling thread and what it starts, so do it in a thread that nothing else uses.

#![forbid(unsafe_code)]

use std::{os::unix::process::CommandExt as _, process::Command};

use rustix::{
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount},
    thread::{CapabilitySet, UnshareFlags, remove_capability_from_bounding_set},
};

use crate::{
    command::{self, Ended},
    host::{Host, program},
    leftover,
    network::unshare,
    wait::seconds,
};

/// Where most machines have their bpffs.
pub const BPFFS: &str = "/sys/fs/bpf";

/// Runs dist-ctl as nobody, with everything it needs but the rights.
#[track_caller]
pub fn as_nobody(host: &Host, words: &[&str]) -> Ended {
    let runtime = host.open_directory("nobody");
    let mut command = Command::new(host.copy_for_all(&program()));
    command.args(words).env("DIST_CTL_RUNTIME_DIR", format!("{runtime}/run")).uid(65534).gid(65534);
    let ended = command::run(&mut command, seconds(20.0));
    assert_eq!(leftover::of_instance(format!("{runtime}/run").as_ref()), []);
    ended
}

/// Does something where the mounts may be changed, in a thread that nothing else uses. The host's
/// directories are the same there.
pub fn elsewhere<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(UnshareFlags::NEWNS | UnshareFlags::FS).expect("make a mount namespace");
            mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
                .expect("keep our mounts to ourselves");
            work()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Takes cgroup v2 away from the calling thread's mounts.
#[track_caller]
pub fn unmount_cgroups() {
    while let Some(mount) = leftover::cgroup_mount_of_thread() {
        unmount(&mount, UnmountFlags::DETACH).expect("unmount cgroup v2");
    }
}

/// Takes the bpffs away from the calling thread's mounts.
pub fn unmount_bpffs() {
    while unmount(BPFFS, UnmountFlags::DETACH).is_ok() {}
}

/// Puts an empty one there.
#[track_caller]
pub fn mount_bpffs() {
    unmount_bpffs();
    mount("bpf", BPFFS, "bpf", MountFlags::empty(), None).expect("mount a bpffs");
}

/// Root, but not all of it: programs that the calling thread starts lack these.
#[track_caller]
pub fn renounce(capabilities: &[CapabilitySet]) {
    for capability in capabilities {
        remove_capability_from_bounding_set(*capability).expect("renounce a capability");
    }
}
