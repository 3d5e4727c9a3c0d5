//! The bpf system call, for what aya has no public API for.
//!
//! Pins of any kind as descriptors, links to a cgroup and what they say of themselves, and
//! entries of maps whose sizes are known only when it runs. Each function is one command.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    ptr,
};

use super::pins::Shape;

// enum bpf_cmd (include/uapi/linux/bpf.h)
const MAP_CREATE: u32 = 0;
const MAP_LOOKUP_ELEM: u32 = 1;
const MAP_UPDATE_ELEM: u32 = 2;
const MAP_DELETE_ELEM: u32 = 3;
const MAP_GET_NEXT_KEY: u32 = 4;
const OBJ_PIN: u32 = 6;
const OBJ_GET: u32 = 7;
const OBJ_GET_INFO_BY_FD: u32 = 15;
const LINK_CREATE: u32 = 28;
const LINK_UPDATE: u32 = 29;

// The members of union bpf_attr that these commands take, as far as we fill them.

#[repr(C)]
struct CreateMapAttr {
    kind: u32,
    key_size: u32,
    value_size: u32,
    entries: u32,
    flags: u32,
    padding: u32,
}

#[repr(C)]
struct ElementAttr {
    map: u32,
    padding: u32,
    key: u64,
    /// Or the next key.
    value: u64,
    flags: u64,
}

#[repr(C)]
struct PinAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
struct InfoAttr {
    fd: u32,
    length: u32,
    info: u64,
}

#[repr(C)]
struct CreateLinkAttr {
    program: u32,
    target: u32,
    kind: u32,
    flags: u32,
}

#[repr(C)]
struct UpdateLinkAttr {
    link: u32,
    program: u32,
    flags: u32,
    padding: u32,
}

/// struct bpf_link_info of a link to a cgroup.
#[repr(C)]
#[derive(Default)]
struct CgroupLinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    padding: u32,
    cgroup: u64,
    attach_type: u32,
    tail: u32,
}

/// What a link to a cgroup says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LinkInfo {
    /// The program's id.
    pub(super) program: u32,
    /// The cgroup's inode number. 0: it was removed, and the link does nothing any more.
    pub(super) cgroup: u64,
}

/// Entries of a map, as bytes. A per-CPU value is as long as all CPUs' together.
pub(super) struct Entries<'a> {
    pub(super) map: BorrowedFd<'a>,
    pub(super) key_size: usize,
    pub(super) value_size: usize,
    /// As many as it may have.
    pub(super) most: usize,
}

/// Makes a map in which everything is zero, or nothing.
pub(super) fn create_map(shape: Shape) -> io::Result<OwnedFd> {
    let Shape { kind, key: key_size, value: value_size, entries, flags } = shape;
    let mut attributes = CreateMapAttr { kind, key_size, value_size, entries, flags, padding: 0 };
    let fd = bpf(MAP_CREATE, &mut attributes)?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Opens a pin: a map, a program or a link.
pub(super) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let fd = bpf(OBJ_GET, &mut PinAttr { path: path.as_ptr() as u64, fd: 0, flags: 0 })?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Pins a map, a program or a link.
pub(super) fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    bpf(OBJ_PIN, &mut PinAttr { path: path.as_ptr() as u64, fd: fd.as_raw_fd() as u32, flags: 0 }).map(drop)
}

/// Attaches a program to a cgroup, beside those that are there. `kind` is an `enum
/// bpf_attach_type`.
pub(super) fn create_link(program: BorrowedFd<'_>, cgroup: BorrowedFd<'_>, kind: u32) -> io::Result<OwnedFd> {
    let (program, target) = (program.as_raw_fd() as u32, cgroup.as_raw_fd() as u32);
    let fd = bpf(LINK_CREATE, &mut CreateLinkAttr { program, target, kind, flags: 0 })?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Replaces the program of a link: each run is of the one or of the other.
pub(super) fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let (link, program) = (link.as_raw_fd() as u32, program.as_raw_fd() as u32);
    bpf(LINK_UPDATE, &mut UpdateLinkAttr { link, program, flags: 0, padding: 0 }).map(drop)
}

/// Asks a link to a cgroup.
pub(super) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let mut info = CgroupLinkInfo::default();
    let length = size_of::<CgroupLinkInfo>() as u32;
    let info_at = ptr::from_mut(&mut info) as u64;
    bpf(OBJ_GET_INFO_BY_FD, &mut InfoAttr { fd: link.as_raw_fd() as u32, length, info: info_at })?;
    Ok(LinkInfo { program: info.program, cgroup: info.cgroup })
}

impl Entries<'_> {
    /// All keys that there are. When one is removed meanwhile, the kernel may begin again, and some
    /// come twice; that is cut short.
    pub(super) fn keys(&self) -> io::Result<Vec<Vec<u8>>> {
        let mut keys: Vec<Vec<u8>> = Vec::new();
        while keys.len() <= 2 * self.most {
            let mut next = vec![0u8; self.key_size];
            let key = keys.last().map_or(0, |key| key.as_ptr() as u64);
            match self.command(MAP_GET_NEXT_KEY, key, next.as_mut_ptr() as u64, 0) {
                Ok(()) => keys.push(next),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(keys),
                Err(error) => return Err(error),
            }
        }
        Ok(keys)
    }

    /// An entry's value, if there is such an entry.
    pub(super) fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        assert_eq!(key.len(), self.key_size, "the key is one of this map");
        let mut value = vec![0u8; self.value_size];
        match self.command(MAP_LOOKUP_ELEM, key.as_ptr() as u64, value.as_mut_ptr() as u64, 0) {
            Ok(()) => Ok(Some(value)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes an entry.
    pub(super) fn set(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        assert_eq!((key.len(), value.len()), (self.key_size, self.value_size), "an entry of this map");
        self.command(MAP_UPDATE_ELEM, key.as_ptr() as u64, value.as_ptr() as u64, 0)
    }

    /// Removes an entry, if there is such an entry.
    pub(super) fn remove(&self, key: &[u8]) -> io::Result<()> {
        assert_eq!(key.len(), self.key_size, "the key is one of this map");
        match self.command(MAP_DELETE_ELEM, key.as_ptr() as u64, 0, 0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn command(&self, command: u32, key: u64, value: u64, flags: u64) -> io::Result<()> {
        let map = self.map.as_raw_fd() as u32;
        bpf(command, &mut ElementAttr { map, padding: 0, key, value, flags }).map(drop)
    }
}

/// The system call. Not for other files: `T` has to be what the command takes.
fn bpf<T>(command: u32, attributes: &mut T) -> io::Result<i32> {
    // SAFETY: each caller above gives the structure of its command, and what the addresses in it
    // point to lives until the call returns and has the size by which the kernel goes: a text
    // with its end, a structure whose length is told, a key or a value of that map.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}
