//! `cargo xtask setup`: makes this machine able to build the eBPF programs.
//!
//! Looks first and does only what is missing, so running it twice changes nothing. Takes
//! Debian's packages where there are some, or else rustup; builds bpf-linker into `.tools`.
//! Touches nothing of the system but packages, and removes none.

#![forbid(unsafe_code)]

use std::{
    env, iter,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, anyhow, bail};
use xtask::toolchain::{Compiler, LINKER_VERSION, Missing, Toolchain, Version};

use crate::{
    exec::{exec, find, read, say},
    packages::{self, Package},
};

/// The versions of LLVM that this release of bpf-linker has features for.
const LINKER_LLVM: RangeInclusive<u32> = 21..=23;

/// Development files of LLVM to link bpf-linker against.
enum Llvm {
    /// Debian has them, installed or not.
    Package(u32),
    /// Somebody installed them here.
    Here(u32, PathBuf),
}

/// The toolchain, installed if it was not there.
pub(crate) fn run(workspace: &Path) -> Result<Toolchain> {
    let toolchain = match Toolchain::find(workspace) {
        Ok(toolchain) => toolchain,
        Err(hidden @ Missing::Hidden) => return Err(hidden.into()),
        Err(missing) => {
            say(&format!("setup: {}", missing.what()));
            install(workspace)?
        }
    };
    say(&format!("setup: the eBPF programs are built by {toolchain}"));
    Ok(toolchain)
}

fn install(workspace: &Path) -> Result<Toolchain> {
    let compiler = match Compiler::find() {
        // rustup's nightly may be ahead of every LLVM that Debian has; its own compiler is not.
        Ok(compiler) if Llvm::find(compiler.llvm()).is_some() || !install_debian_compiler()? => compiler,
        Ok(_) => installed_compiler()?,
        Err(_) => {
            if !install_debian_compiler()? {
                install_rustup_compiler()?;
            }
            installed_compiler()?
        }
    };
    match Toolchain::with(compiler.clone(), workspace) {
        Ok(toolchain) => return Ok(toolchain),
        Err(missing) => say(&format!("setup: {}", missing.what())),
    }
    install_linker(&compiler, workspace)?;
    Toolchain::with(compiler, workspace)
        .map_err(|missing| anyhow!("bpf-linker was built, and it will not do: {}", missing.what()))
}

fn installed_compiler() -> Result<Compiler> {
    Compiler::find()
        .map_err(|missing| anyhow!("a compiler was installed, and it will not do: {}", missing.what()))
}

/// Debian's rustc-web, if there is one that is recent enough.
fn install_debian_compiler() -> Result<bool> {
    let oldest = Version::parse(env!("CARGO_PKG_RUST_VERSION")).context("Cargo.toml has rust-version")?;
    // Debian's own package of rustup and rustc-web exclude each other.
    if !packages::here() || packages::is_installed("rustup") {
        return Ok(false);
    }
    match packages::offered("setup", "rustc-web") {
        Some(version) if version >= oldest => {}
        Some(version) => {
            say(&format!("setup: Debian's rustc-web is {version}, and {oldest} is needed"));
            return Ok(false);
        }
        None => {
            say("setup: this Debian has no rustc-web");
            return Ok(false);
        }
    }
    packages::install(
        "setup",
        vec![
            Package::new("rustc-web", "it compiles the eBPF programs"),
            Package::new("cargo-web", "rustc-web's cargo builds them"),
            Package::new("rust-web-src", "there is no compiled core for eBPF: it is built from this"),
        ],
    )?;
    Ok(true)
}

/// rustup's nightly with rust-src. One that is there stays the version that it is: somebody
/// may build something else with it.
fn install_rustup_compiler() -> Result<()> {
    if find("rustup").is_none() {
        bail!(
            "there is no way here to a Rust compiler with rust-src: neither a recent package rustc-web nor \
             rustup; install rustup (https://rustup.rs), then run `cargo xtask setup` again"
        );
    }
    let installed =
        read(Command::new("rustup").args(["toolchain", "list"])).context("ask rustup what it has")?;
    let mut command = Command::new("rustup");
    // `nightly-x86_64-unknown-linux-gnu`, and not `nightly-2026-05-20-x86_64-unknown-linux-gnu`.
    let is_dated = |rest: &str| rest.trim_start_matches('-').starts_with(|c: char| c.is_ascii_digit());
    if installed.lines().filter_map(|line| line.strip_prefix("nightly")).any(|rest| !is_dated(rest)) {
        say("setup: adding rust-src to rustup's nightly: there is no compiled core for eBPF");
        command.args(["component", "add", "rust-src", "--toolchain", "nightly"]);
    } else {
        say("setup: installing rustup's nightly with rust-src: there is no compiled core for eBPF");
        command.args(["toolchain", "install", "nightly", "--profile", "minimal", "--component", "rust-src"]);
        // Without it, rustup may replace itself in passing.
        command.arg("--no-self-update");
    }
    exec(&mut command)
}

/// Builds bpf-linker against the LLVM of the compiler, or the next newer one.
fn install_linker(compiler: &Compiler, workspace: &Path) -> Result<()> {
    let oldest = compiler.llvm();
    let Some(llvm) = Llvm::find(oldest) else {
        bail!(
            "build bpf-linker: it needs the development files of LLVM {oldest} (at most {newest}), and this \
             system offers none that we know how to install: install them so that `llvm-config --version` says \
             {oldest}, or put a released bpf-linker {LINKER_VERSION} on PATH; then run `cargo xtask setup` again",
            newest = LINKER_LLVM.end(),
        );
    };
    let (version, prefix) = llvm.install()?;
    say(&format!(
        "setup: building bpf-linker {LINKER_VERSION} into .tools, a minute or a few: it links the eBPF \
         programs, and has to have the LLVM of the compiler ({oldest}) or a newer one"
    ));
    let path = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths(iter::once(prefix.join("bin")).chain(env::split_paths(&path)))
        .context("put LLVM's programs on PATH")?;
    exec(
        compiler
            .cargo()
            .args(["install", "bpf-linker", "--locked", "--version", &LINKER_VERSION.to_string()])
            // One that no longer works is still "already installed".
            .args(["--force", "--root"])
            .arg(workspace.join(".tools"))
            .args(["--no-default-features", "--features", &format!("llvm-{version}")])
            // "error: No suitable version of LLVM was found system-wide or pointed to by
            // LLVM_SYS_221_PREFIX."
            .env(format!("LLVM_SYS_{version}1_PREFIX"), &prefix)
            .env("LLVM_PREFIX", &prefix)
            .env("PATH", path),
    )
    .context("build bpf-linker")
}

impl Llvm {
    /// The oldest that can be had and reads what a compiler with this one writes.
    fn find(oldest: u32) -> Option<Self> {
        let mut usable = LINKER_LLVM.filter(|version| *version >= oldest);
        if packages::here() {
            let found =
                usable.clone().find(|version| packages::offered("setup", &package(*version)).is_some());
            if let Some(version) = found {
                return Some(Self::Package(version));
            }
        }
        usable.find_map(|version| {
            [format!("llvm-config-{version}"), "llvm-config".to_owned()].into_iter().find_map(|config| {
                let ask = |what| read(Command::new(&config).arg(what)).ok();
                let found = Version::parse(&ask("--version")?)?;
                (found.0 == version).then_some(Self::Here(version, PathBuf::from(ask("--prefix")?.trim())))
            })
        })
    }

    fn install(self) -> Result<(u32, PathBuf)> {
        match self {
            Self::Here(version, prefix) => Ok((version, prefix)),
            Self::Package(version) => {
                let why = "bpf-linker is linked against it";
                packages::install("setup", vec![Package::new(package(version), why)])?;
                Ok((version, PathBuf::from(format!("/usr/lib/llvm-{version}"))))
            }
        }
    }
}

/// Debian's package of an LLVM's development files.
fn package(version: u32) -> String {
    format!("llvm-{version}-dev")
}
