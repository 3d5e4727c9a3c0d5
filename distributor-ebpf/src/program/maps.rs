//! The maps, and the few ways the programs touch them.
//!
//! All pointers into map values and all intrinsics are here, so that the programs themselves
//! read like recipes. Each function is one access; none decides anything.

use core::{
    intrinsics::{AtomicOrdering, atomic_cxchg, atomic_xadd},
    ptr,
};

use aya_ebpf::{
    Global,
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, BPF_RB_FORCE_WAKEUP, bpf_sock},
    helpers::{bpf_ktime_get_ns, generated::bpf_sk_storage_get},
    macros::{btf_map, map},
    maps::{Array, HashMap, PerCpuArray, ReusePortSockArray, RingBuf},
};
use distributor_ebpf::{
    contract::{
        self, Address, Attendant, BUCKETS, BUCKETS_OF_SOURCES, Bucket, Directed, Event, EventKind, GROUPS,
        Home, Limits, Load, Outcome, Over, Owner, Parked, Plan, RING, Rooms, SLOTS, SOCKETS as PLACES,
        SUSPICION, Source, State, Tag, UNATTENDED, WAITS, WAYS, wait_bucket,
    },
    select::{NextTurn, earlier, next_turn},
    word::{self, Place},
};

/// Which group this copy of `select` is attached to. User space sets it before loading.
#[unsafe(no_mangle)]
static GROUP: Global<u32> = Global::new(0);

/// Two plans. Writer: user space.
#[map]
static PLAN: Array<Plan> = Array::with_max_entries(2, BPF_F_MMAPABLE);
/// Which plan is in force, 0 or 1. Writer: user space.
#[map]
static ACTIVE: Array<u32> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// The consistent-hash tables of the two plans: the slot of each bucket. Writer: user space.
#[map]
pub(crate) static HASH: Array<[u16; BUCKETS]> = Array::with_max_entries(2, 0);
/// Counts, turns, totals. Writer: the programs.
#[map]
static LOAD: Array<Load> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// The listeners of servers and the rooms. Writer: user space (the kernel takes closing ones out).
#[map]
pub(crate) static SOCKETS: ReusePortSockArray =
    ReusePortSockArray::with_max_entries(contract::SOCKETS as u32, 0);
/// Listener's cookie -> [`contract::Home`], for connections that leave a closing listener.
/// Writer: user space.
#[map]
pub(crate) static HOME: HashMap<u64, Home> =
    HashMap::with_max_entries(contract::SOCKETS as u32, BPF_F_NO_PREALLOC);
/// Connection's cookie -> whose it is, for connections that waited or moved. Writer: the
/// programs.
#[map]
static OWNERS: HashMap<u64, Owner> = HashMap::with_max_entries(1 << 18, BPF_F_NO_PREALLOC);
/// Closing listener's cookie -> where its connections are parked. Writer: the programs; user
/// space removes what is over.
#[map]
static PARKED: HashMap<u64, Parked> = HashMap::with_max_entries(contract::SOCKETS as u32, BPF_F_NO_PREALLOC);
/// The rooms of each group. Writer: user space.
#[map]
static ROOMS: Array<Rooms> = Array::with_max_entries(GROUPS as u32, BPF_F_MMAPABLE);
/// By index of SOCKETS what came of each listener. Writer: the programs; before a
/// room gets an index, user space.
#[map]
static STATES: Array<State> = Array::with_max_entries(PLACES as u32, BPF_F_MMAPABLE);
/// Whether somebody hands over. Writer: user space.
#[map]
static ATTENDANT: Array<Attendant> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// A bell's [`contract::client`] -> the index in SOCKETS of the listener it is for. Writer: user
/// space.
#[map]
static BELLS: HashMap<u64, u32> = HashMap::with_max_entries(1024, 0);
/// The client's address of a connection of ours -> the server that it is for. Writer: user space.
#[map]
static DIRECTED: HashMap<Address, Directed> = HashMap::with_max_entries(1 << 13, BPF_F_NO_PREALLOC);
/// The sources, in buckets. Writer: the programs.
#[map]
static SOURCES: Array<Bucket> = Array::with_max_entries(BUCKETS_OF_SOURCES as u32, BPF_F_MMAPABLE);
/// A record here wakes the attendant. What it says is nothing: that looks at everything.
#[map]
static WAKES: RingBuf = RingBuf::with_byte_size(1 << 12, 0);
/// The addresses of the service -> group. Writer: user space.
#[map]
pub(crate) static ADDRESSES: HashMap<Address, u32> = HashMap::with_max_entries(2 * GROUPS as u32, 0);
/// The ports of the service. Writer: user space.
#[map]
pub(crate) static PORTS: HashMap<u32, u32> = HashMap::with_max_entries(2 * GROUPS as u32, 0);
/// One counter for each way out. Writer: the programs.
#[map]
static OUTCOMES: PerCpuArray<u64> = PerCpuArray::with_max_entries(Outcome::COUNT as u32, 0);
/// What user space has to know at once. Writer: the programs.
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 18, 0);

/// Which slot a listener's children belong to, cloned to each child. By hand, because
/// aya-ebpf's `SkStorage` has no BPF_F_CLONE.
#[repr(C)]
struct TagMap {
    r#type: *const [i32; BPF_MAP_TYPE_SK_STORAGE],
    key: *const i32,
    value: *const Tag,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; CLONED],
}

const BPF_MAP_TYPE_SK_STORAGE: usize = 24;
/// BPF_F_NO_PREALLOC | BPF_F_CLONE
const CLONED: usize = 1 | 1 << 9;

// SAFETY: never read as memory; the loader replaces it by a map before anything runs.
unsafe impl Sync for TagMap {}

#[btf_map]
static TAG: TagMap = TagMap {
    r#type: ptr::null(),
    key: ptr::null(),
    value: ptr::null(),
    max_entries: ptr::null(),
    map_flags: ptr::null(),
};

/// The group of this copy of the program.
#[inline(always)]
pub(crate) fn group() -> usize {
    GROUP.load() as usize & (GROUPS - 1)
}

/// The number of the plan in force, and the plan.
#[inline(always)]
pub(crate) fn plan() -> Option<(u32, &'static Plan)> {
    let active = ACTIVE.get(0)? & 1;
    Some((active, PLAN.get(active)?))
}

/// The one [`Load`]. A handle rather than a reference: other CPUs write it at the same time.
#[derive(Clone, Copy)]
pub(crate) struct Loads(*mut Load);

#[inline(always)]
pub(crate) fn loads() -> Option<Loads> {
    LOAD.get_ptr_mut(0).map(Loads)
}

/// A field of the load that is changed by atomic addition.
#[derive(Clone, Copy)]
pub(crate) enum Sum {
    /// The active count, which is the lowest part of a slot's word.
    Active(u32),
    Total(u32),
    Waiting,
    Owned,
    /// SYNs given to the current room of a group.
    Syns(usize),
    Orphans,
    /// A bucket of the histogram of waits.
    Waits(usize),
    Waited,
    /// The active count in the service's word.
    Places,
    #[cfg(feature = "next-contract")]
    Closed,
}

impl Loads {
    #[inline(always)]
    pub(crate) fn word(self, slot: usize) -> u64 {
        // SAFETY: masked, so inside the array; volatile, because other CPUs write it.
        unsafe { (&raw const (*self.0).word[slot & (SLOTS - 1)]).read_volatile() }
    }

    #[inline(always)]
    pub(crate) fn turn(self, slot: usize) -> u64 {
        // SAFETY: as in `word`.
        unsafe { (&raw const (*self.0).turn[slot & (SLOTS - 1)]).read_volatile() }
    }

    #[inline(always)]
    pub(crate) fn waiting(self) -> u64 {
        // SAFETY: the map value is a `Load`.
        unsafe { (&raw const (*self.0).waiting).read_volatile() }
    }

    #[inline(always)]
    pub(crate) fn owned(self) -> u64 {
        // SAFETY: the map value is a `Load`.
        unsafe { (&raw const (*self.0).owned).read_volatile() }
    }

    /// Whether so many handshakes were not completed lately that no place is reserved.
    #[inline(always)]
    pub(crate) fn is_suspicious(self, now: u64) -> bool {
        // SAFETY: the map value is a `Load`.
        now < unsafe { (&raw const (*self.0).suspicious_until).read_volatile() }
    }

    /// Notes what expires as the word goes from `old` to the present: too much is suspicious.
    #[inline(always)]
    pub(crate) fn note_expired(self, plan: &Plan, slot: u32, old: u64, now: u64) {
        let suspect = u64::from(plan.servers[slot as usize & (SLOTS - 1)].suspect);
        if suspect != 0 && word::expired(old, word::epoch(now)) >= suspect {
            // SAFETY: the map value is a `Load`; volatile, because other CPUs write it.
            unsafe { (&raw mut (*self.0).suspicious_until).write_volatile(now + SUSPICION) }
        }
    }

    /// The connections and reservations of the service as a whole.
    #[inline(always)]
    pub(crate) fn places(self) -> u64 {
        // SAFETY: the map value is a `Load`; volatile, because other CPUs write it.
        unsafe { (&raw const (*self.0).places).read_volatile() }
    }

    /// Replaces them if nobody changed them since they were read as `old`.
    #[inline(always)]
    pub(crate) fn swap_places(self, old: u64, new: u64) -> bool {
        // SAFETY: the map value is a `Load`; 8-byte aligned.
        unsafe { swapped(&raw mut (*self.0).places, old, new) }
    }

    /// When the service's next connection is due.
    #[inline(always)]
    pub(crate) fn due(self) -> u64 {
        // SAFETY: as in `places`.
        unsafe { (&raw const (*self.0).due).read_volatile() }
    }

    #[inline(always)]
    pub(crate) fn swap_due(self, old: u64, new: u64) -> bool {
        // SAFETY: as in `swap_places`.
        unsafe { swapped(&raw mut (*self.0).due, old, new) }
    }

    /// Remembers when somebody last came above a limit.
    #[inline(always)]
    pub(crate) fn note_over(self, which: Over, now: u64) {
        // SAFETY: masked, so inside the array; volatile, because other CPUs write it.
        unsafe { (&raw mut (*self.0).over[which as usize & 3]).write_volatile(now) }
    }

    /// The same as [`Loads::note_expired`], of the service's word.
    #[inline(always)]
    pub(crate) fn note_service_expired(self, limits: &Limits, old: u64, now: u64) {
        let suspect = u64::from(limits.suspect);
        if suspect != 0 && word::expired(old, word::epoch(now)) >= suspect {
            // SAFETY: the map value is a `Load`; volatile, because other CPUs write it.
            unsafe { (&raw mut (*self.0).suspicious_until).write_volatile(now + SUSPICION) }
        }
    }

    /// The current room of a group: sequence << 16 | SYNs.
    #[inline(always)]
    pub(crate) fn current(self, group: usize) -> u64 {
        // SAFETY: masked, so inside the array; volatile, because other CPUs write it.
        unsafe { (&raw const (*self.0).current[group & (GROUPS - 1)]).read_volatile() }
    }

    /// Makes the next room current, unless another CPU has.
    #[inline(always)]
    pub(crate) fn advance(self, group: usize, from: u64) -> bool {
        // SAFETY: masked, so inside the array; 8-byte aligned.
        unsafe {
            let current = &raw mut (*self.0).current[group & (GROUPS - 1)];
            let next = ((from >> 16) + 1) << 16;
            atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(current, from, next).1
        }
    }

    /// Spare rooms of a group that were ever taken.
    #[inline(always)]
    pub(crate) fn spares_taken(self, group: usize) -> u64 {
        // SAFETY: masked, so inside the array; volatile, because other CPUs write it.
        unsafe { (&raw const (*self.0).spares_taken[group & (GROUPS - 1)]).read_volatile() }
    }

    /// Takes the spare room after so many, unless another CPU has.
    #[inline(always)]
    pub(crate) fn take_spare(self, group: usize, taken: u64) -> bool {
        // SAFETY: masked, so inside the array; 8-byte aligned.
        unsafe {
            let field = &raw mut (*self.0).spares_taken[group & (GROUPS - 1)];
            atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(
                field,
                taken,
                taken + 1,
            )
            .1
        }
    }

    /// A connection that waited since then was handed over now.
    #[inline(always)]
    pub(crate) fn note_wait(self, since: u64, now: u64) {
        let microseconds = now.saturating_sub(since) / 1000;
        self.add(Sum::Waits(wait_bucket(microseconds)), 1);
        self.add(Sum::Waited, microseconds as i64);
    }

    /// Replaces a slot's word if nobody changed it since it was read as `old`.
    #[inline(always)]
    pub(crate) fn swap(self, slot: u32, old: u64, new: u64) -> bool {
        // SAFETY: masked, so inside the array; 8-byte aligned.
        unsafe {
            let word = &raw mut (*self.0).word[slot as usize & (SLOTS - 1)];
            atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(word, old, new).1
        }
    }

    /// Adds to a sum, and returns what it was.
    #[inline(always)]
    pub(crate) fn add(self, sum: Sum, delta: i64) -> u64 {
        // SAFETY: masked where there is an index; 8-byte aligned.
        unsafe {
            let field = match sum {
                Sum::Active(slot) => &raw mut (*self.0).word[slot as usize & (SLOTS - 1)],
                Sum::Total(slot) => &raw mut (*self.0).total[slot as usize & (SLOTS - 1)],
                Sum::Waiting => &raw mut (*self.0).waiting,
                Sum::Owned => &raw mut (*self.0).owned,
                Sum::Syns(group) => &raw mut (*self.0).current[group & (GROUPS - 1)],
                Sum::Orphans => &raw mut (*self.0).orphans,
                Sum::Waits(bucket) => &raw mut (*self.0).waits[bucket & (WAITS - 1)],
                Sum::Waited => &raw mut (*self.0).waited,
                Sum::Places => &raw mut (*self.0).places,
                #[cfg(feature = "next-contract")]
                Sum::Closed => &raw mut (*self.0).closed,
            };
            atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(field, delta as u64)
        }
    }

    /// Moves the slot's turn, and the clock, after it was chosen. Two CPUs may lose each other
    /// a tick of the clock, which costs one connection out of turn and is forgotten by the next.
    #[inline(always)]
    pub(crate) fn pass_turn(self, slot: u32, stride: u64) {
        let index = slot as usize & (SLOTS - 1);
        let turn = self.turn(index);
        // SAFETY: masked, so inside the array; volatile, because other CPUs write it.
        unsafe {
            let clock = &raw mut (*self.0).clock;
            let now = clock.read_volatile();
            match next_turn(turn, now, stride) {
                NextTurn::Set(turn) => (&raw mut (*self.0).turn[index]).write_volatile(turn),
                NextTurn::Add(stride) => {
                    let field = &raw mut (*self.0).turn[index];
                    atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(field, stride);
                }
            }
            if earlier(now, turn) != 0 {
                clock.write_volatile(turn);
            }
        }
    }

    /// Remembers the most connections the slot's present owner had.
    #[inline(always)]
    pub(crate) fn note_most(self, slot: u32, generation: u32, active: u64) {
        let index = slot as usize & (SLOTS - 1);
        // SAFETY: masked, so inside the array; volatile, because other CPUs write it.
        unsafe {
            let most = &raw mut (*self.0).most[index];
            let seen = most.read_volatile();
            if seen >> 32 != u64::from(generation) || (seen & 0xffff_ffff) < active {
                most.write_volatile(u64::from(generation) << 32 | active);
            }
        }
    }

    /// Remembers the most connections that waited.
    #[inline(always)]
    pub(crate) fn note_waiting(self) {
        let waiting = self.waiting();
        // SAFETY: the map value is a `Load`; volatile, because other CPUs write it.
        unsafe {
            let most = &raw mut (*self.0).waiting_most;
            if most.read_volatile() < waiting {
                most.write_volatile(waiting);
            }
        }
    }
}

/// Replaces a number if it is still what it was read as.
///
/// # Safety
/// `at` is aligned, and inside a map value.
#[inline(always)]
unsafe fn swapped(at: *mut u64, old: u64, new: u64) -> bool {
    // SAFETY: the caller's promise.
    unsafe { atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(at, old, new).1 }
}

/// One bucket of sources. A handle: other CPUs write it at the same time.
#[derive(Clone, Copy)]
pub(crate) struct Sources(*mut Bucket);

#[inline(always)]
pub(crate) fn sources(bucket: u32) -> Option<Sources> {
    SOURCES.get_ptr_mut(bucket).map(Sources)
}

impl Sources {
    #[inline(always)]
    fn at(self, way: u64) -> *mut Source {
        // SAFETY: masked, so inside the bucket. Nothing is read.
        unsafe { &raw mut (*self.0).sources[way as usize & (WAYS - 1)] }
    }

    /// What is in a place. Its parts are read one after the other, in any order.
    #[inline(always)]
    pub(crate) fn read(self, way: usize) -> Source {
        let at = self.at(way as u64);
        // SAFETY: inside the bucket; volatile, because other CPUs write it.
        unsafe {
            Source {
                high: (&raw const (*at).high).read_volatile(),
                low: (&raw const (*at).low).read_volatile(),
                word: (&raw const (*at).word).read_volatile(),
                due: (&raw const (*at).due).read_volatile(),
            }
        }
    }

    /// A place's word, by an atomic operation: what is read of it after that is not older.
    #[inline(always)]
    pub(crate) fn word(self, way: u64) -> u64 {
        // SAFETY: inside the bucket; 8-byte aligned.
        unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(&raw mut (*self.at(way)).word, 0) }
    }

    #[inline(always)]
    pub(crate) fn swap_word(self, way: u64, old: u64, new: u64) -> bool {
        // SAFETY: inside the bucket; 8-byte aligned.
        unsafe { swapped(&raw mut (*self.at(way)).word, old, new) }
    }

    /// Changes the active count of a word.
    #[inline(always)]
    pub(crate) fn add(self, way: u64, delta: i64) {
        // SAFETY: inside the bucket; 8-byte aligned.
        unsafe {
            atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(&raw mut (*self.at(way)).word, delta as u64);
        }
    }

    /// When the next connection of a place's source is due.
    #[inline(always)]
    pub(crate) fn due(self, way: u64) -> u64 {
        // SAFETY: inside the bucket; volatile, because other CPUs write it.
        unsafe { (&raw const (*self.at(way)).due).read_volatile() }
    }

    #[inline(always)]
    pub(crate) fn swap_due(self, way: u64, old: u64, new: u64) -> bool {
        // SAFETY: inside the bucket; 8-byte aligned.
        unsafe { swapped(&raw mut (*self.at(way)).due, old, new) }
    }

    /// Says whose a place is that is locked.
    #[inline(always)]
    pub(crate) fn name(self, way: u64, high: u64, low: u64) {
        let at = self.at(way);
        // SAFETY: inside the bucket; volatile, because other CPUs read it.
        unsafe {
            (&raw mut (*at).high).write_volatile(high);
            (&raw mut (*at).low).write_volatile(low);
            (&raw mut (*at).due).write_volatile(0);
        }
    }
}

/// What user space wrote of one group's rooms. A handle: it is written at the same time.
#[derive(Clone, Copy)]
pub(crate) struct Corridor(*const Rooms);

#[inline(always)]
pub(crate) fn corridor(group: usize) -> Option<Corridor> {
    ROOMS.get_ptr(group as u32).map(Corridor)
}

impl Corridor {
    #[inline(always)]
    pub(crate) fn made(self) -> u64 {
        // SAFETY: the map value is a `Rooms`; volatile, because user space writes it.
        unsafe { (&raw const (*self.0).made).read_volatile() }
    }

    #[inline(always)]
    pub(crate) fn least(self) -> u64 {
        // SAFETY: as in `made`.
        unsafe { (&raw const (*self.0).least).read_volatile() }
    }

    #[inline(always)]
    pub(crate) fn spares(self) -> u64 {
        // SAFETY: as in `made`.
        unsafe { (&raw const (*self.0).spares).read_volatile() }
    }

    #[inline(always)]
    pub(crate) fn bound(self) -> u64 {
        // SAFETY: as in `made`.
        unsafe { (&raw const (*self.0).bound).read_volatile() }
    }

    #[inline(always)]
    pub(crate) fn share(self) -> u64 {
        // SAFETY: as in `made`.
        unsafe { (&raw const (*self.0).share).read_volatile() }.into()
    }

    #[inline(always)]
    pub(crate) fn chunk(self) -> u32 {
        // SAFETY: as in `made`.
        unsafe { (&raw const (*self.0).chunk).read_volatile() }
    }

    #[inline(always)]
    pub(crate) fn crowd(self) -> u64 {
        // SAFETY: as in `made`.
        unsafe { (&raw const (*self.0).crowd).read_volatile() }.into()
    }

    #[inline(always)]
    pub(crate) fn full(self) -> u64 {
        // SAFETY: as in `made`.
        unsafe { (&raw const (*self.0).full).read_volatile() }.into()
    }

    /// The index in SOCKETS of the room with this sequence number.
    #[inline(always)]
    pub(crate) fn room(self, sequence: u64) -> u32 {
        // SAFETY: masked, so inside the array; volatile, because user space writes it.
        unsafe { (&raw const (*self.0).ring[sequence as usize & (RING - 1)]).read_volatile() }
    }

    /// The index in SOCKETS of the spare room after so many.
    #[inline(always)]
    pub(crate) fn spare(self, taken: u64) -> u32 {
        // SAFETY: masked, so inside the array; volatile, because user space writes it.
        unsafe { (&raw const (*self.0).spare[taken as usize & (RING - 1)]).read_volatile() }
    }
}

/// What came of one listener.
#[derive(Clone, Copy)]
pub(crate) struct Coming(*mut State);

#[inline(always)]
pub(crate) fn coming(index: u32) -> Option<Coming> {
    STATES.get_ptr_mut(index).map(Coming)
}

/// A field of a listener's state that is counted up.
#[derive(Clone, Copy)]
pub(crate) enum Comes {
    Completed,
    Entered,
    Gone,
    Moved,
    Offered,
}

impl Coming {
    #[inline(always)]
    pub(crate) fn add(self, what: Comes) {
        // SAFETY: the map value is a `State`; 8-byte aligned.
        unsafe {
            let field = match what {
                Comes::Completed => &raw mut (*self.0).completed,
                Comes::Entered => &raw mut (*self.0).entered,
                Comes::Gone => &raw mut (*self.0).gone,
                Comes::Moved => &raw mut (*self.0).moved,
                Comes::Offered => &raw mut (*self.0).offered,
            };
            atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(field, 1);
        }
    }

    #[inline(always)]
    pub(crate) fn completed(self) -> u64 {
        // SAFETY: the map value is a `State`; volatile, because other CPUs write it.
        unsafe { (&raw const (*self.0).completed).read_volatile() }
    }

    /// The place in the order of the first who came; 0 if nobody has.
    #[inline(always)]
    pub(crate) fn first(self) -> u64 {
        // SAFETY: the map value is a `State`; volatile, because other CPUs write it.
        unsafe { (&raw const (*self.0).first).read_volatile() }
    }

    /// Notes who came, if nobody had.
    #[inline(always)]
    pub(crate) fn note_first(self, order: u64, since: u64) {
        // SAFETY: the map value is a `State`; 8-byte aligned.
        unsafe {
            let first = &raw mut (*self.0).first;
            if first.read_volatile() == 0
                && atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(
                    first, 0, order,
                )
                .1
            {
                (&raw mut (*self.0).since).write_volatile(since);
            }
        }
    }
}

/// Makes the room after the current one current, and tells when few are left.
#[inline(always)]
pub(crate) fn next_room(loads: Loads, corridor: Corridor, group: usize, current: u64) {
    if loads.advance(group, current) {
        let left = corridor.made().wrapping_sub((current >> 16) + 2);
        // 1024, 512, ... 1 and 0: the fewer there are, the more often.
        if left & left.wrapping_sub(1) == 0 {
            wake();
        }
    }
}

/// Whether somebody hands over to those that wait.
#[inline(always)]
pub(crate) fn is_attended(now: u64) -> bool {
    // SAFETY: the map value is an `Attendant`; volatile, because user space writes it.
    let seen =
        ATTENDANT.get_ptr(0).map(|attendant| unsafe { (&raw const (*attendant).seen).read_volatile() });
    seen.is_some_and(|seen| now.saturating_sub(seen) < UNATTENDED)
}

/// Whether this is the cgroup in which rooms are made.
#[inline(always)]
pub(crate) fn makes_rooms(cgroup: u64) -> bool {
    // SAFETY: the map value is an `Attendant`; volatile, because user space writes it.
    let rooms =
        ATTENDANT.get_ptr(0).map(|attendant| unsafe { (&raw const (*attendant).cgroup).read_volatile() });
    rooms == Some(cgroup)
}

/// Makes the attendant look at who waits.
#[inline(always)]
pub(crate) fn wake() {
    let Some(attendant) = ATTENDANT.get_ptr(0) else { return };
    // SAFETY: the map value is an `Attendant`; volatile, because user space writes it.
    if unsafe { (&raw const (*attendant).asleep).read_volatile() } == 0 {
        // It looks once more before it sleeps.
        return;
    }
    // If there is no place, what is in there already wakes it.
    if let Some(mut record) = WAKES.reserve::<u64>(0) {
        record.write(0);
        record.submit(BPF_RB_FORCE_WAKEUP.into());
    }
}

/// Whether it is a port of the service.
#[inline(always)]
pub(crate) fn is_port(port: u32) -> bool {
    // SAFETY: only whether it is there matters.
    unsafe { PORTS.get(port) }.is_some()
}

/// Whose a connection is that waited or moved.
#[inline(always)]
pub(crate) fn owner(cookie: u64) -> Option<Owner> {
    // SAFETY: the value is copied at once.
    unsafe { OWNERS.get(cookie).copied() }
}

/// Records whose a connection is; counts it if that fails.
#[inline(always)]
pub(crate) fn record(loads: Loads, cookie: u64, owner: Owner, is_new: bool) -> bool {
    if is_new {
        // Before the entry exists: a close looks for one only if this is not 0.
        loads.add(Sum::Owned, 1);
    }
    if OWNERS.insert(cookie, owner, 0).is_ok() {
        return true;
    }
    if is_new {
        loads.add(Sum::Owned, -1);
    }
    count(Outcome::OwnerLost);
    false
}

/// Forgets a connection that is gone.
#[inline(always)]
pub(crate) fn forget(loads: Loads, cookie: u64) {
    if OWNERS.remove(cookie).is_ok() {
        loads.add(Sum::Owned, -1);
    }
}

/// Where a closing listener's connections are parked: nobody as long as the count is 0. (Not an
/// `Option`, whose payload the verifier takes for read where there is none.)
#[inline(always)]
pub(crate) fn parked(listener: u64) -> Parked {
    // SAFETY: the value is copied at once.
    match unsafe { PARKED.get(listener) } {
        Some(parked) => *parked,
        None => Parked { index: 0, count: 0 },
    }
}

#[inline(always)]
pub(crate) fn note_parked(listener: u64, parked: Parked) {
    // It cannot be full: it has an entry for each listener.
    let _ = PARKED.insert(listener, parked, 0);
}

/// The listener that a bell is for.
#[inline(always)]
pub(crate) fn bell(client: u64) -> Option<u32> {
    // SAFETY: the value is copied at once.
    unsafe { BELLS.get(client).copied() }
}

/// The server that a connection of ours is for.
#[inline(always)]
pub(crate) fn directed(client: &Address) -> Option<Directed> {
    // SAFETY: the value is copied at once.
    unsafe { DIRECTED.get(client).copied() }
}

/// How a slot's word changes.
#[derive(Clone, Copy)]
#[repr(u64)]
pub(crate) enum Change {
    GiveBackReserved,
    GiveBackActive,
    Establish,
    Close,
}

/// Changes a slot's word, until nobody interferes. Returns the connections it then has.
#[inline(always)]
pub(crate) fn change(slot: u32, what: Change) -> u64 {
    change_word(u64::from(slot), what as u64, nanoseconds())
}

/// A global function: the verifier follows its loop once, not once for each way to it.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn change_word(slot: u64, what: u64, time: u64) -> u64 {
    // Cannot fail: an array map always has its entry.
    let (Some((_, plan)), Some(loads)) = (plan(), loads()) else { return 0 };
    let now = word::epoch(time);
    for _ in 0..16 {
        let old = loads.word(slot as usize);
        let new = if what == Change::GiveBackReserved as u64 {
            word::give_back(old, now, Place::Reserved)
        } else if what == Change::GiveBackActive as u64 {
            word::give_back(old, now, Place::Active)
        } else if what == Change::Establish as u64 {
            word::establish(old, now)
        } else {
            word::close(old, now)
        };
        if loads.swap(slot as u32, old, new) {
            loads.note_expired(plan, slot as u32, old, time);
            return word::active(new);
        }
    }
    // Then at least the active count, by an addition that needs no luck; the reservation ages.
    count(Outcome::WordContended);
    let active = word::active(loads.word(slot as usize));
    if what == Change::Establish as u64 && active < word::ACTIVE_MAX {
        loads.add(Sum::Active(slot as u32), 1);
    } else if (what == Change::Close as u64 || what == Change::GiveBackActive as u64) && active > 0 {
        loads.add(Sum::Active(slot as u32), -1);
    }
    active
}

/// The tag of a socket; null if it has none.
#[inline(always)]
pub(crate) fn tag(socket: *mut bpf_sock) -> *mut Tag {
    // SAFETY: the helper takes a socket that the verifier knows to be one, and creates nothing.
    unsafe {
        bpf_sk_storage_get((&raw const TAG).cast_mut().cast(), socket.cast(), ptr::null_mut(), 0).cast()
    }
}

/// One more for this way out.
#[inline(always)]
pub(crate) fn count(outcome: Outcome) {
    if let Some(counter) = OUTCOMES.get_ptr_mut(outcome as u32) {
        // SAFETY: this CPU's own entry of a per-CPU map.
        unsafe { *counter = (*counter).wrapping_add(1) }
    }
}

/// Tells user space.
#[inline(always)]
pub(crate) fn tell(kind: EventKind, cookie: u64, cgroup: u64, address: Address) {
    let Some(mut entry) = EVENTS.reserve::<Event>(0) else {
        count(Outcome::EventLost);
        return;
    };
    entry.write(Event { kind: kind as u32, reserved: 0, cookie, cgroup, time: nanoseconds(), address });
    // Forced: an unread record without wake-up holds back the wake-up of those behind it.
    entry.submit(BPF_RB_FORCE_WAKEUP.into());
}

/// The monotonic clock.
#[inline(always)]
pub(crate) fn nanoseconds() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_ktime_get_ns() }
}
