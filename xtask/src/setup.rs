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

/// The toolchain, installed if it was not there.
pub(crate) fn run(workspace: &Path) -> Result<Toolchain> {
    let toolchain = match Toolchain::find(workspace) {
        Ok(toolchain) => toolchain,
        Err(hidden @ Missing::Hidden) => return Err(hidden.into()),
        Err(missing @ Missing::Compiler { .. }) => {
            say(&format!("setup: {}", missing.what()));
            install_compiler()?;
            install_linker(workspace)?
        }
        Err(Missing::Linker | Missing::UnfitLinker { .. }) => install_linker(workspace)?,
    };
    say(&format!("setup: the eBPF programs are built by {toolchain}"));
    Ok(toolchain)
}

/// Debian's rustc-web where it is recent enough, or else rustup's nightly.
///
/// The usual stable rustc could do it with RUSTC_BOOTSTRAP as well. But rustup's stable may
/// be pinned by somebody, and what LLVM it has decides which bpf-linker can follow.
fn install_compiler() -> Result<()> {
    let oldest = Version::parse(env!("CARGO_PKG_RUST_VERSION")).context("Cargo.toml has rust-version")?;
    // Debian's own package of rustup and rustc-web exclude each other.
    if packages::here() && !packages::is_installed("rustup") {
        match packages::offered("setup", "rustc-web") {
            Some(version) if version >= oldest => {
                return packages::install(
                    "setup",
                    vec![
                        Package::new("rustc-web", "it compiles the eBPF programs"),
                        Package::new("cargo-web", "rustc-web's cargo builds them"),
                        Package::new(
                            "rust-web-src",
                            "there is no compiled core for eBPF: it is built from this",
                        ),
                    ],
                );
            }
            Some(version) => say(&format!("setup: Debian's rustc-web is {version}, and {oldest} is needed")),
            None => say("setup: this Debian has no rustc-web"),
        }
    }
    if find("rustup").is_none() {
        bail!(
            "there is no way here to a Rust compiler with rust-src: neither a package rustc-web {oldest} \
             or newer nor rustup; install rustup (https://rustup.rs), then run `cargo xtask setup` again"
        );
    }
    say("setup: installing rustup's nightly with rust-src: there is no compiled core for eBPF");
    exec(Command::new("rustup").args([
        "toolchain",
        "install",
        "nightly",
        "--profile",
        "minimal",
        "--component",
        "rust-src",
    ]))
    .context("install rustup's nightly with rust-src")
}

/// Builds bpf-linker against the LLVM of the compiler, or the next newer one.
fn install_linker(workspace: &Path) -> Result<Toolchain> {
    let compiler = Compiler::find()
        .map_err(|missing| anyhow!("a compiler was installed, and it will not do: {}", missing.what()))?;
    match Toolchain::with(compiler.clone(), workspace) {
        Ok(toolchain) => return Ok(toolchain),
        Err(missing) => say(&format!("setup: {}", missing.what())),
    }
    let (version, prefix) = install_llvm(compiler.llvm())?;
    let root = workspace.join(".tools");
    say(&format!(
        "setup: building bpf-linker {LINKER_VERSION} into .tools, a minute or a few: it links the eBPF \
         programs, and has to have the LLVM of the compiler ({version})"
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
            .arg(root)
            .args(["--no-default-features", "--features", &format!("llvm-{version}")])
            // "error: No suitable version of LLVM was found system-wide or pointed to by
            // LLVM_SYS_221_PREFIX."
            .env(format!("LLVM_SYS_{version}1_PREFIX"), &prefix)
            .env("LLVM_PREFIX", &prefix)
            .env("PATH", path),
    )
    .context("build bpf-linker")?;
    Toolchain::with(compiler, workspace)
        .map_err(|missing| anyhow!("bpf-linker was built, and it will not do: {}", missing.what()))
}

/// The development files of an LLVM that reads this one's bitcode, and where they are.
fn install_llvm(oldest: u32) -> Result<(u32, PathBuf)> {
    let usable = || LINKER_LLVM.filter(move |version| *version >= oldest);
    if packages::here() {
        let packaged = |version: u32| format!("llvm-{version}-dev");
        if let Some(version) =
            usable().find(|version| packages::offered("setup", &packaged(*version)).is_some())
        {
            let why = "bpf-linker is linked against it";
            packages::install("setup", vec![Package::new(packaged(version), why)])?;
            return Ok((version, PathBuf::from(format!("/usr/lib/llvm-{version}"))));
        }
    }
    for version in usable() {
        for config in [format!("llvm-config-{version}"), "llvm-config".to_owned()] {
            let ask = |what| read(Command::new(&config).arg(what));
            let Ok(found) = ask("--version") else { continue };
            if Version::parse(&found).is_some_and(|found| found.0 == version) {
                return Ok((version, PathBuf::from(ask("--prefix")?.trim())));
            }
        }
    }
    bail!(
        "build bpf-linker: it needs the development files of LLVM {oldest} (at most {newest}), and this system \
         offers none that we know how to install: install them so that `llvm-config --version` says {oldest}, \
         or put a released bpf-linker {LINKER_VERSION} on PATH; then run `cargo xtask setup` again",
        newest = LINKER_LLVM.end(),
    )
}
