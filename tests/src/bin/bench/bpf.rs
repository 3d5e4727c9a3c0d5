//! What the kernel knows of its programs, and an empty program to compare with.
//!
//! Statistics are read from /proc of the process that holds the program, so that programs of
//! the same name that others loaded are not taken for ours. The empty program is loaded by
//! the bare system call: a loader of ELF objects has no use for two instructions.

use std::{
    fs, io,
    mem::size_of,
    os::fd::{AsFd, AsRawFd, FromRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result};

/// The kinds of program that dist-ctl has (`enum bpf_prog_type`).
pub(crate) const SOCK_OPS: u32 = 13;
pub(crate) const CGROUP_SOCK_ADDR: u32 = 18;
pub(crate) const SK_REUSEPORT: u32 = 21;

/// How often programs of a kind ran, and how long that took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Runs {
    pub(crate) count: u64,
    pub(crate) nanoseconds: u64,
}

impl Runs {
    /// Of all programs of a kind that a process holds. Counted only while statistics are on.
    pub(crate) fn of(pid: i32, kind: u32) -> Result<Self> {
        let directory = format!("/proc/{pid}/fdinfo");
        let mut sum = Self::default();
        let mut seen = Vec::new();
        for entry in fs::read_dir(&directory).with_context(|| format!("read {directory}"))? {
            // Descriptors come and go.
            let Ok(text) = fs::read_to_string(entry?.path()) else { continue };
            let fact = |name: &str| -> Option<u64> {
                let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"))?;
                line.trim().parse().ok()
            };
            // A link's descriptor names its program as well, but has no type.
            if fact("prog_type") != Some(kind.into()) {
                continue;
            }
            let id = fact("prog_id").context("a program has an id")?;
            if !seen.contains(&id) {
                seen.push(id);
                sum.count += fact("run_cnt").context("a program's runs are counted")?;
                sum.nanoseconds += fact("run_time_ns").context("a program's runs are timed")?;
            }
        }
        Ok(sum)
    }

    pub(crate) fn since(self, before: Self) -> Self {
        Self { count: self.count - before.count, nanoseconds: self.nanoseconds - before.nanoseconds }
    }

    /// What one run takes. `None` if there was none.
    pub(crate) fn each(self) -> Option<f64> {
        (self.count > 0).then(|| self.nanoseconds as f64 / self.count as f64)
    }
}

/// A program for a reuseport group that decides nothing: the kernel goes on with its own hash.
pub(crate) struct Empty(OwnedFd);

impl Empty {
    pub(crate) fn load() -> Result<Self> {
        // r0 = SK_PASS; exit. See Documentation/bpf/standardization/instruction-set.rst.
        let instructions = [0x0000_0001_0000_00b7u64, 0x95];
        let license = *b"GPL\0";
        let attributes = LoadAttributes {
            kind: SK_REUSEPORT,
            instruction_count: instructions.len() as u32,
            instructions: instructions.as_ptr() as u64,
            license: license.as_ptr() as u64,
            log: [0; 2],
            kernel_version_and_flags: 0,
            name: *b"bench_empty\0\0\0\0\0",
            interface: 0,
            attach_type: SK_REUSEPORT_SELECT,
        };
        // SAFETY: the kernel reads so many bytes of `attributes`, and the instructions and the
        // text it points to, all of which live until the call returns.
        let descriptor = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                PROG_LOAD,
                (&raw const attributes).cast::<libc::c_void>(),
                size_of::<LoadAttributes>(),
            )
        };
        if descriptor < 0 {
            return Err(io::Error::last_os_error()).context("load an empty program");
        }
        // SAFETY: the call succeeded, so this is a new descriptor, and nobody else has it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(descriptor as i32) }))
    }

    /// Puts it in charge of the group a listener is in.
    pub(crate) fn attach(&self, listener: impl AsFd) -> Result<()> {
        let program = self.0.as_raw_fd();
        // SAFETY: the kernel reads the four bytes of `program`.
        let result = unsafe {
            libc::setsockopt(
                listener.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_REUSEPORT_EBPF,
                (&raw const program).cast(),
                size_of::<i32>() as libc::socklen_t,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error()).context("attach an empty program");
        }
        Ok(())
    }
}

const PROG_LOAD: i32 = 5;
/// BPF_SK_REUSEPORT_SELECT of `enum bpf_attach_type`.
const SK_REUSEPORT_SELECT: u32 = 39;

/// The begin of the member of `union bpf_attr` that BPF_PROG_LOAD uses.
#[repr(C)]
struct LoadAttributes {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    /// Level and size; address.
    log: [u64; 2],
    kernel_version_and_flags: u64,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

const _: () = assert!(size_of::<LoadAttributes>() == 72);
