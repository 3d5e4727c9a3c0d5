//! From a kernel that has just booted to a machine in which programs can run.
//!
//! What an init system would do, as far as dist-ctl and its tests can tell the difference.

#![forbid(unsafe_code)]

use std::{
    ffi::CString,
    fs::{self, File},
    os::unix::fs::symlink,
    path::Path,
};

use anyhow::{Context as _, Result, ensure};
use rustix::{
    io::Errno,
    mount::{MountFlags, mount},
    process::{Resource, Rlimit, setrlimit},
    system::finit_module,
};
use tests::netlink;

use crate::{
    plan::{Plan, Share},
    say,
};

/// As many descriptors as systemd lets a service have.
const DESCRIPTORS: u64 = 524_288;

/// The controllers of cgroup v1 that a hybrid machine has, each in a tree of its own.
const CONTROLLERS: [&str; 8] = ["blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "memory", "pids"];

/// What even the plan cannot be carried out without.
pub(crate) fn mount_kernel_filesystems() -> Result<()> {
    for (kind, directory, options) in [
        ("proc", "/proc", c""),
        ("sysfs", "/sys", c""),
        ("devtmpfs", "/dev", c""),
        ("devpts", "/dev/pts", c"ptmxmode=0666"),
        ("tmpfs", "/dev/shm", c"mode=1777"),
        ("tmpfs", "/run", c"mode=755"),
        ("tmpfs", "/tmp", c"mode=1777"),
        ("bpf", "/sys/fs/bpf", c"mode=700"),
    ] {
        fs::create_dir_all(directory).with_context(|| format!("make {directory}"))?;
        mount(kind, directory, kind, MountFlags::empty(), options)
            .with_context(|| format!("mount {kind} on {directory}"))?;
    }
    // What devtmpfs leaves to an init system.
    for (name, target) in [("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")] {
        symlink(format!("/proc/self/fd{target}"), format!("/dev/{name}")).context("make links in /dev")?;
    }
    Ok(())
}

pub(crate) fn set_up(plan: &Plan) -> Result<()> {
    let limit = Rlimit { current: Some(1024), maximum: Some(DESCRIPTORS) };
    setrlimit(Resource::Nofile, limit).context("allow many descriptors")?;
    if plan.hybrid { mount_hybrid_cgroups() } else { mount_unified_cgroups() }?;
    for file in &plan.modules {
        load(file)?;
    }
    for Share { tag, directory, writable } in &plan.shares {
        fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
        let flags = if *writable { MountFlags::empty() } else { MountFlags::RDONLY };
        mount(tag, directory, "virtiofs", flags, None)
            .with_context(|| format!("mount the host's {tag} on {}", directory.display()))?;
    }
    netlink::bring_up("lo").context("bring the loopback up")
}

fn load(file: &Path) -> Result<()> {
    let module = File::open(file).with_context(|| format!("open {}", file.display()))?;
    match finit_module(&module, c"", 0) {
        // The kernel has loaded it by itself meanwhile.
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("load the kernel module {}", file.display())),
    }
}

/// One tree of cgroup v2, whose controllers every child may have.
fn mount_unified_cgroups() -> Result<()> {
    mount("cgroup2", "/sys/fs/cgroup", "cgroup2", MountFlags::empty(), None).context("mount cgroup v2")?;
    fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+cpu +memory +pids").context("allow controllers")
}

/// The controllers in trees of cgroup v1, and v2 without any beside them.
fn mount_hybrid_cgroups() -> Result<()> {
    let base = Path::new("/sys/fs/cgroup");
    mount("tmpfs", base, "tmpfs", MountFlags::empty(), c"mode=755").context("mount a tmpfs for cgroups")?;
    let mut mounted = 0;
    for controller in CONTROLLERS {
        let directory = base.join(controller);
        fs::create_dir(&directory).context("make a directory for a cgroup controller")?;
        let options = CString::new(controller).context("a controller has a name")?;
        match mount("cgroup", &directory, "cgroup", MountFlags::empty(), options.as_c_str()) {
            Ok(()) => mounted += 1,
            // Newer kernels have given up cgroup v1 one by one.
            Err(Errno::INVAL) => {
                say(&format!("this kernel has no cgroup v1 controller {controller}"));
                fs::remove_dir(&directory).context("remove its directory")?;
            }
            Err(error) => return Err(error).context("mount a cgroup controller"),
        }
    }
    ensure!(mounted > 0, "this kernel has no cgroup v1");
    let directory = base.join("unified");
    fs::create_dir(&directory).context("make a directory for cgroup v2")?;
    mount("cgroup2", &directory, "cgroup2", MountFlags::empty(), None).context("mount cgroup v2")
}
