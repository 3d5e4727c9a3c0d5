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
    bindings::{BPF_F_NO_PREALLOC, BPF_RB_FORCE_WAKEUP, bpf_sock},
    helpers::{bpf_ktime_get_ns, generated::bpf_sk_storage_get},
    macros::{btf_map, map},
    maps::{Array, HashMap, PerCpuArray, ReusePortSockArray, RingBuf},
};
use distributor_ebpf::{
    contract::{self, Address, BUCKETS, Event, EventKind, GROUPS, Home, Load, Outcome, Plan, SLOTS, Tag},
    select::{NextTurn, earlier, next_turn},
    word::{self, Place},
};

/// Which group this copy of `select` is attached to. User space sets it before loading.
#[unsafe(no_mangle)]
static GROUP: Global<u32> = Global::new(0);

/// Two plans. Writer: user space.
#[map]
static PLAN: Array<Plan> = Array::with_max_entries(2, 0);
/// Which plan is in force, 0 or 1. Writer: user space.
#[map]
static ACTIVE: Array<u32> = Array::with_max_entries(1, 0);
/// The consistent-hash tables of the two plans: the slot of each bucket. Writer: user space.
#[map]
pub(crate) static HASH: Array<[u16; BUCKETS]> = Array::with_max_entries(2, 0);
/// Counts, turns, totals. Writer: the programs.
#[map]
static LOAD: Array<Load> = Array::with_max_entries(1, 0);
/// The listeners of servers and the rooms. Writer: user space (the kernel takes closing ones out).
#[map]
pub(crate) static SOCKETS: ReusePortSockArray =
    ReusePortSockArray::with_max_entries(contract::SOCKETS as u32, 0);
/// Listener's cookie -> [`contract::Home`], for connections that leave a closing listener.
/// Writer: user space.
#[map]
pub(crate) static HOME: HashMap<u64, Home> =
    HashMap::with_max_entries(contract::SOCKETS as u32, BPF_F_NO_PREALLOC);
/// Connection's cookie -> slot, for connections that moved. Writer: the programs.
#[map]
pub(crate) static MOVED: HashMap<u64, u32> = HashMap::with_max_entries(1 << 17, BPF_F_NO_PREALLOC);
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
    Moved,
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
    pub(crate) fn moved(self) -> u64 {
        // SAFETY: the map value is a `Load`.
        unsafe { (&raw const (*self.0).moved).read_volatile() }
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

    /// Adds to a sum; a negative number is given as its two's complement.
    #[inline(always)]
    pub(crate) fn add(self, sum: Sum, delta: i64) {
        // SAFETY: masked where there is an index; 8-byte aligned.
        unsafe {
            let field = match sum {
                Sum::Active(slot) => &raw mut (*self.0).word[slot as usize & (SLOTS - 1)],
                Sum::Total(slot) => &raw mut (*self.0).total[slot as usize & (SLOTS - 1)],
                Sum::Waiting => &raw mut (*self.0).waiting,
                Sum::Moved => &raw mut (*self.0).moved,
            };
            atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(field, delta as u64);
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
    change_word(u64::from(slot), what as u64, word::epoch(nanoseconds()))
}

/// A global function: the verifier follows its loop once, not once for each way to it.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn change_word(slot: u64, what: u64, now: u64) -> u64 {
    // Cannot fail: an array map always has its entry.
    let Some(loads) = loads() else { return 0 };
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
