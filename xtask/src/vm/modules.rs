//! A kernel's modules: those that a guest needs, each after those that it needs itself.
//!
//! A package of a kernel has no modules.dep, which depmod makes when it is installed; each module
//! says in its section .modinfo what it depends on.

#![forbid(unsafe_code)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};

/// What the tests need and a cloud kernel need not have built in: pairs of links, ends of wires, the
/// host's directories, and asking which sockets there are. The kernel would load the last by itself,
/// if the guest had modprobe.
pub(crate) const WANTED: [&str; 7] =
    ["veth", "tun", "virtio_pci", "virtiofs", "inet_diag", "tcp_diag", "mptcp_diag"];

/// A module, ready to be loaded.
pub(crate) struct Module {
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
}

/// All modules of a kernel.
pub(crate) struct Modules {
    files: BTreeMap<String, PathBuf>,
    built_in: BTreeSet<String>,
}

impl Modules {
    /// Those in a directory such as /lib/modules/6.1.0-44-cloud-amd64.
    pub(crate) fn find(directory: &Path) -> Result<Self> {
        let list = directory.join("modules.builtin");
        let list = fs::read_to_string(&list).with_context(|| format!("read {}", list.display()))?;
        let built_in = list.lines().filter_map(|line| name(Path::new(line))).collect();
        let mut files = BTreeMap::new();
        walk(directory, &mut files)?;
        Ok(Self { files, built_in })
    }

    /// Those that are wanted and not built in, in the order in which they can be loaded; and the
    /// names of those that this kernel does not have.
    pub(crate) fn in_order(&self, wanted: &[&str]) -> Result<(Vec<Module>, Vec<String>)> {
        let (mut order, mut absent) = (Vec::new(), Vec::new());
        for name in wanted {
            if self.built_in.contains(*name) {
                continue;
            }
            if self.files.contains_key(*name) {
                self.visit(name, &mut order)?;
            } else {
                absent.push((*name).to_owned());
            }
        }
        Ok((order, absent))
    }

    fn visit(&self, wanted: &str, order: &mut Vec<Module>) -> Result<()> {
        if self.built_in.contains(wanted) || order.iter().any(|module| module.name == wanted) {
            return Ok(());
        }
        let file = self.files.get(wanted).with_context(|| format!("the kernel has no module {wanted}"))?;
        let bytes = unpacked(file)?;
        for needed in dependencies(&bytes) {
            self.visit(&needed, order)?;
        }
        order.push(Module { name: wanted.to_owned(), bytes });
        Ok(())
    }
}

fn walk(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("read {}", directory.display()))? {
        let path = entry.with_context(|| format!("read {}", directory.display()))?.path();
        if path.is_dir() {
            walk(&path, files)?;
        } else if let Some(name) = name(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// `virtio_pci` of `kernel/drivers/virtio/virtio-pci.ko.xz`.
fn name(file: &Path) -> Option<String> {
    let (name, _) = file.file_name()?.to_str()?.split_once(".ko")?;
    Some(name.replace('-', "_"))
}

fn unpacked(file: &Path) -> Result<Vec<u8>> {
    let program = match file.extension().and_then(|extension| extension.to_str()) {
        Some("ko") => return fs::read(file).with_context(|| format!("read {}", file.display())),
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => bail!("{} is packed in a way that nobody here knows", file.display()),
    };
    let output = Command::new(program)
        .arg("-dc")
        .arg(file)
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("run {program}, to unpack {}", file.display()))?;
    ensure!(output.status.success(), "{program} could not unpack {}", file.display());
    Ok(output.stdout)
}

/// The entry `depends=a,b` of .modinfo, whose entries end with a zero byte.
fn dependencies(module: &[u8]) -> Vec<String> {
    const ENTRY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(ENTRY.len()).position(|window| window == ENTRY) else {
        return Vec::new();
    };
    let list = module[at + ENTRY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let list = String::from_utf8_lossy(list);
    list.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_says_what_it_depends_on() {
        for (module, needed) in [
            (&b"license=GPL\0depends=virtio_ring,virtio\0retpoline=Y\0"[..], &["virtio_ring", "virtio"][..]),
            (b"license=GPL\0depends=\0", &[]),
            (b"license=GPL\0softdepends=x\0", &[]),
        ] {
            assert_eq!(dependencies(module), needed);
        }
    }

    #[test]
    fn a_module_has_the_same_name_however_its_file_is_written() {
        for (file, expected) in [
            ("kernel/drivers/net/veth.ko", Some("veth")),
            ("kernel/drivers/virtio/virtio-pci.ko.xz", Some("virtio_pci")),
            ("modules.order", None),
        ] {
            assert_eq!(name(Path::new(file)).as_deref(), expected, "{file}");
        }
    }
}
