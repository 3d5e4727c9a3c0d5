//! `bind4`, `bind6`: unmodified servers share the service's addresses.
//!
//! A bind to an address of the service gets SO_REUSEPORT and SO_REUSEADDR, and needs no
//! CAP_NET_BIND_SERVICE. A TCP bind to a port of the service at any other address is refused
//! (EPERM in the server) and reported: such a socket would take part of the clients past us,
//! because the more specific address wins. Every other bind is none of our business.

use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::{bpf_get_current_cgroup_id, bpf_get_socket_cookie, bpf_setsockopt},
    programs::SockAddrContext,
};
use distributor_ebpf::contract::{Address, EventKind, Outcome};

use crate::maps::{self, ADDRESSES, PORTS, count};

const REFUSE: i32 = 0;
const ALLOW: i32 = 1;
/// Bit 1: without asking for CAP_NET_BIND_SERVICE (Linux 5.12).
const ALLOW_PRIVILEGED_PORT: i32 = 3;

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
const IPPROTO_TCP: u32 = 6;
const IPPROTO_MPTCP: u32 = 262;
const SOL_SOCKET: i32 = 1;
const SO_REUSEADDR: i32 = 2;
const SO_REUSEPORT: i32 = 15;

#[inline(always)]
pub(crate) fn run4(ctx: &SockAddrContext) -> i32 {
    // SAFETY: the context is the kernel's.
    let ip = unsafe { [(*ctx.sock_addr).user_ip4, 0, 0, 0] };
    bind(ctx, AF_INET, ip)
}

#[inline(always)]
pub(crate) fn run6(ctx: &SockAddrContext) -> i32 {
    // SAFETY: the context is the kernel's. Word by word, as the verifier wants it.
    let ip = unsafe {
        [
            (&raw const (*ctx.sock_addr).user_ip6[0]).read_volatile(),
            (&raw const (*ctx.sock_addr).user_ip6[1]).read_volatile(),
            (&raw const (*ctx.sock_addr).user_ip6[2]).read_volatile(),
            (&raw const (*ctx.sock_addr).user_ip6[3]).read_volatile(),
        ]
    };
    bind(ctx, AF_INET6, ip)
}

#[inline(always)]
fn bind(ctx: &SockAddrContext, family: u32, ip: [u32; 4]) -> i32 {
    // SAFETY: the context is the kernel's.
    let (port, protocol) =
        unsafe { (u32::from(u16::from_be((*ctx.sock_addr).user_port as u16)), (*ctx.sock_addr).protocol) };
    // SAFETY: only compared with null.
    if protocol != IPPROTO_TCP && protocol != IPPROTO_MPTCP || unsafe { PORTS.get(port) }.is_none() {
        count(Outcome::BindOther);
        return ALLOW;
    }
    let address = Address { ip, family, port };
    // SAFETY: helpers with the context, and without arguments.
    let (cookie, cgroup) = unsafe { (bpf_get_socket_cookie(ctx.as_ptr()), bpf_get_current_cgroup_id()) };
    // SAFETY: only compared with null.
    if unsafe { ADDRESSES.get(address) }.is_none() {
        count(Outcome::BindRefused);
        maps::tell(EventKind::Misbound, cookie, cgroup, address);
        return REFUSE;
    }
    if share(ctx, SO_REUSEADDR) && share(ctx, SO_REUSEPORT) {
        count(Outcome::BindShared);
        if !maps::makes_rooms(cgroup) {
            maps::tell(EventKind::Bound, cookie, cgroup, address);
        }
    } else {
        // The bind itself then says EADDRINUSE, or the listener cannot be adopted.
        count(Outcome::BindFailed);
    }
    ALLOW_PRIVILEGED_PORT
}

#[inline(always)]
fn share(ctx: &SockAddrContext, option: i32) -> bool {
    let mut on = 1i32;
    // SAFETY: the four bytes of `on` are read.
    unsafe { bpf_setsockopt(ctx.as_ptr(), SOL_SOCKET, option, (&raw mut on).cast(), 4) == 0 }
}
