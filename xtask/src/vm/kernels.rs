//! Which kernels there are, and fetching one: Debian's packages, unpacked and never installed.
//!
//! apt is given directories and a list of sources of our own below `target/vm`, so that it leaves the
//! machine's alone. Where Debian's archives are to be had is asked of the machine's own sources;
//! only the suite is another.

#![forbid(unsafe_code)]

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use xtask::toolchain::Version;

use super::modules::Modules;
use crate::exec::{exec, find, read, say};

/// The package that depends on the newest kernel of its suite. Cloud kernels are small, and boot
/// without modules.
const NEWEST: &str = "linux-image-cloud-amd64";

/// The key by which Debian's archives are signed, of every suite.
const KEY: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// What dist-ctl is to do on a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Everything.
    Works,
    /// Everything, and to wake servers itself: the kernel does not when it moves a connection.
    NeverWakes,
    /// To refuse it in one sentence.
    Refused,
}

/// A kernel by the name that one types.
#[derive(Debug)]
pub(crate) struct Known {
    pub(crate) name: &'static str,
    pub(crate) role: Role,
    suites: &'static [Suite],
    package: Package,
    /// Nobody offers an old kernel for ever: without it, the others are booted all the same.
    pub(crate) may_be_gone: bool,
}

/// A suite of one of Debian's archives.
#[derive(Debug)]
enum Suite {
    Main(&'static str),
    Security(&'static str),
}

#[derive(Debug)]
enum Package {
    /// The newest whose version begins so.
    Newest(&'static str),
    /// The first of these that is still offered.
    Image(&'static [&'static str]),
}

use Package::{Image, Newest};
use Suite::{Main, Security};

pub(crate) const KNOWN: [Known; 5] = [
    Known {
        name: "5.10",
        role: Role::Refused,
        suites: &[Main("bullseye"), Security("bullseye-security")],
        package: Newest("5.10."),
        may_be_gone: true,
    },
    Known {
        name: "6.1",
        role: Role::Works,
        suites: &[Main("bookworm"), Security("bookworm-security")],
        package: Newest("6.1."),
        may_be_gone: false,
    },
    Known {
        name: "6.12",
        role: Role::Works,
        suites: &[Main("trixie"), Security("trixie-security"), Main("bookworm-backports")],
        package: Newest("6.12."),
        may_be_gone: false,
    },
    // These went out of support before the fix came, or were released before it.
    Known {
        name: "no-wake",
        role: Role::NeverWakes,
        suites: &[Main("trixie-backports"), Main("bookworm-backports")],
        package: Image(&["6.18.15+deb13", "6.16.12+deb13", "6.17.13+deb13", "6.12.85+deb12"]),
        may_be_gone: true,
    },
    Known {
        name: "7",
        role: Role::Works,
        suites: &[Main("trixie-backports"), Main("forky"), Main("sid")],
        package: Newest("7."),
        may_be_gone: false,
    },
];

/// What is missing in each matrix: a kernel that nobody offers whom we may ask.
pub(crate) const ABSENT: &str = "5.15: SKIPPED: no suite of Debian's that is still offered has it";

/// A kernel that can be booted.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    /// What was typed: `6.1`, or the path's last part.
    pub(crate) name: String,
    /// `6.1.0-56-cloud-amd64`, or what is known of it.
    pub(crate) release: String,
    pub(crate) role: Role,
    pub(crate) image: PathBuf,
    modules: Option<PathBuf>,
}

impl Kernel {
    /// `None`: it came without any, and what it has built in is not known.
    pub(crate) fn modules(&self) -> Result<Option<Modules>> {
        self.modules.as_deref().map(Modules::find).transpose()
    }

    /// An image that one can boot, or a directory into which a kernel's packages were unpacked.
    pub(crate) fn at(path: &Path) -> Result<Self> {
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        if path.is_dir() {
            return Self::unpacked(name, Role::Works, path);
        }
        ensure!(
            is_image(path).with_context(|| format!("read {}", path.display()))?,
            "{} is no kernel that can be booted: give a file such as /boot/vmlinuz-6.12.0-amd64, or a directory \
             into which a kernel's packages were unpacked",
            path.display()
        );
        let modules = modules_of(path);
        let release = match modules.as_deref().and_then(Path::file_name) {
            Some(release) => release.to_string_lossy().into_owned(),
            None => "a file, without modules".to_owned(),
        };
        Ok(Self { name, release, role: Role::Works, image: path.to_owned(), modules })
    }

    fn unpacked(name: String, role: Role, root: &Path) -> Result<Self> {
        let found: Vec<_> = MODULES
            .into_iter()
            .filter_map(|directory| fs::read_dir(root.join(directory)).ok())
            .flatten()
            .collect::<Result<_, _>>()
            .with_context(|| format!("read the directories of modules in {}", root.display()))?;
        let Some(modules) = found.first().map(fs::DirEntry::path) else {
            bail!(
                "{} has no lib/modules: give a directory into which a kernel's packages were unpacked",
                root.display()
            );
        };
        ensure!(
            found.iter().all(|other| Some(other.file_name().as_os_str()) == modules.file_name()),
            "{} has several kernels: give the image of one, such as its boot/vmlinuz-{}",
            root.display(),
            modules.file_name().unwrap_or_default().display()
        );
        let release = modules.file_name().context("a release has a name")?.to_string_lossy().into_owned();
        // Since 7.2 it lies with its modules.
        let image = [root.join("boot").join(format!("vmlinuz-{release}")), modules.join("vmlinuz")]
            .into_iter()
            .find(|image| image.is_file())
            .with_context(|| format!("{} has no vmlinuz", root.display()))?;
        Ok(Self { name, release, role, image, modules: Some(modules) })
    }
}

/// Where a package puts its modules, below the root.
const MODULES: [&str; 2] = ["lib/modules", "usr/lib/modules"];

/// Whether it begins as what a boot loader loads: "HdrS", at the place that the kernel's
/// Documentation/arch/x86/boot.rst gives.
fn is_image(path: &Path) -> io::Result<bool> {
    const MAGIC: &[u8; 4] = b"HdrS";
    const AT: u64 = 0x202;
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(AT))?;
    let mut found = Vec::new();
    file.take(MAGIC.len() as u64).read_to_end(&mut found)?;
    Ok(found == MAGIC)
}

/// The modules of an image that lies where a package puts it: in boot, or with its modules.
fn modules_of(image: &Path) -> Option<PathBuf> {
    let directory = image.parent()?;
    if directory.join("modules.builtin").is_file() {
        return Some(directory.to_owned());
    }
    let release = image.file_name()?.to_str()?.strip_prefix("vmlinuz-")?;
    let root = directory.parent()?;
    MODULES.into_iter().map(|modules| root.join(modules).join(release)).find(|modules| modules.is_dir())
}

impl Suite {
    fn name(&self) -> &'static str {
        match self {
            Main(name) | Security(name) => name,
        }
    }
}

fn names_of(suites: &[Suite]) -> String {
    suites.iter().map(Suite::name).collect::<Vec<_>>().join(", ")
}

impl Known {
    pub(crate) fn named(name: &str) -> Option<&'static Self> {
        KNOWN.iter().find(|known| known.name == name)
    }

    /// The kernel; `None` if it may be gone, and is.
    pub(crate) fn fetch(&self, directory: &Path) -> Result<Option<Kernel>> {
        let root = directory.join("kernels").join(self.name);
        if !root.is_dir() {
            let apt = Apt::new(&directory.join("apt").join(self.name), self.suites)?;
            let Some(image) = self.choose(&apt)? else {
                ensure!(
                    self.may_be_gone,
                    "fetch Linux {}: none is offered in {}: see whether this machine reaches Debian's archives \
                     (apt-get update), or give the path of a kernel instead (--kernel PATH)",
                    self.name,
                    names_of(self.suites)
                );
                return Ok(None);
            };
            say(&format!("vm: fetching {image} for {}", self.name));
            // Aside, then renamed: what is there later is whole.
            let aside = root.with_extension("part");
            if aside.exists() {
                fs::remove_dir_all(&aside).context("remove what was fetched by half")?;
            }
            fs::create_dir_all(&aside).context("make a directory for a kernel")?;
            apt.unpack(&image, &aside)?;
            fs::rename(&aside, &root).context("put the kernel in place")?;
        }
        Kernel::unpacked(self.name.to_owned(), self.role, &root).map(Some)
    }

    fn choose(&self, apt: &Apt) -> Result<Option<String>> {
        match self.package {
            Newest(prefix) => {
                let listed = apt.ask("apt-cache", &["madison", NEWEST])?;
                let Some(version) = newest(&listed, prefix) else {
                    return Ok(None);
                };
                let wanted = format!("{NEWEST}={version}");
                let images = apt.dependencies(&wanted, "linux-image-")?;
                Ok(Some(images.into_iter().next().with_context(|| format!("{wanted} names no image"))?))
            }
            Image(versions) => {
                for version in versions {
                    let image = format!("linux-image-{version}-cloud-amd64");
                    // Nothing is printed of a package that is not offered.
                    if !apt.ask("apt-cache", &["madison", &image])?.trim().is_empty() {
                        return Ok(Some(image));
                    }
                }
                Ok(None)
            }
        }
    }
}

/// The newest version in `package | version | source` lines that begins with `prefix`.
fn newest(listed: &str, prefix: &str) -> Option<String> {
    let versions = listed.lines().filter_map(|line| line.split('|').nth(1)).map(str::trim);
    versions
        .filter(|version| version.starts_with(prefix))
        .max_by_key(|version| Version::parse(version))
        .map(str::to_owned)
}

/// apt with directories of its own.
struct Apt {
    options: Vec<String>,
    directory: PathBuf,
}

impl Apt {
    /// Has fetched the lists of these suites, as far as they are to be had.
    fn new(directory: &Path, suites: &[Suite]) -> Result<Self> {
        for program in ["apt-get", "apt-cache", "dpkg"] {
            ensure!(
                find(program).is_some(),
                "fetch a kernel: it is a package of Debian's, and there is no {program} here: give the path of \
                 a kernel instead (--kernel PATH)"
            );
        }
        for part in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(directory.join(part)).context("make directories for apt")?;
        }
        let directory = directory.canonicalize().context("find the directory for apt")?;
        let sources = directory.join("sources.list");
        fs::write(&sources, sources_of(suites)?).context("write a list of sources for apt")?;
        let [lists, cache] = ["lists", "cache"].map(|part| directory.join(part));
        let options = [
            format!("Dir::Etc::sourcelist={}", sources.display()),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            format!("Dir::State::lists={}", lists.display()),
            format!("Dir::Cache={}", cache.display()),
            "Dir::Cache::pkgcache=".to_owned(),
            "Dir::Cache::srcpkgcache=".to_owned(),
            "Debug::NoLocking=1".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
            // "Download is performed unsandboxed as root as file ... couldn't be accessed by user '_apt'."
            "APT::Sandbox::User=root".to_owned(),
        ];
        let options = options.into_iter().flat_map(|option| ["-o".to_owned(), option]).collect();
        let apt = Self { options, directory };
        // A suite that is gone is no reason not to look into the others; who finds nothing says so.
        // (By itself, apt-get only warns.)
        if apt.ask("apt-get", &["update", "-q", "-o", "APT::Update::Error-Mode=any"]).is_err() {
            say(&format!("vm: not every list of packages of {} could be fetched", names_of(suites)));
        }
        Ok(apt)
    }

    fn ask(&self, program: &str, words: &[&str]) -> Result<String> {
        read(Command::new(program).args(&self.options).args(words).env("LC_ALL", "C"))
    }

    fn offers(&self, package: &str) -> bool {
        self.ask("apt-cache", &["show", package]).is_ok_and(|about| !about.is_empty())
    }

    /// The dependencies of a package that begin so, without their versions.
    fn dependencies(&self, package: &str, prefix: &str) -> Result<Vec<String>> {
        let about = self.ask("apt-cache", &["show", package])?;
        let line = about.lines().find_map(|line| line.strip_prefix("Depends: ")).unwrap_or_default();
        let names = line.split([',', '|']).filter_map(|one| one.split_whitespace().next());
        Ok(names.filter(|name| name.starts_with(prefix)).map(str::to_owned).collect())
    }

    /// Unpacks an image, and what it is split into since 6.19.
    fn unpack(&self, image: &str, root: &Path) -> Result<()> {
        let mut packages = vec![image.to_owned()];
        for prefix in ["linux-base-", "linux-binary-", "linux-modules-"] {
            let dependencies = self.dependencies(image, prefix)?;
            // An older image stays longer than some of its parts, which a guest may do without.
            packages.extend(dependencies.into_iter().filter(|package| self.offers(package)));
        }
        let debs = self.directory.join("debs");
        if debs.exists() {
            fs::remove_dir_all(&debs).context("remove packages of which not all were fetched")?;
        }
        fs::create_dir_all(&debs).context("make a directory for packages")?;
        let mut download = Command::new("apt-get");
        download.args(&self.options).args(["download", "-q"]).args(&packages).current_dir(&debs);
        read(&mut download).with_context(|| format!("fetch {}", packages.join(", ")))?;
        for deb in fs::read_dir(&debs).context("read the packages")? {
            let deb = deb.context("read the packages")?.path();
            exec(Command::new("dpkg").arg("-x").arg(&deb).arg(root))?;
        }
        fs::remove_dir_all(&debs).context("remove the packages")
    }
}

/// Lines for apt's list of sources, with the machine's own addresses of Debian's archives.
fn sources_of(suites: &[Suite]) -> Result<String> {
    let address = |label: &str| -> Result<String> {
        let words = ["indextargets", "--format", "$(REPO_URI)", "Origin: Debian", label];
        let found = read(Command::new("apt-get").args(words).env("LC_ALL", "C"))?;
        let Some(first) = found.lines().next() else {
            bail!(
                "fetch a kernel: this machine's sources of packages have no archive of Debian's with \
                 \"{label}\": run apt-get update, or give the path of a kernel instead (--kernel PATH)"
            );
        };
        Ok(first.to_owned())
    };
    // Other keys than Debian's may be trusted for other archives.
    let key = if Path::new(KEY).exists() { format!("[signed-by={KEY}] ") } else { String::new() };
    let mut text = String::new();
    for suite in suites {
        let label = match suite {
            Main(_) => "Label: Debian",
            Security(_) => "Label: Debian-Security",
        };
        writeln!(text, "deb {key}{} {} main", address(label)?, suite.name())
            .context("a text can be written to")?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::{env, process};

    use super::*;

    #[test]
    fn a_path_is_a_kernel_or_a_sentence_says_why_not() {
        let root = env::temp_dir().join(format!("dist-ctl-kernels-{}", process::id()));
        let at = |path: &str| Kernel::at(&root.join(path));
        let write = |path: &str, bytes: &[u8]| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().expect("it has one")).expect("make directories");
            fs::write(path, bytes).expect("write a file");
        };
        let mut image = vec![0; 0x202];
        image.extend(b"HdrS");
        for path in ["bare/vmlinuz", "one/boot/vmlinuz-6.1.0", "new/usr/lib/modules/7.2.0/vmlinuz"] {
            write(path, &image);
        }
        for path in
            ["one/lib/modules/6.1.0", "new/usr/lib/modules/7.2.0", "two/lib/modules/1", "two/lib/modules/2"]
        {
            write(&format!("{path}/modules.builtin"), b"");
        }
        write("text", b"a text");
        write("none/boot/config", b"");
        for (path, release) in [
            ("bare/vmlinuz", "a file, without modules"),
            ("one", "6.1.0"),
            ("one/boot/vmlinuz-6.1.0", "6.1.0"),
            ("new", "7.2.0"),
            ("new/usr/lib/modules/7.2.0/vmlinuz", "7.2.0"),
        ] {
            let kernel = at(path).unwrap_or_else(|error| panic!("{path}: {error:#}"));
            assert_eq!(kernel.release, release, "{path}");
        }
        for (path, why) in [
            ("text", "is no kernel"),
            ("none", "has no lib/modules"),
            ("two", "has several kernels"),
            ("nothing", "No such file"),
        ] {
            let error = format!("{:#}", at(path).expect_err(path));
            assert!(error.contains(why), "{path}: {error}");
        }
        fs::remove_dir_all(&root).expect("remove what was made here");
    }

    #[test]
    fn the_newest_version_of_a_series_is_found_in_any_suite() {
        let listed = "\
linux-image-cloud-amd64 | 7.2.13-1 | http://x sid/main amd64 Packages
linux-image-cloud-amd64 | 7.3.4-1~bpo13+1 | http://x trixie-backports/main amd64 Packages
linux-image-cloud-amd64 | 6.12.118-1 | http://x trixie-security/main amd64 Packages
linux-image-cloud-amd64 |  6.12.95-1~bpo12+1 | http://x bookworm-backports/main amd64 Packages
";
        for (prefix, version) in
            [("7.", Some("7.3.4-1~bpo13+1")), ("6.12.", Some("6.12.118-1")), ("6.1.", None), ("5.15.", None)]
        {
            assert_eq!(newest(listed, prefix).as_deref(), version, "{prefix}");
        }
    }
}
