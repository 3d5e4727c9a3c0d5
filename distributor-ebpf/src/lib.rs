//! The kernel half of dist-ctl, as far as it is pure.
//!
//! What this is for: the layout both halves agree on ([`contract`]), the arithmetic of one
//! server's load word ([`word`]), the rules that choose a server ([`select`]), rates ([`rate`]) and
//! the table of sources ([`source`]). The kernel programs in `program/` and the host tests run this
//! very code. What it is not for: maps, helpers and sockets, which only `program/` touches, and
//! anything that allocates.
#![cfg_attr(not(test), no_std)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

mod bit;
pub mod contract;
pub mod rate;
pub mod select;
pub mod source;
pub mod word;
