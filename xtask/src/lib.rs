//! What the build script of `distributor-user` and the commands of `cargo xtask` share:
//! finding the toolchain that makes the eBPF object, and running it. Everything else of
//! xtask is in its binary, so that a build script compiles no more than it needs.

pub mod toolchain;
