//! Builds the eBPF programs and puts them where `kernel.rs` includes them from.
//!
//! Writes `object.rs` into OUT_DIR. With a toolchain it holds the object. Without one it
//! holds a sentence that only code generation runs into, so `cargo check`, clippy and
//! rust-analyzer work on any machine and `cargo build` says what to do. Installs nothing.

use std::{env, fs, path::Path, process::ExitCode};

use anyhow::{Context as _, Result};
use xtask::toolchain::{HIDE, Missing, Toolchain};

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        // Not returned as it is: with RUST_BACKTRACE set, a page of our own stack would
        // stand below what the compiler says about the eBPF programs.
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<()> {
    let package = env::var_os("CARGO_MANIFEST_DIR").context("cargo sets CARGO_MANIFEST_DIR")?;
    let out = env::var_os("OUT_DIR").context("cargo sets OUT_DIR")?;
    let (workspace, out) =
        (Path::new(&package).parent().context("the package lies in the workspace")?, Path::new(&out));
    println!("cargo::rerun-if-env-changed={HIDE}");
    for source in ["Cargo.toml", "Cargo.lock", "distributor-ebpf/Cargo.toml", "distributor-ebpf/src"] {
        println!("cargo::rerun-if-changed={}", workspace.join(source).display());
    }

    let code = match Toolchain::find(workspace) {
        Ok(toolchain) => {
            for file in toolchain.files() {
                println!("cargo::rerun-if-changed={}", file.display());
            }
            // OUT_DIR is TARGET/PROFILE/build/PACKAGE/out. Beside the profiles, so that
            // debug and release do not each build the same object.
            let target = out.ancestors().nth(4).unwrap_or(out);
            let object = match env::var_os("CARGO_FEATURE_NEXT_CONTRACT") {
                None => toolchain.build_object(&target.join("ebpf"), &[])?,
                // Apart, or each would overwrite the other.
                Some(_) => toolchain.build_object(&target.join("ebpf-next"), &["next-contract"])?,
            };
            for line in object.warnings.lines() {
                println!("cargo::warning={line}");
            }
            fs::copy(&object.path, out.join("distributor.o"))
                .with_context(|| format!("copy the eBPF object: {}", object.path.display()))?;
            built()
        }
        Err(Missing::Hidden) => not_built(&Missing::Hidden),
        Err(missing) => {
            // A file that does not exist counts as changed: look again next time.
            println!("cargo::rerun-if-changed={}", out.join("no-toolchain").display());
            not_built(&missing)
        }
    };
    fs::write(out.join("object.rs"), code).context("write object.rs")
}

/// Aligned, because the ELF reader casts parts of it to structs.
fn built() -> String {
    r#"/// The eBPF programs, as the linker made them.
pub(crate) fn object() -> &'static [u8] {
    ::aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/distributor.o"))
}
"#
    .to_owned()
}

/// A constant of a generic type is evaluated where code is generated for it, and so not by
/// `cargo check`. A plain `compile_error!` would break check and clippy too. Inlined, the
/// constant would be evaluated by `cargo check --release`, which prepares small functions
/// for other crates.
fn not_built(missing: &Missing) -> String {
    let sentence = format!("the eBPF programs are not built: {missing}");
    format!(
        r#"/// There is no eBPF toolchain on this machine: building this is an error.
#[inline(never)]
pub(crate) fn object() -> &'static [u8] {{
    struct Object<const BUILT: bool>;
    impl<const BUILT: bool> Object<BUILT> {{
        const BYTES: &'static [u8] = if BUILT {{ &[] }} else {{ panic!({sentence:?}) }};
    }}
    fn bytes<const BUILT: bool>() -> &'static [u8] {{
        Object::<BUILT>::BYTES
    }}
    bytes::<false>()
}}
"#
    )
}
