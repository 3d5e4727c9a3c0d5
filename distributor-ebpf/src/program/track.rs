//! `track`: how many connections each server has.
//!
//! Runs at the state changes of all sockets created in the service's cgroup. A connection
//! counts from the end of its handshake until the kernel gives up its socket, and counts for
//! the slot its listener is tagged with, or for the one it moved to; or it waits in a room.
//!
//! It may be attached to a further cgroup, that of a server which was adopted. If that is above the
//! service's own, it runs twice for each event of the service's sockets, and the second time must
//! count nothing. (A listener is told of twice, which is no harm: user space looks again.)

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_SOCK_OPS_STATE_CB_FLAG, bpf_sock_ops},
    helpers::generated::{bpf_get_socket_cookie, bpf_sock_ops_cb_flags_set},
    programs::SockOpsContext,
};
use aya_log_ebpf::debug;
use distributor_ebpf::{
    contract::{
        self, Address, CHECK, CHECKER, COUNTED, DISMISSED, EventKind, FLAG_BELL, FLAG_CHECKS, GONE,
        IN_SERVICE, Outcome, Owner, Plan, ROOM, SLOTS, Tag, UNSERVED, counted_by, in_room, is_counted,
        marked, room_of,
    },
    source,
};

use crate::{
    limit,
    maps::{self, Change, Comes, Loads, Sum, count},
    steer,
};

const PASSIVE_ESTABLISHED_CB: u32 = 5;
const STATE_CB: u32 = 10;
const TCP_LISTEN_CB: u32 = 11;

const TCP_FIN_WAIT1: u32 = 4;
const TCP_CLOSE: u32 = 7;
const TCP_LAST_ACK: u32 = 9;
const TCP_LISTEN: u32 = 10;
const AF_INET: u32 = 2;

#[inline(always)]
pub(crate) fn run(ctx: &SockOpsContext) {
    match ctx.op() {
        PASSIVE_ESTABLISHED_CB => established(ctx),
        STATE_CB => match (ctx.arg(0), ctx.arg(1)) {
            (TCP_LISTEN, TCP_CLOSE) => {
                if is_told(ctx) {
                    count(Outcome::ListenerClosed);
                    maps::tell(EventKind::ListenerClosed, cookie(ctx), 0, local_address(ctx));
                }
            }
            (_, TCP_CLOSE) => closed(ctx),
            // Our side closes first only where it is a server's, or dismisses who waits.
            (_, TCP_FIN_WAIT1 | TCP_LAST_ACK) => shut(ctx),
            _ => {}
        },
        TCP_LISTEN_CB => {
            if maps::is_port(ctx.local_port()) {
                watch_states(ctx);
            }
            if is_told(ctx) {
                count(Outcome::Listening);
                maps::tell(EventKind::Listening, cookie(ctx), 0, local_address(ctx));
            }
        }
        _ => {}
    }
}

#[inline(always)]
fn established(ctx: &SockOpsContext) {
    let (tag, Some((_, plan)), Some(loads)) = (tag(ctx), maps::plan(), maps::loads()) else {
        // Cannot happen: an array map always has its entry.
        count(Outcome::NoPlan);
        return;
    };
    if tag.is_null() || plan.flags & FLAG_BELL != 0 && maps::bell(bell(ctx)).is_some() {
        count(Outcome::Untagged);
        return;
    }
    watch_states(ctx);
    if plan.flags & FLAG_CHECKS != 0 && maps::directed(&remote(ctx)).is_some() {
        return check(ctx, loads, tag);
    }
    // SAFETY: not null; this connection's own copy of its listener's tag.
    let (slot, index, group) = unsafe {
        if (*tag).counted != 0 {
            return;
        }
        (*tag).counted = COUNTED;
        ((*tag).slot, (*tag).index, (*tag).group as usize)
    };
    let mut marks = 0;
    if limit::are_set(plan) {
        let now = maps::nanoseconds();
        marks = marked(limit::established(plan, halves(ctx), now));
        if slot != ROOM && plan.limits.service.connections != 0 {
            limit::change_service(limit::Change::Establish as u64, now);
            marks |= IN_SERVICE;
        }
        // SAFETY: as above.
        unsafe { (*tag).counted = COUNTED | marks };
    }
    if slot == ROOM {
        return wait(ctx, plan, loads, index, group, marks);
    }
    let active = maps::change(slot, Change::Establish);
    loads.add(Sum::Total(slot), 1);
    loads.note_most(slot, plan.servers[slot as usize & (SLOTS - 1)].generation, active);
    count(Outcome::Established);
    debug!(ctx, "slot {} has a connection more", slot);
}

/// A connection of ours that checks a server. Whoever moves connections is to know it, though its
/// client address may be forgotten by then.
#[inline(always)]
fn check(ctx: &SockOpsContext, loads: Loads, tag: *mut Tag) {
    // SAFETY: not null; this connection's own copy of its listener's tag.
    unsafe {
        if (*tag).counted != 0 {
            return;
        }
        (*tag).counted = CHECK;
    }
    maps::record(loads, cookie(ctx), Owner { owner: CHECKER, marks: 0, since: 0, order: 0 }, true);
    count(Outcome::CheckEstablished);
}

/// A connection begins to wait in a room. The next room becomes current, so that who comes
/// after this one stands behind it.
#[inline(always)]
fn wait(ctx: &SockOpsContext, plan: &Plan, loads: Loads, index: u32, group: usize, marks: u32) {
    let now = maps::nanoseconds();
    let owner = Owner { owner: in_room(index), marks: UNSERVED | marks, since: now, order: now };
    maps::record(loads, cookie(ctx), owner, true);
    let before = loads.add(Sum::Waiting, 1);
    loads.note_waiting();
    count(Outcome::EstablishedWaiting);
    let (Some(coming), Some(corridor)) = (maps::coming(index), maps::corridor(group)) else { return };
    coming.note_first(now, now);
    coming.add(Comes::Entered);
    coming.add(Comes::Completed);
    let current = loads.current(group);
    let sequence = current >> 16;
    if corridor.room(sequence) == index
        && coming.completed() >= corridor.share()
        && sequence + 1 < corridor.made()
    {
        maps::next_room(loads, corridor, group, current);
    }
    // A place may have become free before anybody waited, and nobody told.
    if before == 0 || steer::has_place(plan, loads, now) {
        maps::wake();
    }
}

#[inline(always)]
fn closed(ctx: &SockOpsContext) {
    let (tag, Some(loads)) = (tag(ctx), maps::loads()) else {
        // Cannot happen: an array map always has its entry.
        count(Outcome::NoPlan);
        return;
    };
    if tag.is_null() {
        // It never had one; or that went with maps that somebody removed, and then it is counted if it was
        // handed over or moved since.
        let cookie = cookie(ctx);
        match maps::owner(cookie) {
            Some(owner) if loads.owned() > 0 => {
                maps::forget(loads, cookie);
                if owner.owner == CHECKER {
                    count(Outcome::CheckClosed);
                } else {
                    leave_service(owner.marks);
                    leave(loads, owner.owner, false);
                }
            }
            _ => count(Outcome::Untagged),
        }
        return;
    }
    let at = tag;
    // SAFETY: not null; this connection's own copy of its listener's tag.
    let tag = unsafe { *at };
    if tag.counted == GONE {
        return;
    }
    if tag.counted == CHECK {
        // SAFETY: as above.
        unsafe { (*at).counted = GONE };
        maps::forget(loads, cookie(ctx));
        count(Outcome::CheckClosed);
        return;
    }
    if !is_counted(tag.counted) {
        // It ended before its handshake did, so it was never counted up; or it was counted down
        // when it was dismissed.
        count(Outcome::Untagged);
        return;
    }
    // SAFETY: as above.
    unsafe { (*at).counted = GONE };
    let owner = if loads.owned() == 0 { by_tag(&tag) } else { last_owner(ctx, loads, &tag) };
    leave_source(ctx, tag.counted);
    leave_service(owner.marks | tag.counted);
    leave(loads, owner.owner, tag.slot == DISMISSED);
    debug!(ctx, "slot {} has a connection less", owner.owner);
}

/// A connection that is counted by these marks does not count for its source any more.
#[inline(always)]
fn leave_source(ctx: &SockOpsContext, marks: u32) {
    let bits = counted_by(marks);
    if bits != 0 {
        limit::closed(bits, halves(ctx), maps::nanoseconds());
    }
}

/// Nor for the service as a whole.
#[inline(always)]
fn leave_service(marks: u32) {
    if marks & IN_SERVICE != 0 {
        limit::change_service(limit::Change::Close as u64, maps::nanoseconds());
    }
}

/// A connection is gone, from a server or from a room.
#[inline(always)]
fn leave(loads: Loads, owner: u32, is_dismissed: bool) {
    if let Some(index) = room_of(owner) {
        leave_room(loads, index);
        count(if is_dismissed { Outcome::Dismissed } else { Outcome::ClosedWaiting });
        return;
    }
    maps::change(owner, Change::Close);
    #[cfg(feature = "next-contract")]
    loads.add(Sum::Closed, 1);
    count(Outcome::Closed);
    if loads.waiting() > 0 {
        maps::wake();
    }
}

/// A connection is closed by our side. One that is dismissed waits no longer, though its client
/// may take his time to read what it was told.
#[inline(always)]
fn shut(ctx: &SockOpsContext) {
    let Some(loads) = maps::loads() else { return };
    if loads.waiting() == 0 {
        return;
    }
    let tag = tag(ctx);
    // SAFETY: not null where it is read; this connection's own copy of its listener's tag.
    if tag.is_null() || unsafe { (*tag).slot != DISMISSED || !is_counted((*tag).counted) } {
        return;
    }
    // SAFETY: as above.
    let (marks, owner) = unsafe {
        let marks = (*tag).counted;
        (*tag).counted = 0;
        (marks, last_owner(ctx, loads, &*tag))
    };
    leave_source(ctx, marks);
    // One that a dead server left has a place in the service.
    leave_service(owner.marks | marks);
    if let Some(index) = room_of(owner.owner) {
        leave_room(loads, index);
    }
    count(Outcome::Dismissed);
}

#[inline(always)]
fn leave_room(loads: Loads, index: u32) {
    loads.add(Sum::Waiting, -1);
    if let Some(coming) = maps::coming(index) {
        coming.add(Comes::Gone);
    }
}

/// Whose a closing connection is, by what was recorded of it, or else by its tag.
#[inline(always)]
fn last_owner(ctx: &SockOpsContext, loads: Loads, tag: &Tag) -> Owner {
    let cookie = cookie(ctx);
    let Some(owner) = maps::owner(cookie) else { return by_tag(tag) };
    maps::forget(loads, cookie);
    owner
}

/// Whose a connection is that never moved.
#[inline(always)]
fn by_tag(tag: &Tag) -> Owner {
    let owner = if tag.slot == ROOM || tag.slot == DISMISSED { in_room(tag.index) } else { tag.slot };
    Owner { owner, marks: 0, since: 0, order: 0 }
}

/// User space is to know of this listener. Rooms come and go by the thousand, and the loop needs to
/// know of none; and in another cgroup than the service's, most are somebody's whom we do not know.
#[inline(always)]
fn is_told(ctx: &SockOpsContext) -> bool {
    let tag = tag(ctx);
    // SAFETY: not null where it is read; the listener's own tag.
    let is_room = !tag.is_null() && unsafe { (*tag).slot == ROOM };
    !is_room && maps::is_port(ctx.local_port())
}

/// The client of a connection, as BELLS knows it.
#[inline(always)]
fn bell(ctx: &SockOpsContext) -> u64 {
    let client = remote(ctx);
    contract::client(client.ip, client.port)
}

/// The client of a connection, as DIRECTED knows it.
#[inline(always)]
fn remote(ctx: &SockOpsContext) -> Address {
    // SAFETY: the context is the kernel's; in network byte order, in the upper half.
    let port = u32::from_be(unsafe { (*ctx.ops).remote_port });
    steer::client(remote_ip(ctx), ctx.family(), port)
}

/// The halves of its address.
#[inline(always)]
fn halves(ctx: &SockOpsContext) -> (u64, u64) {
    let ip = remote_ip(ctx);
    if ctx.family() == AF_INET { source::mapped(ip[0]) } else { source::halves(ip) }
}

#[inline(always)]
fn remote_ip(ctx: &SockOpsContext) -> [u32; 4] {
    // SAFETY: the context is the kernel's. Word by word, as the verifier wants it.
    unsafe {
        let ops = ctx.ops;
        if ctx.family() == AF_INET {
            return [(&raw const (*ops).remote_ip4).read_volatile(), 0, 0, 0];
        }
        [
            (&raw const (*ops).remote_ip6[0]).read_volatile(),
            (&raw const (*ops).remote_ip6[1]).read_volatile(),
            (&raw const (*ops).remote_ip6[2]).read_volatile(),
            (&raw const (*ops).remote_ip6[3]).read_volatile(),
        ]
    }
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
