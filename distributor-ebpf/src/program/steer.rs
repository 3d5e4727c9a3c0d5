//! `select`: which listener of the group gets this connection.
//!
//! A new connection goes to the server that the policy chooses, which takes a place in its
//! word first, so that limits hold. A connection of a closing listener is moved the same way
//! and takes its count along. When nothing can take it, the room does; refusal comes last.

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
    contract::{Address, EventKind, FLAG_CLOSING, FLAG_COOKIES, Outcome, Plan, Policy, ROOM, SLOTS},
    select::{self, Arrival, Choice, NO_SLOT, PROBES, TRIES},
    word::{self, Place},
};

use crate::maps::{self, Change, HASH, HOME, Loads, MOVED, SOCKETS, Sum, count};

const FIN: u8 = 1;
const SYN: u8 = 1 << 1;
const RST: u8 = 1 << 2;
const ACK: u8 = 1 << 4;

/// States of a migrating socket (include/net/tcp_states.h).
const TCP_CLOSE: u32 = 7;
const TCP_NEW_SYN_RECV: u32 = 12;

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

#[inline(always)]
pub(crate) fn run(ctx: &SkReuseportContext) -> u32 {
    let (Some((_, plan)), Some(loads)) = (maps::plan(), maps::loads()) else {
        // Cannot happen: array maps always have their entries.
        count(Outcome::NoPlan);
        return SK_DROP;
    };
    // SAFETY: the context is the kernel's; a null pointer is told by the test below.
    let migrating = unsafe { (*ctx.md).__bindgen_anon_4.migrating_sk };
    let mut asks = Asks::New;
    let mut reserves = true;
    let mut cookie = 0;
    let mut old = NOBODY;
    let hashes = plan.policy == Policy::SourceHash as u32;
    let source;
    if migrating.is_null() {
        let Some(flags) = tcp_flags(ctx) else { return room(ctx, plan, Outcome::Malformed) };
        let opens = match flags & (SYN | ACK | FIN | RST) {
            SYN => true,
            // The ACK of a SYN cookie, or one that was under way when its connection was reset.
            // They look the same, and a place for the second would stay taken until it expires.
            // So it is believed only where every connection comes by a cookie; a cookie that the
            // kernel sent in need is honoured by the room.
            ACK => plan.flags & FLAG_COOKIES != 0,
            _ => false,
        };
        if !opens {
            return room(ctx, plan, Outcome::Stray);
        }
        if plan.flags & FLAG_CLOSING != 0 {
            count(Outcome::RefusedClosing);
            return SK_DROP;
        }
        reserves = flags & SYN == 0 || plan.flags & FLAG_COOKIES == 0;
        source = if hashes { arriving_source(ctx) } else { [0; 4] };
    } else {
        // SAFETY: not null, and the verifier knows it for a socket.
        let state = unsafe { (*migrating).state };
        if state == TCP_CLOSE {
            // Its client reset it while it was queued, and `track` has counted it down already.
            count(Outcome::MovedDead);
            return SK_DROP;
        }
        source = if hashes { socket_source(migrating) } else { [0; 4] };
        if state == TCP_NEW_SYN_RECV {
            asks = Asks::HalfOpen;
        } else {
            asks = Asks::Established;
            // SAFETY: both are sockets, which the verifier checks.
            let listener = unsafe {
                cookie = bpf_get_socket_cookie(migrating.cast());
                bpf_get_socket_cookie((*ctx.md).__bindgen_anon_3.sk.cast())
            };
            let before = owner(cookie);
            old = before.or_else(|| home(listener)).unwrap_or(NOBODY);
            if before.is_none() {
                // Before the entry exists: its close looks into MOVED only if this is not 0.
                loads.add(Sum::Moved, 1);
            }
        }
    }
    let steered = steer(ctx, plan, loads, asks, cookie, source);
    match asks {
        Asks::New => arrived(ctx, plan, loads, &steered, reserves),
        Asks::HalfOpen => match steered {
            Steered::To(slot, _) => {
                count(Outcome::MovedHalfOpen);
                debug!(ctx, "half-open connection moves to slot {}", slot);
                SK_PASS
            }
            _ => room(ctx, plan, Outcome::ParkedHalfOpen),
        },
        Asks::Established => {
            let new = match steered {
                Steered::To(slot, _) => {
                    loads.add(Sum::Total(slot), 1);
                    count(if old == ROOM { Outcome::HandedOver } else { Outcome::Moved });
                    debug!(ctx, "connection moves to slot {}", slot);
                    slot
                }
                _ => {
                    record_owner(cookie, ROOM);
                    if room(ctx, plan, Outcome::Parked) == SK_DROP {
                        // The kernel resets it, and its close counts down where it was counted.
                        // (What NOBODY has counted has no tag, and its close asks no owner.)
                        record_owner(cookie, old);
                        count(Outcome::MoveFailed);
                        return SK_DROP;
                    }
                    ROOM
                }
            };
            leave(loads, old, new, cookie);
            SK_PASS
        }
    }
}

/// The end of a new connection's way: to its server, to the room, or refused.
#[inline(always)]
fn arrived(
    ctx: &SkReuseportContext,
    plan: &'static Plan,
    loads: Loads,
    steered: &Steered,
    reserves: bool,
) -> u32 {
    let why = match *steered {
        Steered::To(slot, next_best) => {
            if !reserves {
                // The connection comes back as an ACK, which takes the place.
                maps::change(slot, Change::GiveBackReserved);
            }
            count(if next_best { Outcome::NextBest } else { Outcome::Selected });
            debug!(ctx, "new connection goes to slot {}", slot);
            return SK_PASS;
        }
        Steered::Full => {
            count(Outcome::RefusedLimit);
            debug!(ctx, "new connection is refused: every server is at its limit");
            return SK_DROP;
        }
        Steered::NoServer => Outcome::WaitNoServer,
        Steered::Failed => Outcome::WaitSelectFailed,
    };
    if loads.waiting() >= u64::from(plan.capacity) {
        count(Outcome::RefusedCapacity);
        debug!(ctx, "new connection is refused: as many wait as may");
        return SK_DROP;
    }
    room(ctx, plan, why)
}

/// The owner of a connection whose listener was never adopted: nobody has counted it. Not an
/// `Option`, whose payload the verifier takes for read where there is none ("R1 !read_ok").
const NOBODY: u32 = ROOM - 1;

/// Takes the count of a moved connection from its old owner. The new server's was taken by
/// `steer`; the room's is taken here.
#[inline(always)]
fn leave(loads: Loads, old: u32, new: u32, cookie: u64) {
    if old == new {
        return;
    }
    if old == ROOM {
        loads.add(Sum::Waiting, -1);
        maps::tell(EventKind::HandedOver, cookie, 0, Address::default());
    } else if old != NOBODY {
        maps::change(old, Change::Close);
    }
    if new == ROOM {
        loads.add(Sum::Waiting, 1);
        loads.note_waiting();
        maps::tell(EventKind::Waiting, cookie, 0, Address::default());
    }
}

/// Chooses a server, takes a place in it, and selects one of its listeners.
#[inline(always)]
fn steer(
    ctx: &SkReuseportContext,
    plan: &'static Plan,
    loads: Loads,
    asks: Asks,
    cookie: u64,
    source: [u32; 4],
) -> Steered {
    if plan.eligible == 0 {
        return Steered::NoServer;
    }
    let now = word::epoch(maps::nanoseconds());
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
                Some(taken) if same && loads.swap(slot, seen, taken) => taken,
                _ => continue,
            }
        } else {
            // Many arrive at once, and any place in a good server is better than none; or the
            // client has its server, whatever that holds.
            match take_place(u64::from(slot), asks as u64, now) {
                NOTHING => continue,
                taken => taken,
            }
        };
        if cookie != 0 {
            // Before the selection: once selected, the connection may close on another CPU.
            record_owner(cookie, slot);
        }
        if select_listener(ctx, plan, slot, loads) {
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
pub(crate) extern "C" fn take_place(slot: u64, asks: u64, now: u64) -> u64 {
    let (Some((_, plan)), Some(loads)) = (maps::plan(), maps::loads()) else { return NOTHING };
    let server = &plan.servers[slot as usize & (SLOTS - 1)];
    for _ in 0..16 {
        let seen = loads.word(slot as usize);
        let limits = (u64::from(server.limit), u64::from(server.reservable));
        let Some(taken) = word::take(seen, now, place(asks), limits.0, limits.1) else { return NOTHING };
        if loads.swap(slot as u32, seen, taken) {
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
fn select_listener(ctx: &SkReuseportContext, plan: &'static Plan, slot: u32, loads: Loads) -> bool {
    let slot = slot as usize & (SLOTS - 1);
    let run = plan.runs[maps::group() * SLOTS + slot];
    if run.len == 0 {
        return false;
    }
    let mut index = u32::from(run.first);
    if run.len > 1 {
        // A stride is never 0; a division that does not say what then would be a way to panic.
        let turn = loads.turn(slot).checked_div(plan.servers[slot].stride).unwrap_or(0);
        index += (turn % u64::from(run.len)) as u32;
    }
    SOCKETS.select_reuseport(ctx, index).is_ok()
}

/// Leaves the connection to the room, and counts why; refuses it if there is none.
#[inline(always)]
fn room(ctx: &SkReuseportContext, plan: &'static Plan, why: Outcome) -> u32 {
    if SOCKETS.select_reuseport(ctx, plan.rooms[maps::group()]).is_ok() {
        count(why);
        return SK_PASS;
    }
    count(Outcome::RefusedNoRoom);
    debug!(ctx, "connection is refused: no server takes it and there is no room");
    SK_DROP
}

/// The slot a moved connection belongs to now.
#[inline(always)]
fn owner(cookie: u64) -> Option<u32> {
    // SAFETY: the value is copied at once.
    unsafe { MOVED.get(cookie).copied() }
}

/// The slot, or ROOM, that a listener belongs to.
#[inline(always)]
fn home(listener: u64) -> Option<u32> {
    // SAFETY: the value is copied at once.
    unsafe { HOME.get(listener).map(|home| home.slot) }
}

#[inline(always)]
fn record_owner(cookie: u64, slot: u32) {
    if MOVED.insert(cookie, slot, 0).is_err() {
        count(Outcome::MovedLost);
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

/// The client's address of a connection that moves.
#[inline(always)]
fn socket_source(socket: *mut bpf_sock) -> [u32; 4] {
    const AF_INET: u32 = 2;
    // SAFETY: the verifier knows it for a socket and checks each field. Word by word, as it
    // wants it ("pointer arithmetic on sock_common prohibited").
    unsafe {
        if (*socket).family == AF_INET {
            return [(*socket).dst_ip4, 0, 0, 0];
        }
        let ip = [
            (&raw const (*socket).dst_ip6[0]).read_volatile(),
            (&raw const (*socket).dst_ip6[1]).read_volatile(),
            (&raw const (*socket).dst_ip6[2]).read_volatile(),
            (&raw const (*socket).dst_ip6[3]).read_volatile(),
        ];
        // An IPv4 client of a dual-stack listener: as its SYN was seen.
        if ip[0] == 0 && ip[1] == 0 && ip[2] == 0xffff_u32.to_be() { [ip[3], 0, 0, 0] } else { ip }
    }
}
