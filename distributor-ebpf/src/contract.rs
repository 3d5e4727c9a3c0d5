//! What kernel and user space agree on: map names, layouts, meanings.
//!
//! Every type here is `repr(C)`, of fixed width and without padding, because both sides read
//! the same bytes. Every map has one writer, named beside its type. A change of any layout or
//! meaning raises [`VERSION`], and a distributor never touches maps of another version.

/// The version of everything in this file. Part of the directory that holds the pins.
pub const VERSION: u32 = 1;

/// Server instances of one service that can hold connections at the same time.
///
/// 256 and not 1,024: the pass over the slots costs the same for each one in use, and 256 of
/// them already cost more than the microsecond that `select` is to take (docs/benchmarks.md).
pub const SLOTS: usize = 256;

/// Listening addresses of one service. Each is one reuseport group.
pub const GROUPS: usize = 16;

/// Listeners of one service: those of the servers and the rooms. At most 32,768 sockets fit
/// into one reuseport group (`reuseport_add_sock`, Linux 6.18).
pub const SOCKETS: usize = 16_384;

/// Entries of the consistent-hash table. 8,192 gives each of 256 servers 32 on average.
pub const BUCKETS: usize = 8_192;

/// The largest limit: the active count of a load word has 20 bits, and stays below its end.
pub const LIMIT_MAX: u32 = 1_000_000;

/// The most connections of one service that may wait. Each is a socket in the kernel's memory
/// that nobody reads; more than these, and most would wait in vain.
pub const CAPACITY_MAX: u32 = 16_384;

/// The largest weight. Used counts times weights must stay below 2^63 (`select`).
pub const WEIGHT_MAX: u32 = 1_000;

/// A server of weight 1 moves this far on the clock of turns with every connection.
pub const TURN: u64 = 1 << 24;

/// How a server is chosen for a new connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum Policy {
    /// Fewest connections per weight; weighted round robin among equals.
    #[default]
    LeastConnections = 0,
    /// Weighted round robin, whatever the servers hold.
    WeightedRoundRobin = 1,
    /// The less loaded of two servers drawn at random.
    PowerOfTwo = 2,
    /// The same client address goes to the same server, as long as that one has a place.
    SourceHash = 3,
    /// The first server, in the order of the configuration, that has a place.
    First = 4,
}

impl Policy {
    /// Every policy, in the order of its number.
    pub const ALL: [Self; 5] =
        [Self::LeastConnections, Self::WeightedRoundRobin, Self::PowerOfTwo, Self::SourceHash, Self::First];

    /// The name an operator writes.
    pub const fn name(self) -> &'static str {
        match self {
            Self::LeastConnections => "least-connections",
            Self::WeightedRoundRobin => "weighted-round-robin",
            Self::PowerOfTwo => "power-of-two",
            Self::SourceHash => "source-hash",
            Self::First => "first",
        }
    }
}

/// What user space decided about one slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Server {
    /// Connections it may hold, reservations included. 0 = not eligible.
    pub limit: u32,
    /// 1 to [`WEIGHT_MAX`]; never 0, also in an unused slot (it is a divisor).
    pub weight: u32,
    /// Its place in the configuration's order, for [`Policy::First`].
    pub rank: u32,
    /// Reservations it may hold at a time. At most `limit`.
    pub reservable: u32,
    /// [`TURN`] / weight: how far one connection moves it on the clock of turns.
    pub stride: u64,
    /// Changes when the slot gets a new owner, so that the kernel restarts its maximum.
    pub generation: u32,
    /// Zero; keeps the size a multiple of 8 without padding.
    pub reserved: u32,
}

/// The listeners of one slot in one group: `len` indices of SOCKETS from `first` on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Run {
    /// The first index in SOCKETS.
    pub first: u16,
    /// How many; 0 = the slot does not listen on this group's address.
    pub len: u16,
}

/// The service takes no new connection at all: it is being stopped.
pub const FLAG_CLOSING: u32 = 1;
/// A SYN makes no reservation, because its connection comes back as a SYN cookie's ACK
/// (net.ipv4.tcp_syncookies = 2).
pub const FLAG_COOKIES: u32 = 1 << 1;

/// User space's decisions for one service. PLAN holds two copies; ACTIVE says which is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Plan {
    /// A [`Policy`] as a number.
    pub policy: u32,
    /// `FLAG_*`.
    pub flags: u32,
    /// Slots that have to be looked at: the highest slot in use and 1.
    pub count: u32,
    /// Entries of `order` that count: the eligible slots.
    pub eligible: u32,
    /// Connections that may wait.
    pub capacity: u32,
    /// Zero; keeps the size a multiple of 8 without padding.
    pub reserved: u32,
    /// By slot.
    pub servers: [Server; SLOTS],
    /// The eligible slots, in the configuration's order.
    pub order: [u16; SLOTS],
    /// Per group the index in SOCKETS of its current room.
    pub rooms: [u32; GROUPS],
    /// Per group and slot: `runs[group * SLOTS + slot]`.
    pub runs: [Run; GROUPS * SLOTS],
}

/// What the kernel counts for one service. One writer: the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Load {
    /// Active connections and reservations of each slot: see [`crate::word`].
    pub word: [u64; SLOTS],
    /// Where each slot stands on the clock of turns: see [`crate::select`].
    pub turn: [u64; SLOTS],
    /// Connections ever established by each slot.
    pub total: [u64; SLOTS],
    /// The most connections at a time of each slot's owner: generation << 32 | connections.
    pub most: [u64; SLOTS],
    /// Connections that wait in rooms.
    pub waiting: u64,
    /// The most that ever waited.
    pub waiting_most: u64,
    /// The clock of turns: where the last chosen slot stood.
    pub clock: u64,
    /// Entries of MOVED: connections whose owner is not the one their tag names.
    pub moved: u64,
}

/// Which slot the children of a listener belong to. TAG, a socket storage that is cloned to
/// every child: user space writes the listener's, the kernel marks its child's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Tag {
    /// A slot, or [`ROOM`].
    pub slot: u32,
    /// 1 once this connection was counted as established. 0 in a listener's own tag.
    pub counted: u32,
}

/// Where a listener belongs. HOME holds it by the listener's cookie; a distributor that takes
/// over reads its predecessor's listeners there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Home {
    /// A slot, or [`ROOM`].
    pub slot: u32,
    /// Its index in SOCKETS.
    pub index: u32,
}

/// The slot number that means "waits in a room".
pub const ROOM: u32 = u32::MAX;

/// An address a service listens on. The key of ADDRESSES.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Address {
    /// Network byte order; an IPv4 address stands in the first word, the rest is 0.
    pub ip: [u32; 4],
    /// AF_INET (2) or AF_INET6 (10).
    pub family: u32,
    /// Host byte order.
    pub port: u32,
}

/// What happened, from the kernel to user space through EVENTS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Event {
    /// An [`EventKind`] as a number.
    pub kind: u32,
    /// Zero; keeps the size a multiple of 8 without padding.
    pub reserved: u32,
    /// The cookie of the socket it happened to. 0 where there is none yet.
    pub cookie: u64,
    /// The cgroup (inode number) of the process that did it, where the kernel tells; or 0.
    pub cgroup: u64,
    /// Nanoseconds on the monotonic clock (`bpf_ktime_get_ns`).
    pub time: u64,
    /// The local address.
    pub address: Address,
}

/// The kinds of [`Event`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum EventKind {
    /// A socket of the cgroup starts to listen.
    Listening = 1,
    /// A socket of the cgroup stopped to listen.
    ListenerClosed = 2,
    /// A server tried to bind a port of the service to another address, and was refused.
    Misbound = 3,
    /// A connection began to wait in a room.
    Waiting = 4,
    /// A connection that waited was given to a server.
    HandedOver = 5,
    /// A connection that waited is gone.
    Left = 6,
    /// A socket was bound to an address of the service by a process of this cgroup: that tells
    /// whose the socket is when it listens, where the kernel does not tell the process.
    Bound = 7,
}

/// One counter for each way out of each program. OUTCOMES holds them per CPU.
///
/// Each row is the number, the name operators see, and what happened.
macro_rules! outcomes {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// One way out of a program.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum Outcome { $($(#[$doc])* $variant,)* }

        impl Outcome {
            /// Every outcome, in the order of its number.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// How many there are: the entries of OUTCOMES.
            pub const COUNT: usize = Self::ALL.len();

            /// The name an operator sees.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

outcomes! {
    /// A new connection went to the server that the policy chose.
    Selected = "selected",
    /// The policy's server could not take it (a selection error): the next best one did.
    NextBest = "next_best",
    /// power-of-two or source-hash found its candidates full and asked all servers.
    Widened = "widened",
    /// A new connection went to the room, because no server is eligible.
    WaitNoServer = "wait_no_server",
    /// A new connection went to the room, because selecting a server failed repeatedly.
    WaitSelectFailed = "wait_select_failed",
    /// Refused: every eligible server is at its limit.
    RefusedLimit = "refused_limit",
    /// Refused: as many wait as may.
    RefusedCapacity = "refused_capacity",
    /// Refused: the service is being stopped.
    RefusedClosing = "refused_closing",
    /// Refused: there was no room to select, or selecting it failed.
    RefusedNoRoom = "refused_no_room",
    /// A segment that opens no connection (a late ACK, FIN or RST), or the ACK of a SYN cookie
    /// that was sent in need, was left to the room, which answers it as a listener does.
    Stray = "stray",
    /// A segment whose TCP header could not be read.
    Malformed = "malformed",
    /// A connection moved from a server's closing listener to another server.
    Moved = "moved",
    /// A connection that waited in a room moved to a server.
    HandedOver = "handed_over",
    /// A half-open connection moved from a closing listener to a server.
    MovedHalfOpen = "moved_half_open",
    /// A connection of a closing listener was parked in the room: no server has a place.
    Parked = "parked",
    /// A half-open connection of a closing listener was parked in the room.
    ParkedHalfOpen = "parked_half_open",
    /// A connection of a closing listener was already reset by its client.
    MovedDead = "moved_dead",
    /// A connection of a closing listener was lost: no server and no room could take it.
    MoveFailed = "move_failed",
    /// Counted up: a server's connection was established.
    Established = "established",
    /// Counted up: a connection waits in a room.
    EstablishedWaiting = "established_waiting",
    /// Counted down: a server's connection is gone.
    Closed = "closed",
    /// Counted down: a waiting connection is gone.
    ClosedWaiting = "closed_waiting",
    /// A connection that is not ours (no tag), or was never counted.
    Untagged = "untagged",
    /// A listener appeared in the cgroup.
    Listening = "listening",
    /// A listener of the cgroup closed.
    ListenerClosed = "listener_closed",
    /// A bind to an address of the service got SO_REUSEPORT.
    BindShared = "bind_shared",
    /// A bind that is none of our business.
    BindOther = "bind_other",
    /// A bind to a port of the service at another address was refused.
    BindRefused = "bind_refused",
    /// SO_REUSEPORT could not be set on a bind to an address of the service.
    BindFailed = "bind_failed",
    /// A load word changed under us sixteen times in a row: the active count was changed by an
    /// addition, and the reservation left to expire; or a server was looked for again.
    WordContended = "word_contended",
    /// The plan or load map could not be read, which cannot happen with array maps.
    NoPlan = "no_plan",
    /// An event was lost because EVENTS was full.
    EventLost = "event_lost",
    /// The owner of a moved connection could not be recorded: MOVED is full.
    MovedLost = "moved_lost",
}

const _: () = {
    assert!(size_of::<Server>() == 32);
    assert!(size_of::<Run>() == 4);
    assert!(size_of::<Plan>() == 24 + SLOTS * (32 + 2) + GROUPS * 4 + GROUPS * SLOTS * 4);
    assert!(size_of::<Load>() == SLOTS * 32 + 32);
    assert!(size_of::<Tag>() == 8);
    assert!(size_of::<Home>() == 8);
    assert!(size_of::<Address>() == 24);
    assert!(size_of::<Event>() == 56);
    assert!(SLOTS.is_power_of_two() && BUCKETS.is_power_of_two() && SOCKETS <= 1 << 16);
};

impl Plan {
    /// A plan in which nothing is eligible and nothing listens.
    pub const EMPTY: Self = Self {
        policy: Policy::LeastConnections as u32,
        flags: 0,
        count: 0,
        eligible: 0,
        capacity: 0,
        reserved: 0,
        servers: [Server {
            limit: 0,
            weight: 1,
            rank: 0,
            reservable: 0,
            stride: TURN,
            generation: 0,
            reserved: 0,
        }; SLOTS],
        order: [0; SLOTS],
        rooms: [SOCKETS as u32; GROUPS],
        runs: [Run { first: 0, len: 0 }; GROUPS * SLOTS],
    };
}

impl Load {
    /// Nothing was ever counted.
    pub const ZERO: Self = Self {
        word: [0; SLOTS],
        turn: [0; SLOTS],
        total: [0; SLOTS],
        most: [0; SLOTS],
        waiting: 0,
        waiting_most: 0,
        clock: 0,
        moved: 0,
    };
}

#[cfg(feature = "user")]
mod pod {
    use super::{Address, Event, Home, Load, Plan, Tag};

    macro_rules! pod {
        ($($name:ty),*) => {$(
            // SAFETY: `repr(C)`, only integers and arrays of them, and no padding: the sizes
            // asserted above are the sums of the fields' sizes.
            unsafe impl aya::Pod for $name {}
        )*};
    }

    pod!(Address, Event, Home, Load, Plan, Tag);
}
