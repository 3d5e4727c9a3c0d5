//! The toolchain that makes the eBPF object: which one is here, does it work, run it.
//!
//! Takes the workspace's directory; gives the object, or says what is missing. Called by
//! the build script of `distributor-user` and by `cargo xtask`. Must never install or
//! repair anything: that is `cargo xtask setup`, which somebody asked for.
//!
//! rustc hands LLVM bitcode to bpf-linker, so both have to agree about LLVM. That is not
//! read from version numbers: a tiny program is linked each time, which takes 0.1 s.

#![forbid(unsafe_code)]

use std::{
    env,
    ffi::OsStr,
    fmt, fs,
    path::{Path, PathBuf},
    process::{self, Command},
};

use anyhow::{Context as _, Result, bail};

/// The release of bpf-linker that `cargo xtask setup` builds, and the oldest we accept.
pub const LINKER_VERSION: Version = Version(0, 13, 0);

/// Set to `none`, it hides the toolchain, so that CI can show what works without it.
pub const HIDE: &str = "DIST_CTL_TOOLCHAIN";

const TARGET: &str = "bpfel-unknown-none";

/// A rustc, a cargo and a bpf-linker that were seen to work together.
pub struct Toolchain {
    workspace: PathBuf,
    compiler: Compiler,
    linker: PathBuf,
}

/// A rustc that can build `core` for the BPF target, with its cargo.
#[derive(Clone)]
pub struct Compiler {
    rustc: PathBuf,
    cargo: PathBuf,
    version: Version,
    llvm: u32,
}

/// An eBPF object, and what the compiler had to say about it.
pub struct Object {
    pub path: PathBuf,
    pub warnings: String,
}

/// Why there is no toolchain here.
#[derive(Debug)]
pub enum Missing {
    /// Nothing is wrong: `DIST_CTL_TOOLCHAIN=none` asked for this.
    Hidden,
    /// What was tried, and what each lacks.
    Compiler { tried: Vec<String> },
    /// No bpf-linker anywhere.
    Linker,
    /// There are some, and none fits the compiler.
    UnfitLinker { tried: Vec<String> },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32, pub u32);

impl Toolchain {
    /// The first compiler and linker that work together.
    pub fn find(workspace: &Path) -> Result<Self, Missing> {
        if env::var_os(HIDE).is_some_and(|value| value == "none") {
            return Err(Missing::Hidden);
        }
        Self::with(Compiler::find()?, workspace)
    }

    /// The first linker that works with this compiler.
    pub fn with(compiler: Compiler, workspace: &Path) -> Result<Self, Missing> {
        let mut tried = Vec::new();
        for linker in linkers(workspace) {
            match compiler.links_with(&linker) {
                Ok(()) => {
                    return Ok(Self { workspace: workspace.to_owned(), compiler, linker });
                }
                Err(why) => tried.push(format!("{} {why}", linker.display())),
            }
        }
        if tried.is_empty() { Err(Missing::Linker) } else { Err(Missing::UnfitLinker { tried }) }
    }

    /// Builds the eBPF programs in a target directory of their own: cargo holds a lock on
    /// the one that the caller's build is using. `features` are those of `distributor-ebpf`.
    pub fn build_object(&self, target_directory: &Path, features: &[&str]) -> Result<Object> {
        let output = self
            .cargo("build", target_directory)
            .args(features.iter().flat_map(|feature| ["--features", feature]))
            .arg("--quiet")
            .output()
            .with_context(|| format!("run {}", self.compiler.cargo.display()))?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if !output.status.success() {
            bail!("build the eBPF programs: with {self}: it failed:\n\n{said}");
        }
        Ok(Object { path: target_directory.join(TARGET).join("release/distributor"), warnings: said })
    }

    /// Whether the compiler brings clippy: one of another version cannot read its crates.
    pub fn has_clippy(&self) -> bool {
        self.compiler.clippy().exists()
    }

    /// Clippy on the eBPF programs, for their own target.
    pub fn clippy(&self, target_directory: &Path) -> Command {
        let mut command = self.cargo("clippy", target_directory);
        command.args(["--", "-D", "warnings"]);
        command
    }

    /// The files whose change makes another toolchain of this.
    pub fn files(&self) -> [&Path; 2] {
        [&self.compiler.rustc, &self.linker]
    }

    fn cargo(&self, verb: &str, target_directory: &Path) -> Command {
        let program = if verb == "clippy" { self.compiler.clippy() } else { self.compiler.cargo.clone() };
        let mut command = Command::new(program);
        clean(&mut command);
        command
            .current_dir(&self.workspace)
            .env("RUSTC", &self.compiler.rustc)
            // "error: the option `Z` is only accepted on the nightly compiler": there is
            // no compiled `core` for this target, and build-std is still unstable.
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &self.linker)
            .env(
                "CARGO_ENCODED_RUSTFLAGS",
                [
                    // Without BTF the loader cannot create the sk_storage map.
                    "-Clink-arg=--btf",
                    // BTF is made from the debug information.
                    "-Cdebuginfo=2",
                    // v3 has atomic fetch-and-add and compare-and-swap. rustc passes it
                    // on; as a link-arg too it is "the argument '--cpu <CPU>' cannot be
                    // used multiple times".
                    "-Ctarget-cpu=v3",
                ]
                .join("\x1f"),
            )
            // A `build.build-dir` in somebody's cargo configuration would be the one that
            // the caller's build has locked.
            .env("CARGO_BUILD_BUILD_DIR", target_directory)
            .args([verb, "--package", "distributor-ebpf"])
            .args(["--bin", "distributor", "--features", "program"])
            .args(["--release", "--locked", "-Zbuild-std=core"])
            .args(["--target", TARGET, "--target-dir"])
            .arg(target_directory);
        command
    }
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} and {}", self.compiler, self.linker.display())
    }
}

impl Compiler {
    /// The system's rustc if it will do, or else one of rustup's.
    ///
    /// The system's comes first because its rust-src and LLVM are packages that were
    /// built together; rustup's nightly may be ahead of every LLVM that can be installed.
    pub fn find() -> Result<Self, Missing> {
        let mut tried = Vec::new();
        let system = (PathBuf::from("/usr/bin/rustc"), PathBuf::from("/usr/bin/cargo"));
        let rustup = ["nightly", "stable"].into_iter().filter_map(|toolchain| {
            Some((rustup_which(toolchain, "rustc")?, rustup_which(toolchain, "cargo")?))
        });
        for (rustc, cargo) in [system].into_iter().chain(rustup) {
            match Self::probe(&rustc, &cargo) {
                Ok(compiler) => return Ok(compiler),
                Err(why) => tried.push(format!("{} {why}", rustc.display())),
            }
        }
        Err(Missing::Compiler { tried })
    }

    /// The major version of LLVM whose bitcode this compiler writes.
    pub fn llvm(&self) -> u32 {
        self.llvm
    }

    /// This compiler's cargo, told nothing by whoever called us.
    pub fn cargo(&self) -> Command {
        let mut command = Command::new(&self.cargo);
        clean(&mut command);
        command.env("RUSTC", &self.rustc);
        command
    }

    /// The one beside its cargo. `cargo clippy` would look for it in CARGO_HOME first, and
    /// find rustup's, which brings another compiler.
    fn clippy(&self) -> PathBuf {
        self.cargo.with_file_name("cargo-clippy")
    }

    fn probe(rustc: &Path, cargo: &Path) -> Result<Self, String> {
        if !rustc.exists() {
            return Err("is not there".to_owned());
        }
        let about = read(Command::new(rustc).arg("-vV"))?;
        let field = |name: &str| about.lines().find_map(|line| line.strip_prefix(name));
        let version = field("release: ").and_then(Version::parse).ok_or("does not say its release")?;
        let oldest = Version::parse(env!("CARGO_PKG_RUST_VERSION")).expect("Cargo.toml has rust-version");
        if version < oldest {
            return Err(format!("is {version}, and {oldest} is needed"));
        }
        let llvm = field("LLVM version: ").and_then(Version::parse).ok_or("does not say its LLVM version")?;
        let sysroot = read(Command::new(rustc).args(["--print", "sysroot"]))?;
        let source = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs");
        if !source.exists() {
            return Err("has no rust-src (the source of core)".to_owned());
        }
        if !cargo.exists() {
            return Err(format!("has no cargo: {} is not there", cargo.display()));
        }
        Ok(Self { rustc: rustc.to_owned(), cargo: cargo.to_owned(), version, llvm: llvm.0 })
    }

    /// Makes bitcode with this compiler and an object of it with that linker.
    fn links_with(&self, linker: &Path) -> Result<(), String> {
        let said = read(Command::new(linker).arg("--version"))?;
        let version = said
            .trim()
            .strip_prefix("bpf-linker ")
            .and_then(Version::parse)
            .ok_or("does not say its version")?;
        if version < LINKER_VERSION {
            return Err(format!("is {version}, and {LINKER_VERSION} is needed"));
        }
        // A newer compiler's bitcode may be read by luck, as long as the program is tiny.
        let program = fs::read(linker).map_err(|why| format!("cannot be read: {why}"))?;
        if let Some(llvm) = linked_llvm(&program).filter(|llvm| *llvm < self.llvm) {
            return Err(format!("has LLVM {llvm}, and {self} writes for {}", self.llvm));
        }
        let directory = env::temp_dir().join(format!("dist-ctl-toolchain-{}", process::id()));
        let linked = (|| {
            fs::create_dir_all(&directory).map_err(|why| format!("cannot be tried: {why}"))?;
            let source = directory.join("probe.rs");
            let bitcode = directory.join("probe.bc");
            let object = directory.join("probe.o");
            fs::write(&source, "#![no_std]\n#[unsafe(no_mangle)] pub extern \"C\" fn probe() -> u64 { 0 }\n")
                .map_err(|why| format!("cannot be tried: {why}"))?;
            // Compiled for the host, which has a compiled `core`; bitcode without
            // anything of the machine in it can be linked for another one.
            read(
                Command::new(&self.rustc)
                    .args(["--edition=2024", "--crate-type=lib", "--emit=llvm-bc", "-o"])
                    .args([&bitcode, &source]),
            )
            .map_err(|why| format!("cannot be tried: rustc {why}"))?;
            read(
                Command::new(linker)
                    .args(["--target=bpfel", "--export=probe", "--output"])
                    .args([&object, &bitcode]),
            )
            .map_err(|why| format!("cannot link what {self} makes: it {why}"))?;
            Ok(())
        })();
        // What is left in the temporary directory is of no use, and of no harm.
        let _ = fs::remove_dir_all(&directory);
        linked
    }
}

impl fmt::Display for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rustc, version, llvm, .. } = self;
        write!(f, "{} {version} (LLVM {llvm})", rustc.display())
    }
}

impl Missing {
    /// What is missing, without what to do about it.
    pub fn what(&self) -> String {
        match self {
            Self::Hidden => format!("{HIDE}=none hides the toolchain"),
            Self::Compiler { tried } => {
                format!("no Rust compiler here can build for {TARGET}: {}", tried.join("; "))
            }
            Self::Linker => "bpf-linker is neither in .tools/bin nor on PATH".to_owned(),
            Self::UnfitLinker { tried } => format!("no bpf-linker here will do: {}", tried.join("; ")),
        }
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what())?;
        match self {
            // Installing something would not help.
            Self::Hidden => Ok(()),
            Self::Compiler { .. } | Self::Linker | Self::UnfitLinker { .. } => {
                f.write_str(": run `cargo xtask setup`")
            }
        }
    }
}

impl std::error::Error for Missing {}

impl Version {
    /// Reads `1.96.0`, `1.97.0-nightly`, `1.95` and `22.1.8`.
    pub fn parse(text: &str) -> Option<Self> {
        let digits =
            text.split_once(|c: char| c != '.' && !c.is_ascii_digit()).map_or(text, |(digits, _)| digits);
        let mut numbers = digits.split('.').map(str::parse);
        let major = numbers.next()?.ok()?;
        let minor = numbers.next()?.ok()?;
        let patch = numbers.next().and_then(Result::ok).unwrap_or(0);
        Some(Self(major, minor, patch))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// Every bpf-linker there is: the workspace's own, then those on PATH.
fn linkers(workspace: &Path) -> Vec<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    [workspace.join(".tools/bin")]
        .into_iter()
        .chain(env::split_paths(&path))
        .map(|directory| directory.join("bpf-linker"))
        .filter(|linker| linker.is_file())
        .collect()
}

/// The major version of the LLVM library that a program asks the loader for. A program that
/// has LLVM inside asks for none, and then only trying it tells.
fn linked_llvm(program: &[u8]) -> Option<u32> {
    ["libLLVM.so.", "libLLVM-"].into_iter().find_map(|name| {
        let at = program.windows(name.len()).position(|window| window == name.as_bytes())?;
        let digits = program[at + name.len()..].iter().take_while(|byte| byte.is_ascii_digit());
        String::from_utf8(digits.copied().collect()).ok()?.parse().ok()
    })
}

/// Where rustup keeps a program of an installed toolchain.
fn rustup_which(toolchain: &str, program: &str) -> Option<PathBuf> {
    let said = read(Command::new("rustup").args(["which", "--toolchain", toolchain, program])).ok()?;
    Some(PathBuf::from(said.trim()))
}

/// What a program prints, or how it failed: `failed: <its last words>`.
fn read(command: &mut Command) -> Result<String, String> {
    clean(command);
    let output = command.output().map_err(|why| format!("does not run: {why}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.lines().rfind(|line| !line.trim().is_empty());
    Err(format!("failed: {}", last.unwrap_or(&output.status.to_string())))
}

/// Takes away what a cargo around us (a build script's, clippy's, `cargo run`'s) put into
/// the environment about its own compiler. What people set about registries stays.
fn clean(command: &mut Command) {
    for (name, _) in env::vars_os() {
        if misleads(&name) {
            command.env_remove(name);
        }
    }
}

fn misleads(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else {
        return false;
    };
    let kept = [
        "CARGO_HOME",
        // The caller's job server: both builds together use as many CPUs as one may.
        "CARGO_MAKEFLAGS",
        "CARGO_HTTP_",
        "CARGO_NET_",
        "CARGO_REGISTR",
        "RUSTUP_HOME",
    ];
    let taken = [
        "CARGO",
        "CLIPPY_",
        "RUST",
        // rustup and cargo put the libraries of their own compiler in here.
        "LD_LIBRARY_PATH",
    ];
    let begins_with_one_of = |prefixes: &[&str]| prefixes.iter().any(|prefix| name.starts_with(prefix));
    begins_with_one_of(&taken) && !begins_with_one_of(&kept)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn versions_are_read_as_the_tools_print_them() {
        for (text, version) in [
            ("1.96.0", Some(Version(1, 96, 0))),
            ("1.97.0-nightly", Some(Version(1, 97, 0))),
            ("1.96.0+dfsg1-1~deb12u2", Some(Version(1, 96, 0))),
            ("1.95", Some(Version(1, 95, 0))),
            ("22.1.8", Some(Version(22, 1, 8))),
            ("22", None),
            ("(none)", None),
            ("", None),
        ] {
            assert_eq!(Version::parse(text), version, "{text:?}");
        }
    }

    #[test]
    fn a_callers_compiler_is_forgotten_and_its_registry_is_not() {
        for (name, forgotten) in [
            ("RUSTC", true),
            ("RUSTC_WORKSPACE_WRAPPER", true),
            ("RUSTUP_TOOLCHAIN", true),
            ("CARGO_ENCODED_RUSTFLAGS", true),
            ("CARGO", true),
            ("CARGO_PROFILE_RELEASE_LTO", true),
            ("CLIPPY_ARGS", true),
            ("LD_LIBRARY_PATH", true),
            ("CARGO_HOME", false),
            ("CARGO_MAKEFLAGS", false),
            ("CARGO_REGISTRIES_MIRROR_INDEX", false),
            ("RUSTUP_HOME", false),
            ("PATH", false),
        ] {
            assert_eq!(misleads(OsStr::new(name)), forgotten, "{name}");
        }
    }

    #[test]
    fn a_linker_that_will_not_do_is_refused_with_the_reason() {
        let compiler = any_compiler();
        for (row, body, reason) in [
            ("too old", "echo bpf-linker 0.9.15", "is 0.9.15, and 0.13.0 is needed"),
            (
                "another LLVM",
                "[ $1 = --version ] && echo bpf-linker 0.13.0 && exit\n\
                 echo 'Unknown attribute kind (102)' >&2; exit 1",
                "cannot link what rustc 1.95.0 (LLVM 22) makes: \
                 it failed: Unknown attribute kind (102)",
            ),
            (
                "linked against an older LLVM",
                "echo bpf-linker 0.13.0; exit; libLLVM.so.21.1",
                "has LLVM 21, and rustc 1.95.0 (LLVM 22) writes for 22",
            ),
            (
                "its LLVM was removed",
                "echo 'libLLVM.so.22.1: cannot open shared object file' >&2; exit 127",
                "failed: libLLVM.so.22.1: cannot open shared object file",
            ),
        ] {
            let linker = script(body);
            let refused = compiler.links_with(&linker);
            fs::remove_file(&linker).expect("it was just written");
            assert_eq!(refused, Err(reason.to_owned()), "{row}");
        }
    }

    #[test]
    fn the_llvm_of_a_linker_is_the_library_it_is_linked_against() {
        for (program, llvm) in [
            ("\0libc.so.6\0libLLVM.so.22.1\0", Some(22)),
            ("\0libLLVM-19.so\0", Some(19)),
            ("\0libLLVM.so.\0", None),
            ("LLVM is inside", None),
        ] {
            assert_eq!(linked_llvm(program.as_bytes()), llvm, "{program:?}");
        }
    }

    #[test]
    fn what_is_missing_is_said_with_what_to_run() {
        let missing = Missing::Compiler { tried: vec!["/usr/bin/rustc is not there".to_owned()] };
        assert_eq!(
            missing.to_string(),
            "no Rust compiler here can build for bpfel-unknown-none: \
             /usr/bin/rustc is not there: run `cargo xtask setup`"
        );
    }

    /// The compiler that builds these tests: it makes bitcode like any other.
    fn any_compiler() -> Compiler {
        Compiler {
            rustc: PathBuf::from("rustc"),
            cargo: PathBuf::from("cargo"),
            version: Version(1, 95, 0),
            llvm: 22,
        }
    }

    // Only one test may use it: a script is "Text file busy" while another thread that
    // was just forked still holds the descriptor it was written through.
    fn script(body: &str) -> PathBuf {
        let path = env::temp_dir().join(format!("dist-ctl-linker-{}", process::id()));
        fs::write(&path, format!("#!/bin/sh\n{body}\n")).expect("the temporary directory is writable");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("our own file");
        path
    }
}
