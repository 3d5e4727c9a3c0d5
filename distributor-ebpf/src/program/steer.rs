//! `select`: which listener of the group gets this connection.
//!
//! A new connection goes to the server that the policy chooses, which takes a place in its
//! word first, so that limits hold. If there is no place, or others wait already, it goes to
//! the current room. A connection of a closing listener is moved to a server the same way, and
//! takes its count along; or it is parked in a spare room. Refusal comes last.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{bpf_sock, sk_action::SK_DROP, sk_action::SK_PASS},
    cty::c_void,
    helpers::generated::{
        bpf_get_prandom_u32, bpf_get_socket_cookie, bpf_skb_load_bytes, bpf_skb_load_bytes_relative,
    },
    programs::SkReuseportContext,
};
use aya_log_ebpf::debug;
use distributor_ebpf::{
    contract::{
        self, Address, CHECKER, Directed, FLAG_BELL, FLAG_CHECKS, FLAG_CLOSING, FLAG_COOKIES, IN_SERVICE,
        Outcome, Owner, Parked, Plan, Policy, ROOM, SLOTS, UNSERVED, in_room, room_of,
    },
    select::{self, Arrival, Choice, NO_SLOT, PROBES, TRIES},
    source,
    word::{self, Place},
};

use crate::{
    limit::{self, Admission},
    maps::{self, Change, Comes, Corridor, HASH, HOME, Loads, SOCKETS, Sum, count},
};

const FIN: u8 = 1;
const SYN: u8 = 1 << 1;
const RST: u8 = 1 << 2;
const ACK: u8 = 1 << 4;

/// States of a migrating socket (include/net/tcp_states.h).
const TCP_CLOSE: u32 = 7;
const TCP_NEW_SYN_RECV: u32 = 12;

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

const ETH_P_IP_BE: u32 = 0x0800u16.to_be() as u32;
const BPF_HDR_START_NET: u32 = 1;

/// What came of looking for a server.
enum Steered {
    /// To this slot, which has taken the place; `true` if it was not the first choice.
    To(u32, bool),
    /// Every eligible server is full.
    Full,
    /// No server is eligible.
    NoServer,
    /// Servers had places, but selecting them failed.
    Failed,
}

/// What kind of connection asks.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
enum Asks {
    /// A SYN, or the ACK of a SYN cookie.
    New,
    /// A connection of a closing listener whose handshake is not complete.
    HalfOpen,
    /// An established connection of a closing listener.
    Established,
}

/// What is decided before the one place where a room is selected: the verifier follows that
/// once for each way to it.
enum Verdict {
    Done(u32),
    /// To the current room, and why.
    Room(Outcome),
}

#[inline(always)]
pub(crate) fn run(ctx: &SkReuseportContext) -> u32 {
    let (Some((_, plan)), Some(loads)) = (maps::plan(), maps::loads()) else {
        // Cannot happen: array maps always have their entries.
        count(Outcome::NoPlan);
        return SK_DROP;
    };
    // SAFETY: the context is the kernel's; a null pointer is told by the test below.
    let migrating = unsafe { (*ctx.md).__bindgen_anon_4.migrating_sk };
    let verdict = if migrating.is_null() {
        arrive(ctx, plan, loads)
    } else {
        // SAFETY: not null, and the verifier knows it for a socket.
        match unsafe { (*migrating).state } {
            TCP_CLOSE => {
                // Its client reset it while it was queued, and `track` has counted it down already.
                count(Outcome::MovedDead);
                Verdict::Done(SK_DROP)
            }
            TCP_NEW_SYN_RECV => move_half_open(ctx, plan, loads, migrating),
            _ => return move_established(ctx, plan, loads, migrating),
        }
    };
    match verdict {
        Verdict::Done(answer) => answer,
        Verdict::Room(why) => to_room(ctx, loads, why),
    }
}

/// The first of two listeners, or the second.
#[inline(always)]
pub(crate) fn probe(ctx: &SkReuseportContext) -> u32 {
    let selected = SOCKETS.select_reuseport(ctx, 0).is_ok() || SOCKETS.select_reuseport(ctx, 1).is_ok();
    if selected { SK_PASS } else { SK_DROP }
}

/// A segment that belongs to no connection yet.
#[inline(always)]
fn arrive(ctx: &SkReuseportContext, plan: &'static Plan, loads: Loads) -> Verdict {
    let Some(flags) = tcp_flags(ctx) else { return Verdict::Room(Outcome::Malformed) };
    let opens = match flags & (SYN | ACK | FIN | RST) {
        SYN => true,
        // The ACK of a SYN cookie, or one that was under way when its connection was reset.
        // They look the same, and a place for the second would stay taken until it expires.
        // So it is believed only where every connection comes by a cookie; a cookie that the
        // kernel sent in need is honoured by the room.
        ACK => plan.flags & FLAG_COOKIES != 0,
        _ => false,
    };
    if plan.flags & FLAG_CHECKS != 0
        && let Some(to) = maps::directed(&arriving_client(ctx))
    {
        return Verdict::Done(direct(ctx, plan, to));
    }
    if plan.flags & FLAG_BELL != 0
        && let Some(index) = maps::bell(contract::client(arriving_source(ctx), arriving_port(ctx)))
        && SOCKETS.select_reuseport(ctx, index).is_ok()
    {
        count(Outcome::Bell);
        return Verdict::Done(SK_PASS);
    }
    if !opens {
        return Verdict::Room(Outcome::Stray);
    }
    if plan.flags & FLAG_CLOSING != 0 {
        count(Outcome::RefusedClosing);
        return Verdict::Done(SK_DROP);
    }
    let now = maps::nanoseconds();
    let has_turn = loads.waiting() == 0 || !maps::is_attended(now);
    let is_suspect = plan.capacity > 0 && loads.is_suspicious(now);
    let is_limited = limit::are_set(plan);
    let hashes = plan.policy == Policy::SourceHash as u32;
    let source = if hashes || is_limited { arriving_source(ctx) } else { [0; 4] };
    let (high, low) = halves(ctx, source);
    let mut admission = Admission::Granted as u64;
    if is_limited {
        admission = limit::admit(high, low, now);
        if admission == Admission::Granted as u64 {
            admission = limit::begin(u64::from(has_turn && !is_suspect), now);
        }
        if let Some(why) = Admission::refused(admission) {
            if Admission::has_source(admission) {
                limit::withdraw(high, low, limit::SOURCE, now);
            }
            count(why);
            debug!(ctx, "new connection is refused: the service or its source has as many as it may");
            return Verdict::Done(SK_DROP);
        }
    }
    let why = if !has_turn {
        Outcome::WaitTurn
    } else if is_suspect {
        Outcome::WaitSuspect
    } else if let Some(why) = Admission::waits(admission) {
        why
    } else {
        match steer(ctx, plan, loads, Asks::New, now, source) {
            Steered::To(slot, next_best) => {
                if flags & SYN != 0 && plan.flags & FLAG_COOKIES != 0 {
                    // The connection comes back as an ACK, which takes the place.
                    maps::change(slot, Change::GiveBackReserved);
                    if is_limited {
                        limit::withdraw(high, low, limit::PLACE | limit::TOKEN | limit::SOURCE, now);
                    }
                }
                count(if next_best { Outcome::NextBest } else { Outcome::Selected });
                debug!(ctx, "new connection goes to slot {}", slot);
                return Verdict::Done(SK_PASS);
            }
            steered => {
                if is_limited {
                    limit::withdraw(high, low, limit::of_who_waits(plan), now);
                }
                match steered {
                    Steered::To(..) | Steered::Full => Outcome::WaitLimit,
                    Steered::NoServer => Outcome::WaitNoServer,
                    Steered::Failed => Outcome::WaitSelectFailed,
                }
            }
        }
    };
    if loads.waiting() >= u64::from(plan.capacity) {
        if is_limited {
            limit::withdraw(high, low, limit::SOURCE, now);
        }
        let is_full = matches!(why, Outcome::WaitLimit) && plan.capacity == 0;
        count(if is_full { Outcome::RefusedLimit } else { Outcome::RefusedCapacity });
        debug!(ctx, "new connection is refused: no server has a place, and as many wait as may");
        return Verdict::Done(SK_DROP);
    }
    Verdict::Room(why)
}

/// A connection of ours, to the server that it is for, whatever else holds of that; or to nobody.
/// It takes no place. (Every segment of it that comes here is answered like its SYN: with SYN cookies
/// its ACK has to come to the same listener.)
#[inline(always)]
fn direct(ctx: &SkReuseportContext, plan: &'static Plan, to: Directed) -> u32 {
    let slot = to.slot as usize & (SLOTS - 1);
    let run = select::run(plan, maps::group(), slot);
    let turn = to.nth.checked_rem(u32::from(run.len));
    if let Some(turn) = turn
        && plan.servers[slot].generation == to.generation
        && SOCKETS.select_reuseport(ctx, u32::from(run.first) + turn).is_ok()
    {
        count(Outcome::Directed);
        return SK_PASS;
    }
    count(Outcome::DirectedRefused);
    SK_DROP
}

/// A connection of a closing listener whose handshake is not complete: its ACK has come, or
/// the kernel is about to send its SYN-ACK again.
#[inline(always)]
fn move_half_open(
    ctx: &SkReuseportContext,
    plan: &'static Plan,
    loads: Loads,
    migrating: *mut bpf_sock,
) -> Verdict {
    let now = maps::nanoseconds();
    let suspicious = loads.is_suspicious(now);
    // SAFETY: the context is the kernel's. Without a segment it is the SYN-ACK's timer.
    if unsafe { (*ctx.md).len } == 0 && suspicious {
        // A flood leaves them behind by the thousand, and each would follow us from room to room.
        count(Outcome::DroppedHalfOpen);
        return Verdict::Done(SK_DROP);
    }
    if plan.flags & FLAG_CHECKS != 0 && maps::directed(&socket_client(migrating)).is_some() {
        count(Outcome::CheckGivenUp);
        return Verdict::Done(SK_DROP);
    }
    let waits = suspicious || loads.waiting() > 0 && maps::is_attended(now);
    // What was to go to a server has its place in the service already.
    // SAFETY: a socket, which the verifier checks.
    let listener = unsafe { bpf_get_socket_cookie((*ctx.md).__bindgen_anon_3.sk.cast()) };
    let enters = limit::are_set(plan) && room_of(home(listener)).is_some();
    if !waits && (!enters || limit::enter(limit::Change::Reserve as u64, now) == limit::TAKEN) {
        let hashes = plan.policy == Policy::SourceHash as u32;
        let source = if hashes { socket_source(migrating) } else { [0; 4] };
        if let Steered::To(slot, _) = steer(ctx, plan, loads, Asks::HalfOpen, now, source) {
            count(Outcome::MovedHalfOpen);
            debug!(ctx, "half-open connection moves to slot {}", slot);
            return Verdict::Done(SK_PASS);
        }
        if enters {
            limit::withdraw(0, 0, limit::of_who_waits(plan), now);
        }
    }
    Verdict::Room(Outcome::ParkedHalfOpen)
}

/// An established connection of a closing listener: of a server that is gone, or of a room that
/// is being emptied. The kernel brings them in the order of the accept queue.
#[inline(always)]
fn move_established(
    ctx: &SkReuseportContext,
    plan: &'static Plan,
    loads: Loads,
    migrating: *mut bpf_sock,
) -> u32 {
    // SAFETY: both are sockets, which the verifier checks.
    let (cookie, listener) = unsafe {
        (bpf_get_socket_cookie(migrating.cast()), bpf_get_socket_cookie((*ctx.md).__bindgen_anon_3.sk.cast()))
    };
    let now = maps::nanoseconds();
    let before = match maps::owner(cookie) {
        Some(known) => known,
        None => {
            let owner = Owner { owner: home(listener), marks: 0, since: now, order: now };
            // Without a record its close would count down where it was counted up. So it is not
            // moved: the kernel resets it.
            if !maps::record(loads, cookie, owner, true) {
                count(Outcome::MoveFailed);
                return SK_DROP;
            }
            owner
        }
    };
    if before.owner == CHECKER {
        // The kernel resets it, and its close is nobody's.
        count(Outcome::CheckGivenUp);
        return SK_DROP;
    }
    let group = maps::group();
    let Some(corridor) = maps::corridor(group) else { return SK_DROP };
    let parked = maps::parked(listener);
    // While nobody attends, rooms close because their keeper has ended, and any place is better than
    // none.
    let is_before_others =
        room_of(before.owner).is_none() || before.order <= corridor.bound() || !maps::is_attended(now);
    // Who has had a server keeps his place in the service. So does who waits since a build that did not
    // know of it.
    let enters = limit::are_set(plan) && before.marks & UNSERVED != 0;
    // Once one of them is parked, so are all behind it: none may overtake it.
    if parked.count == 0
        && is_before_others
        && (!enters || limit::enter(limit::Change::Take as u64, now) == limit::TAKEN)
    {
        let hashes = plan.policy == Policy::SourceHash as u32;
        let source = if hashes { socket_source(migrating) } else { [0; 4] };
        if let Steered::To(slot, _) = steer(ctx, plan, loads, Asks::Established, now, source) {
            // Nothing can happen to the connection meanwhile: the kernel has it locked.
            let counts = enters && plan.limits.service.connections != 0;
            let marks = before.marks & !UNSERVED | if counts { IN_SERVICE } else { 0 };
            maps::record(loads, cookie, Owner { owner: slot, marks, ..before }, false);
            loads.add(Sum::Total(slot), 1);
            if room_of(before.owner).is_some() {
                loads.note_wait(before.since, now);
                count(Outcome::HandedOver);
            } else {
                count(Outcome::Moved);
            }
            debug!(ctx, "connection moves to slot {}", slot);
            leave(loads, before.owner, false);
            return SK_PASS;
        }
        if enters {
            limit::leave(plan, loads, now);
        }
    }
    let owner = match room_of(before.owner) {
        Some(_) => before,
        // Older than all that wait, whose order is a time.
        None => Owner { order: loads.add(Sum::Orphans, 1) + 1, since: now, ..before },
    };
    let mut last = parked;
    for _ in 0..SPARE_TRIES {
        let place = spare(loads, corridor, group, last);
        if place.count == 0 {
            break;
        }
        if SOCKETS.select_reuseport(ctx, place.index).is_ok() {
            maps::note_parked(listener, place);
            maps::record(loads, cookie, Owner { owner: in_room(place.index), ..owner }, false);
            if let Some(coming) = maps::coming(place.index) {
                coming.note_first(owner.order, owner.since);
                coming.add(Comes::Entered);
            }
            count(Outcome::Parked);
            leave(loads, before.owner, true);
            return SK_PASS;
        }
        // It was emptied while the queue is still moving. Those behind go into the next one, whose
        // place in the order is behind it, and ahead of everybody who has had no server.
        last = Parked { count: FULL, ..place };
    }
    // No spare room, because many servers die at once, or a long queue moves while its first ones
    // are handed over: a room of the ring to which nobody has come, if another can be current then.
    // Otherwise behind those that wait, but not lost.
    for _ in 0..RING_TRIES {
        let current = loads.current(group);
        let index = corridor.room(current >> 16);
        let Some(coming) = maps::coming(index) else { break };
        let has_next = (current >> 16) + 1 < corridor.made();
        let is_first = has_next && coming.first() == 0;
        if has_next && !is_first {
            maps::next_room(loads, corridor, group, current);
            continue;
        }
        if SOCKETS.select_reuseport(ctx, index).is_err() {
            break;
        }
        maps::record(loads, cookie, Owner { owner: in_room(index), ..owner }, false);
        coming.note_first(if is_first { owner.order } else { now }, owner.since);
        coming.add(Comes::Entered);
        if is_first {
            maps::next_room(loads, corridor, group, current);
            maps::note_parked(listener, Parked { index, count: 1 });
        }
        count(if is_first { Outcome::Parked } else { Outcome::ParkedBehind });
        leave(loads, before.owner, true);
        return SK_PASS;
    }
    // The kernel resets it, and its close counts down where it was counted.
    count(Outcome::MoveFailed);
    SK_DROP
}

/// Spare rooms that are tried for one connection.
const SPARE_TRIES: usize = 2;

/// Rooms of the ring that are tried: the current one may be occupied, and the next one by another
/// CPU.
const RING_TRIES: usize = 3;

/// In a room where so many are parked is no place.
const FULL: u32 = u32::MAX - 1;

/// Where the next connection of a closing listener is parked: in the room of the one before,
/// as long as that is not full, or in the next spare one; or with the one before all the same.
/// A count of 0: nowhere.
#[inline(always)]
fn spare(loads: Loads, corridor: Corridor, group: usize, parked: Parked) -> Parked {
    let with_the_last = Parked { index: parked.index, count: parked.count + u32::from(parked.count != 0) };
    if parked.count != 0 && with_the_last.count <= corridor.chunk() {
        return with_the_last;
    }
    for _ in 0..SPARE_RACES {
        let taken = loads.spares_taken(group);
        if taken >= corridor.spares() {
            break;
        }
        let index = corridor.spare(taken);
        if loads.take_spare(group, taken) {
            return Parked { index, count: 1 };
        }
    }
    if with_the_last.count > FULL { Parked { count: 0, ..with_the_last } } else { with_the_last }
}

/// Times that two CPUs may want the same spare room, each on behalf of a closing listener.
const SPARE_RACES: usize = 4;

/// The owner of a connection whose listener was never adopted: nobody has counted it.
const NOBODY: u32 = SLOTS as u32;

/// Takes the count of a moved connection from its old owner. A server's new one was taken by
/// `steer`; the waiting list's is taken here.
#[inline(always)]
fn leave(loads: Loads, old: u32, waits: bool) {
    if let Some(index) = room_of(old) {
        if let Some(coming) = maps::coming(index) {
            coming.add(Comes::Gone);
        }
        if !waits {
            loads.add(Sum::Waiting, -1);
        }
        return;
    }
    if old < NOBODY {
        maps::change(old, Change::Close);
    }
    if waits {
        loads.add(Sum::Waiting, 1);
        loads.note_waiting();
        maps::wake();
    }
}

/// Leaves the connection to the current room, and counts why; refuses it if there is none. A
/// room that was given many SYNs is left for the next one: they may be a flood, which never
/// completes a handshake and so never makes the next room current.
#[inline(always)]
fn to_room(ctx: &SkReuseportContext, loads: Loads, why: Outcome) -> u32 {
    let group = maps::group();
    let Some(corridor) = maps::corridor(group) else { return SK_DROP };
    for _ in 0..ROOM_TRIES {
        let current = loads.current(group);
        let sequence = current >> 16;
        let has_next = sequence + 1 < corridor.made();
        let crowd = corridor.crowd().max(corridor.share());
        let is_over = sequence < corridor.least() || current & 0xffff >= crowd;
        if !(has_next && is_over) {
            let index = corridor.room(sequence);
            let Some(coming) = maps::coming(index) else { break };
            if !has_next && coming.completed() >= corridor.full() {
                break;
            }
            if SOCKETS.select_reuseport(ctx, index).is_ok() {
                if current & 0xffff < 0xf000 {
                    loads.add(Sum::Syns(group), 1);
                }
                coming.add(Comes::Offered);
                count(why);
                return SK_PASS;
            }
            if !has_next {
                break;
            }
        }
        maps::next_room(loads, corridor, group, current);
    }
    count(Outcome::RefusedNoRoom);
    debug!(ctx, "connection is refused: no server takes it and there is no room");
    SK_DROP
}

/// Rooms that are tried for one connection.
const ROOM_TRIES: usize = 4;

/// Chooses a server, takes a place in it, and selects one of its listeners.
#[inline(always)]
fn steer(
    ctx: &SkReuseportContext,
    plan: &'static Plan,
    loads: Loads,
    asks: Asks,
    time: u64,
    source: [u32; 4],
) -> Steered {
    if plan.eligible == 0 {
        return Steered::NoServer;
    }
    let now = word::epoch(time);
    let place = place(asks as u64);
    let mut excluded = [NO_SLOT; TRIES];
    let mut failures = 0;
    let mut narrow = narrows(plan.policy);
    for attempt in 0..ATTEMPTS {
        let mut answer = NOTHING;
        if narrow {
            answer = candidate(now, asks as u64, wide(source[0], source[1]), wide(source[2], source[3]));
            if answer == NOTHING {
                narrow = false;
                count(Outcome::Widened);
            }
        }
        if answer == NOTHING {
            answer = scan(now, asks as u64, packed(excluded));
        }
        if answer == NOTHING {
            return if failures > 0 { Steered::Failed } else { Steered::Full };
        }
        let slot = (answer >> 56) as u32;
        let server = &plan.servers[slot as usize];
        let seen = loads.word(slot as usize);
        let taken = if attempt < EXACT && plan.policy != Policy::SourceHash as u32 {
            // Only if nothing changed since the scan; otherwise another may be better now.
            let same = (seen ^ answer) & WORD_BITS == 0;
            let taken = word::take(seen, now, place, u64::from(server.limit), u64::from(server.reservable));
            match taken {
                Some(taken) if same && loads.swap(slot, seen, taken) => {
                    loads.note_expired(plan, slot, seen, time);
                    taken
                }
                _ => continue,
            }
        } else {
            // Many arrive at once, and any place in a good server is better than none; or the
            // client has its server, whatever that holds.
            match take_place(u64::from(slot), asks as u64, time) {
                NOTHING => continue,
                taken => taken,
            }
        };
        if select_listener(ctx, plan, slot, loads, asks) {
            loads.pass_turn(slot, server.stride);
            if matches!(place, Place::Active) {
                loads.note_most(slot, server.generation, word::active(taken));
            }
            return Steered::To(slot, failures > 0);
        }
        let back = if asks == Asks::Established { Change::GiveBackActive } else { Change::GiveBackReserved };
        maps::change(slot, back);
        failures += 1;
        narrow = false;
        if failures == TRIES {
            break;
        }
        let [a, b, c, _] = excluded;
        excluded = [slot, a, b, c];
    }
    // Where only races were lost, somebody else may have taken the last place.
    if failures == 0 && scan(now, asks as u64, packed(excluded)) == NOTHING {
        return Steered::Full;
    }
    Steered::Failed
}

/// Takes a place in a slot's word, whatever it has become since the scan. Returns the word, or
/// [`NOTHING`] if it is full or changes too fast. Global, as [`scan`] is.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn take_place(slot: u64, asks: u64, time: u64) -> u64 {
    let (Some((_, plan)), Some(loads)) = (maps::plan(), maps::loads()) else { return NOTHING };
    let now = word::epoch(time);
    let server = &plan.servers[slot as usize & (SLOTS - 1)];
    for _ in 0..16 {
        let seen = loads.word(slot as usize);
        let limits = (u64::from(server.limit), u64::from(server.reservable));
        let Some(taken) = word::take(seen, now, place(asks), limits.0, limits.1) else { return NOTHING };
        if loads.swap(slot as u32, seen, taken) {
            loads.note_expired(plan, slot as u32, seen, time);
            return taken;
        }
    }
    count(Outcome::WordContended);
    NOTHING
}

/// [`select::best`] as a function of its own. A global function is verified once and not again
/// for each way that leads to it; inlined, the verifier gave up after a million instructions.
/// So it takes and gives only numbers: see [`answer`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn scan(now: u64, asks: u64, excluded: u64) -> u64 {
    let (Some((_, plan)), Some(loads)) = (maps::plan(), maps::loads()) else { return NOTHING };
    let arrival = Arrival { now, place: place(asks), excluded: unpacked(excluded) };
    answer(select::best(plan, |slot| loads.word(slot), |slot| loads.turn(slot), &arrival))
}

/// Some server would take a connection that waits, and the service as a whole too.
#[inline(always)]
pub(crate) fn has_place(plan: &Plan, loads: Loads, time: u64) -> bool {
    (!limit::are_set(plan) || limit::is_open(plan, loads, time))
        && scan(word::epoch(time), Asks::Established as u64, packed([NO_SLOT; TRIES])) != NOTHING
}

/// The first choice of the policies that do not look at all servers; global for the same reason.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn candidate(now: u64, asks: u64, source_high: u64, source_low: u64) -> u64 {
    let (Some((active, plan)), Some(loads)) = (maps::plan(), maps::loads()) else { return NOTHING };
    let arrival = Arrival { now, place: place(asks), excluded: [NO_SLOT; TRIES] };
    if plan.policy == Policy::PowerOfTwo as u32 {
        // SAFETY: a helper without arguments.
        let random = unsafe { bpf_get_prandom_u32() };
        let (one, other) = select::two_of(plan.eligible, random);
        let choice = |place: u32| {
            let slot = u32::from(plan.order[place as usize & (SLOTS - 1)]);
            select::this(plan, slot, loads.word(slot as usize), &arrival)
        };
        return answer(match (choice(one), choice(other)) {
            (Some(one), Some(other)) => Some(select::less_loaded(plan, one, other, now)),
            (one, other) => one.or(other),
        });
    }
    let Some(table) = HASH.get(active) else { return NOTHING };
    let source =
        [(source_high >> 32) as u32, source_high as u32, (source_low >> 32) as u32, source_low as u32];
    for probe in 0..PROBES {
        let slot = u32::from(table[select::bucket(source, probe)]);
        if slot == NO_SLOT {
            return NOTHING;
        }
        let choice = select::this(plan, slot, loads.word(slot as usize), &arrival);
        if choice.is_some() {
            return answer(choice);
        }
    }
    NOTHING
}

/// Scans for one connection: the ones that lose a race against another CPU come on top of the
/// `TRIES` that fail to select.
const ATTEMPTS: usize = 8;
/// Scans that have to hold exactly.
const EXACT: usize = 2;

const NOTHING: u64 = u64::MAX;
const WORD_BITS: u64 = (1 << 56) - 1;

/// A choice as one number: the slot in the upper 8 bits, the lower 56 bits of its word below.
/// (No slot's word has all of these set: an active count stays below its end.)
#[inline(always)]
fn answer(choice: Option<Choice>) -> u64 {
    match choice {
        Some(choice) => u64::from(choice.slot) << 56 | choice.seen & WORD_BITS,
        None => NOTHING,
    }
}

#[inline(always)]
fn place(asks: u64) -> Place {
    if asks == Asks::Established as u64 { Place::Active } else { Place::Reserved }
}

#[inline(always)]
fn wide(high: u32, low: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

/// Four slot numbers of 16 bits in one word.
#[inline(always)]
fn packed([a, b, c, d]: [u32; TRIES]) -> u64 {
    u64::from(a) | u64::from(b) << 16 | u64::from(c) << 32 | u64::from(d) << 48
}

#[inline(always)]
fn unpacked(slots: u64) -> [u32; TRIES] {
    [
        slots as u32 & 0xffff,
        (slots >> 16) as u32 & 0xffff,
        (slots >> 32) as u32 & 0xffff,
        (slots >> 48) as u32,
    ]
}

/// Whether the policy asks a few servers before it asks all.
#[inline(always)]
fn narrows(policy: u32) -> bool {
    policy == Policy::PowerOfTwo as u32 || policy == Policy::SourceHash as u32
}

/// Selects one of the slot's listeners in this group; they take turns.
#[inline(always)]
fn select_listener(
    ctx: &SkReuseportContext,
    plan: &'static Plan,
    slot: u32,
    loads: Loads,
    asks: Asks,
) -> bool {
    let slot = slot as usize & (SLOTS - 1);
    let run = select::run(plan, maps::group(), slot);
    if run.len == 0 {
        return false;
    }
    let mut index = u32::from(run.first);
    if run.len > 1 {
        // A stride is never 0; a division that does not say what then would be a way to panic.
        let turn = loads.turn(slot).checked_div(plan.servers[slot].stride).unwrap_or(0);
        index += (turn % u64::from(run.len)) as u32;
    }
    let selected = SOCKETS.select_reuseport(ctx, index).is_ok();
    if selected && asks == Asks::Established && plan.flags & FLAG_BELL != 0 {
        // Its server is not woken by the kernel: the attendant does.
        if let Some(coming) = maps::coming(index) {
            coming.add(Comes::Moved);
        }
        maps::wake();
    }
    selected
}

/// The owner that a listener's connections have: a slot, a room, or nobody.
#[inline(always)]
fn home(listener: u64) -> u32 {
    // SAFETY: the value is copied at once.
    match unsafe { HOME.get(listener).copied() } {
        Some(home) if home.slot == ROOM => in_room(home.index),
        Some(home) => home.slot,
        None => NOBODY,
    }
}

/// The flags byte of the TCP header.
#[inline(always)]
fn tcp_flags(ctx: &SkReuseportContext) -> Option<u8> {
    const AT: usize = 13;
    let (data, end) = (ctx.data(), ctx.data_end());
    if data + AT < end {
        // SAFETY: inside the packet, as the line before says, and the verifier checks.
        return Some(unsafe { *((data + AT) as *const u8) });
    }
    // Not in the first fragment of a paged packet.
    let mut flags = 0u8;
    // SAFETY: one byte is written to `flags`; the data begins at the TCP header.
    let error = unsafe { bpf_skb_load_bytes(ctx.as_ptr(), AT as u32, (&raw mut flags).cast::<c_void>(), 1) };
    (error == 0).then_some(flags)
}

/// A client as DIRECTED knows it. An IPv4 client of a dual-stack listener: as its SYN was seen.
#[inline(always)]
pub(crate) fn client(ip: [u32; 4], family: u32, port: u32) -> Address {
    if family == AF_INET6 && ip[0] == 0 && ip[1] == 0 && ip[2] == 0xffff_u32.to_be() {
        return Address { ip: [ip[3], 0, 0, 0], family: AF_INET, port };
    }
    Address { ip, family, port }
}

/// The client of an arriving segment.
#[inline(always)]
fn arriving_client(ctx: &SkReuseportContext) -> Address {
    let family = if ctx.eth_protocol() == ETH_P_IP_BE { AF_INET } else { AF_INET6 };
    client(arriving_source(ctx), family, arriving_port(ctx))
}

/// The client's port of an arriving segment; zero if it cannot be read.
#[inline(always)]
fn arriving_port(ctx: &SkReuseportContext) -> u32 {
    let mut port = 0u16;
    // SAFETY: two bytes are written to `port`; the data begins at the TCP header.
    unsafe { bpf_skb_load_bytes(ctx.as_ptr(), 0, (&raw mut port).cast::<c_void>(), 2) };
    u32::from(u16::from_be(port))
}

/// The client's address of an arriving segment; zero if it cannot be read.
#[inline(always)]
fn arriving_source(ctx: &SkReuseportContext) -> [u32; 4] {
    let mut source = [0u32; 4];
    let (offset, length) = if ctx.eth_protocol() == ETH_P_IP_BE { (12, 4) } else { (8, 16) };
    // SAFETY: at most the 16 bytes of `source` are written.
    unsafe {
        bpf_skb_load_bytes_relative(
            ctx.as_ptr(),
            offset,
            source.as_mut_ptr().cast::<c_void>(),
            length,
            BPF_HDR_START_NET,
        );
    }
    source
}

/// The halves of an arriving client's address.
#[inline(always)]
fn halves(ctx: &SkReuseportContext, source: [u32; 4]) -> (u64, u64) {
    if ctx.eth_protocol() == ETH_P_IP_BE { source::mapped(source[0]) } else { source::halves(source) }
}

/// The client's address of a connection that moves.
#[inline(always)]
fn socket_source(socket: *mut bpf_sock) -> [u32; 4] {
    socket_client(socket).ip
}

/// The client of a connection that moves.
#[inline(always)]
fn socket_client(socket: *mut bpf_sock) -> Address {
    // SAFETY: the verifier knows it for a socket and checks each field. Word by word, as it
    // wants it ("pointer arithmetic on sock_common prohibited").
    let (ip, family, port) = unsafe {
        let family = (*socket).family;
        let ip = if family == AF_INET {
            [(*socket).dst_ip4, 0, 0, 0]
        } else {
            [
                (&raw const (*socket).dst_ip6[0]).read_volatile(),
                (&raw const (*socket).dst_ip6[1]).read_volatile(),
                (&raw const (*socket).dst_ip6[2]).read_volatile(),
                (&raw const (*socket).dst_ip6[3]).read_volatile(),
            ]
        };
        (ip, family, u32::from(u16::from_be((*socket).dst_port)))
    };
    client(ip, family, port)
}
