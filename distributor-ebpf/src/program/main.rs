//! The programs that the kernel runs: `select`, `track`, `bind4` and `bind6`; and `probe`, which
//! runs once.
//!
//! Each takes its context, asks the pure library, acts, counts its way out, and returns. What
//! they must never do: return SK_PASS from `select` without a selection (the kernel would pick
//! by its own hash over all sockets of the group, rooms included), loop without a bound, or
//! write a map that user space writes.
#![no_std]
#![no_main]
#![expect(internal_features, reason = "compare-and-swap: core::sync::atomic has none on the bpf target")]
#![feature(core_intrinsics)]

mod bind;
mod limit;
mod maps;
mod steer;
mod track;

use aya_ebpf::{
    macros::{cgroup_sock_addr, sk_reuseport, sock_ops},
    programs::{SkReuseportContext, SockAddrContext, SockOpsContext},
};

/// For each new connection, and for each connection of a closing listener: which listener.
///
/// Inlined into the function that the macro makes around it: a frame more, and the stack of Linux 6.1
/// would not be deep enough for what it calls.
#[sk_reuseport(migrate)]
#[inline(always)]
pub(crate) fn select(ctx: SkReuseportContext) -> u32 {
    steer::run(&ctx)
}

/// For two listeners of user space's own: chooses the first one, or the second when that is
/// gone. Shows whether the kernel wakes a listener to which it moves a connection.
#[sk_reuseport(migrate)]
pub(crate) fn probe(ctx: SkReuseportContext) -> u32 {
    steer::probe(&ctx)
}

/// Counts connections up when they are established and down when they are gone.
#[sock_ops]
pub(crate) fn track(ctx: SockOpsContext) -> u32 {
    track::run(&ctx);
    1
}

/// Lets servers that know nothing of each other share the service's IPv4 addresses.
#[cgroup_sock_addr(bind4)]
pub(crate) fn bind4(ctx: SockAddrContext) -> i32 {
    bind::run4(&ctx)
}

/// Lets servers that know nothing of each other share the service's IPv6 addresses.
#[cgroup_sock_addr(bind6)]
pub(crate) fn bind6(ctx: SockAddrContext) -> i32 {
    bind::run6(&ctx)
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: the verifier refuses a program that could get here.
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
