//! `track`: how many connections each server has.
//!
//! Runs at the state changes of all sockets created in the service's cgroup. A connection
//! counts from the end of its handshake until the kernel gives up its socket, and counts for
//! the slot its listener is tagged with, or for the one it moved to.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_SOCK_OPS_STATE_CB_FLAG, bpf_sock_ops},
    helpers::generated::{bpf_get_socket_cookie, bpf_sock_ops_cb_flags_set},
    programs::SockOpsContext,
};
use aya_log_ebpf::debug;
use distributor_ebpf::contract::{Address, EventKind, Outcome, ROOM, SLOTS, Tag};

use crate::maps::{self, Change, Loads, MOVED, Sum, count};

const PASSIVE_ESTABLISHED_CB: u32 = 5;
const STATE_CB: u32 = 10;
const TCP_LISTEN_CB: u32 = 11;

const TCP_CLOSE: u32 = 7;
const TCP_LISTEN: u32 = 10;
const AF_INET: u32 = 2;

#[inline(always)]
pub(crate) fn run(ctx: &SockOpsContext) {
    match ctx.op() {
        PASSIVE_ESTABLISHED_CB => established(ctx),
        STATE_CB if ctx.arg(1) == TCP_CLOSE => {
            if ctx.arg(0) == TCP_LISTEN {
                count(Outcome::ListenerClosed);
                maps::tell(EventKind::ListenerClosed, cookie(ctx), 0, local_address(ctx));
            } else {
                closed(ctx);
            }
        }
        TCP_LISTEN_CB => {
            watch_states(ctx);
            count(Outcome::Listening);
            maps::tell(EventKind::Listening, cookie(ctx), 0, local_address(ctx));
        }
        _ => {}
    }
}

#[inline(always)]
fn established(ctx: &SockOpsContext) {
    let (tag, Some(loads)) = (tag(ctx), maps::loads()) else {
        // Cannot happen: an array map always has its entry.
        count(Outcome::NoPlan);
        return;
    };
    if tag.is_null() {
        count(Outcome::Untagged);
        return;
    }
    watch_states(ctx);
    // SAFETY: not null; this connection's own copy of its listener's tag.
    let slot = unsafe {
        (*tag).counted = 1;
        (*tag).slot
    };
    if slot == ROOM {
        loads.add(Sum::Waiting, 1);
        loads.note_waiting();
        count(Outcome::EstablishedWaiting);
        maps::tell(EventKind::Waiting, cookie(ctx), 0, Address::default());
        return;
    }
    let active = maps::change(slot, Change::Establish);
    loads.add(Sum::Total(slot), 1);
    if let Some((_, plan)) = maps::plan() {
        loads.note_most(slot, plan.servers[slot as usize & (SLOTS - 1)].generation, active);
    }
    count(Outcome::Established);
    debug!(ctx, "slot {} has a connection more", slot);
}

#[inline(always)]
fn closed(ctx: &SockOpsContext) {
    let (tag, Some(loads)) = (tag(ctx), maps::loads()) else {
        // Cannot happen: an array map always has its entry.
        count(Outcome::NoPlan);
        return;
    };
    if tag.is_null() {
        count(Outcome::Untagged);
        return;
    }
    // SAFETY: not null; this connection's own copy of its listener's tag.
    let (counted, tagged) = unsafe { ((*tag).counted, (*tag).slot) };
    if counted != 1 {
        // It ended before its handshake did, so it was never counted up.
        count(Outcome::Untagged);
        return;
    }
    let slot = if loads.moved() == 0 { tagged } else { owner(ctx, loads, tagged) };
    if slot == ROOM {
        loads.add(Sum::Waiting, -1);
        count(Outcome::ClosedWaiting);
        maps::tell(EventKind::Left, cookie(ctx), 0, Address::default());
        return;
    }
    maps::change(slot, Change::Close);
    count(Outcome::Closed);
    debug!(ctx, "slot {} has a connection less", slot);
}

/// Who owns a closing connection: whom it moved to, or else whom its tag names.
#[inline(always)]
fn owner(ctx: &SockOpsContext, loads: Loads, tagged: u32) -> u32 {
    let cookie = cookie(ctx);
    // SAFETY: the value is copied at once.
    let Some(slot) = (unsafe { MOVED.get(cookie).copied() }) else { return tagged };
    if MOVED.remove(cookie).is_ok() {
        loads.add(Sum::Moved, -1);
    }
    slot
}

#[inline(always)]
fn tag(ctx: &SockOpsContext) -> *mut Tag {
    // SAFETY: the context is the kernel's; a null pointer is told by the test.
    let socket = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    if socket.is_null() { core::ptr::null_mut() } else { maps::tag(socket) }
}

/// Asks to be run at this socket's further state changes too.
#[inline(always)]
fn watch_states(ctx: &SockOpsContext) {
    let ops: *mut bpf_sock_ops = ctx.ops;
    // SAFETY: the context is the kernel's.
    unsafe { bpf_sock_ops_cb_flags_set(ops, BPF_SOCK_OPS_STATE_CB_FLAG as i32) };
}

#[inline(always)]
fn cookie(ctx: &SockOpsContext) -> u64 {
    // SAFETY: this helper takes the context of a sock_ops program.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

#[inline(always)]
fn local_address(ctx: &SockOpsContext) -> Address {
    let family = ctx.family();
    // SAFETY: the context is the kernel's. Word by word, as the verifier wants it: it refuses
    // to follow a pointer into the context ("dereference of modified ctx ptr").
    let ip = unsafe {
        let ops = ctx.ops;
        if family == AF_INET {
            [(&raw const (*ops).local_ip4).read_volatile(), 0, 0, 0]
        } else {
            [
                (&raw const (*ops).local_ip6[0]).read_volatile(),
                (&raw const (*ops).local_ip6[1]).read_volatile(),
                (&raw const (*ops).local_ip6[2]).read_volatile(),
                (&raw const (*ops).local_ip6[3]).read_volatile(),
            ]
        }
    };
    Address { ip, family, port: ctx.local_port() }
}
