//! What kernel and user space agree on: map names, layouts, meanings.
//!
//! Every type here is `repr(C)`, of fixed width and without padding, because both sides read
//! the same bytes. Every map has one writer, named beside its type. A change of any layout or
//! meaning raises [`VERSION`], and a distributor never touches maps of another version, but moves
//! what is in older ones (`kernel/moving.rs` in `distributor-user`).
//!
//! So that it can, a new version only *appends*: fields to the end of a value, entries to an array.
//! Zero must be a good value for what is appended. What is there keeps its place and meaning; TAG
//! and SOCKETS never change, because their entries live in sockets; and an appended field of
//! [`Load`] or [`State`] gets its line in `LOAD_FIELDS` or `STATE_FIELDS` there.

/// The version of everything in this file. Part of the directory that holds the pins.
pub const VERSION: u32 = if cfg!(feature = "next-contract") { 5 } else { 4 };

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

/// Indices of SOCKETS below this are for servers' listeners, the others for rooms.
pub const SERVERS_END: usize = SOCKETS / 2;

/// Rooms of one group: at most half of SOCKETS over all groups, and few enough that making one
/// stays cheap, which walks the group for IPv6.
pub const ROOMS: usize = 1_024;

/// Entries of a ring of rooms: more than a group has rooms, so that no entry is overwritten
/// before it was used.
pub const RING: usize = 2_048;

/// If the attendant has not been seen for so long, new connections go past those that wait, to
/// any server with a place: nobody would hand over to those, and nobody is to starve.
pub const UNATTENDED: u64 = 1_000_000_000;

/// How long handshakes that were never completed make us suspicious, in nanoseconds: 8 epochs.
pub const SUSPICION: u64 = 8 << 30;

/// Buckets of the histogram of waits: the first counts those below a microsecond, and each
/// further one up to twice as much as the one before. The last has no end.
pub const WAITS: usize = 32;

/// Entries of the consistent-hash table. 8,192 gives each of 256 servers 32 on average.
pub const BUCKETS: usize = 8_192;

/// The largest limit: the active count of a load word has 20 bits, and stays below its end.
pub const LIMIT_MAX: u32 = 1_000_000;

/// The most connections of one service that may wait. Each is a socket in the kernel's memory
/// that nobody reads; more than these, and most would wait in vain.
pub const CAPACITY_MAX: u32 = 16_384;

/// The largest weight. Used counts times weights must stay below 2^63 (`select`).
pub const WEIGHT_MAX: u32 = 1_000;

/// Places for one source each that share a bucket of SOURCES.
pub const WAYS: usize = 16;

/// Buckets of SOURCES: 65,536 places in all. While half of them are taken, one bucket of 250 is full.
pub const BUCKETS_OF_SOURCES: usize = 4_096;

/// Prefixes whose clients belong to no source.
pub const EXEMPT: usize = 16;

/// The largest rate and the largest burst.
pub const RATE_MAX: u32 = 1_000_000;

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
    /// So many reservations that expire at once are suspicious; 0 = none ever are.
    pub suspect: u32,
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
/// The kernel moves connections without waking their new server, so a bell is rung: BELLS
/// tells which connections are one.
pub const FLAG_BELL: u32 = 1 << 2;

/// Servers are checked over the network: DIRECTED tells which connections are one of ours, and for
/// which server.
pub const FLAG_CHECKS: u32 = 1 << 3;

/// The service as a whole, or each source, has a limit or a rate: see [`Limits`].
pub const FLAG_LIMITED: u32 = 1 << 4;

/// What the service as a whole may have, or each source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Ceiling {
    /// Connections at a time, reservations included. 0 = no limit.
    pub connections: u32,
    /// Reservations among them.
    pub reservable: u32,
    /// Nanoseconds between two new connections: see [`crate::rate`]. 0 = no rate.
    pub interval: u64,
    /// By how many nanoseconds one may come too early.
    pub tolerance: u64,
}

/// Clients that belong to no source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Exempt {
    /// [`crate::source::key`] of them.
    pub high: u64,
    pub low: u64,
    /// The bits in which they are the same.
    pub bits: u64,
}

/// Limits beside those of the servers. All zero: there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Limits {
    pub service: Ceiling,
    pub source: Ceiling,
    /// What the place of a source in the table depends on. Never changes while there is a table.
    pub seed: u64,
    /// Buckets in use, less 1: a power of two, less 1.
    pub buckets: u32,
    /// 1: who comes when the service has all it may have waits. 0: he is refused.
    pub waits: u32,
    /// The bits of an address that tell its source, of IPv4 (mapped: 97 to 128) and of IPv6 (1 to 128).
    /// 0: sources have no limit and are not counted.
    pub bits_ipv4: u32,
    pub bits_ipv6: u32,
    /// So many of the service's reservations that expire at once are suspicious; 0 = none ever are.
    pub suspect: u32,
    /// How many of `exempt` count.
    pub exempt_count: u32,
    /// Connections that were there before any were counted for the service, as far as they are still
    /// open: so many fewer may be counted.
    pub earlier: u32,
    /// The limit that an operator has set since the start; 0 = he has not, `u32::MAX` = none. Only the
    /// next distributor reads it.
    pub asked: u32,
    pub exempt: [Exempt; EXEMPT],
}

/// One source: a place in a bucket of SOURCES. One writer: the programs; user space rolls the words
/// once a minute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Source {
    /// [`crate::source::key`]; both halves are 0 where there never was one.
    pub high: u64,
    pub low: u64,
    /// Its connections, waiting ones included, and reservations: see [`crate::word`].
    pub word: u64,
    /// When its next connection is due: see [`crate::rate`].
    pub due: u64,
}

/// Sources that share a bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Bucket {
    pub sources: [Source; WAYS],
}

/// Which limit somebody came above, as a number: an index of [`Load::over`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Over {
    ServiceConnections = 0,
    ServiceRate = 1,
    SourceConnections = 2,
    SourceRate = 3,
}

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
    /// Connections that may wait. 0 = none: who cannot be served is refused.
    pub capacity: u32,
    /// Zero; keeps the size a multiple of 8 without padding.
    pub reserved: u32,
    /// By slot.
    pub servers: [Server; SLOTS],
    /// The eligible slots, in the configuration's order.
    pub order: [u16; SLOTS],
    /// Per group and slot: `runs[group * SLOTS + slot]`.
    pub runs: [Run; GROUPS * SLOTS],
    /// What the service and each source may have. Appended in version 4.
    pub limits: Limits,
}

/// What the kernel counts for one service. One writer: the programs; but user space rolls the
/// words once a minute, and corrects an active count or `waiting` if it differs from the sockets
/// there are; by a compare-and-swap or an addition like theirs.
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
    /// Entries of OWNERS.
    pub owned: u64,
    /// Per group the current room, its sequence number in the ring, and how many SYNs it was
    /// given: sequence << 16 | SYNs.
    pub current: [u64; GROUPS],
    /// Per group how many spare rooms were ever taken.
    pub spares_taken: [u64; GROUPS],
    /// Until when (`bpf_ktime_get_ns`) no reservation is made, because too many expired.
    pub suspicious_until: u64,
    /// Connections of dead servers that were ever parked: their order among themselves, and
    /// before everybody else.
    pub orphans: u64,
    /// How long those waited that were handed over: see [`WAITS`].
    pub waits: [u64; WAITS],
    /// The sum of these times, in microseconds.
    pub waited: u64,
    /// The connections and reservations that count for the service as a whole: those of servers. See
    /// [`crate::word`]. Appended in version 4, like the next two.
    pub places: u64,
    /// When the service's next connection is due: see [`crate::rate`].
    pub due: u64,
    /// When somebody last came above each limit (`bpf_ktime_get_ns`): see [`Over`]. 0 = never.
    pub over: [u64; 4],
    /// Connections of servers that closed.
    #[cfg(feature = "next-contract")]
    pub closed: u64,
}

/// The rooms of one group, in the order in which they are to be used. ROOMS holds one for each
/// group. One writer: user space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Rooms {
    /// Entries of `ring` that were ever made: the one with the sequence number `s`, below this,
    /// stands at `s % RING`.
    pub made: u64,
    /// Rooms with a smaller sequence number are closed: none of them is current any more.
    pub least: u64,
    /// Entries of `spare` that were ever made, likewise.
    pub spares: u64,
    /// Whoever comes behind this in the order is parked and not handed over: somebody in another
    /// room is before him.
    pub bound: u64,
    /// So many connections complete their handshake in a room before the next one is current.
    pub share: u32,
    /// So many connections of a closing listener are parked in the same spare room.
    pub chunk: u32,
    /// SYNs that a room is given before the next one becomes current, although no handshake was
    /// completed: fewer than its SYN queue holds, or a flood would fill that, and the kernel
    /// would drop SYNs without a word.
    pub crowd: u32,
    /// Connections in the last room there is, beyond which the next one is refused: fewer than
    /// its accept queue holds, or the kernel would drop SYNs without a word.
    pub full: u32,
    /// Rooms that become current one after the other: indices in SOCKETS.
    pub ring: [u32; RING],
    /// Rooms for connections that are parked.
    pub spare: [u32; RING],
}

/// What user space tells of the thread that hands over. One entry; one writer: user space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Attendant {
    /// When it was last at work (`bpf_ktime_get_ns`).
    pub seen: u64,
    /// 1 if it sleeps, so that WAKES must be written for it to look.
    pub asleep: u64,
    /// The cgroup (inode number) in which rooms are made: nobody needs to know of each.
    pub cgroup: u64,
}

/// What the kernel knows of a listener. STATES holds one for each index of SOCKETS. One writer:
/// the programs; but user space makes it zero before it gives the index to a room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct State {
    /// Connections that completed their handshake in it.
    pub completed: u64,
    /// Connections that came to wait in it, in either way.
    pub entered: u64,
    /// Those of them that do not any more: handed over, parked elsewhere, or gone.
    pub gone: u64,
    /// The place in the order of the first that came: the time when its handshake was completed,
    /// or its number if it came from a dead server, which is smaller. 0 = nobody came.
    pub first: u64,
    /// Since when the first that came waits (`bpf_ktime_get_ns`).
    pub since: u64,
    /// Connections that were moved to it, if it is a server's.
    pub moved: u64,
    /// SYNs that it was given and that will complete their handshake in it, if at all.
    pub offered: u64,
}

/// Whose a connection is that waited or was moved. OWNERS holds it by the connection's cookie,
/// until it closes. One writer: the programs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Owner {
    /// A slot, [`in_room`], or [`CHECKER`].
    pub owner: u32,
    /// 0, [`UNSERVED`] or [`IN_SERVICE`]; and for who waits, by which bits his source is counted, as in
    /// [`Tag::counted`].
    pub marks: u32,
    /// Since when it waits, or waited (`bpf_ktime_get_ns`).
    pub since: u64,
    /// Its place in the order: see [`State::first`].
    pub order: u64,
}

/// The server to which a connection of ours is to go, and no other. DIRECTED holds it by the
/// connection's client address as long as that is open. One writer: user space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Directed {
    pub slot: u32,
    /// [`Server::generation`]: the slot may have a new owner by now.
    pub generation: u32,
    /// Which of its listeners in the group, counted round and round.
    pub nth: u32,
    /// Zero; keeps the size a multiple of 8 without padding.
    pub reserved: u32,
}

/// Where a closing listener's connections are parked. PARKED holds it by the listener's cookie.
/// One writer: the programs; user space removes it when the listener is closed for good.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Parked {
    /// The room of the last one.
    pub index: u32,
    /// How many of them are in there.
    pub count: u32,
}

/// The owner that is a room, by its index in SOCKETS.
#[inline(always)]
pub const fn in_room(index: u32) -> u32 {
    1 << 31 | index
}

/// The index of the room that is the owner; `None` for a slot.
#[inline(always)]
pub const fn room_of(owner: u32) -> Option<u32> {
    if owner >> 31 == 1 { Some(owner & !(1 << 31)) } else { None }
}

/// The bucket of a wait: see [`WAITS`].
#[inline(always)]
pub const fn wait_bucket(microseconds: u64) -> usize {
    let bucket = (u64::BITS - microseconds.leading_zeros()) as usize;
    if bucket < WAITS { bucket } else { WAITS - 1 }
}

/// Which slot the children of a listener belong to. TAG, a socket storage that is cloned to
/// every child: user space writes the listener's, the kernel marks its child's, and user space
/// marks a child that it dismisses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Tag {
    /// A slot, [`ROOM`] or [`DISMISSED`].
    pub slot: u32,
    /// [`COUNTED`] while this connection is counted, [`CHECK`] if it never is, and [`GONE`] after
    /// either. 0 before, and in a listener's own tag. With [`COUNTED`] may come [`IN_SERVICE`], and the
    /// bits of an address by which its source is counted ([`counted_by`]).
    pub counted: u32,
    /// The room's index in SOCKETS.
    pub index: u32,
    /// The room's group.
    pub group: u32,
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

/// [`Tag::counted`] of a connection that is counted.
pub const COUNTED: u32 = 1;
/// [`Tag::counted`] of one that was counted down when it closed. Nobody sees it but `track`, if it
/// runs twice for that close.
pub const GONE: u32 = 2;

/// [`Tag::counted`] of one that was directed, and counts for nobody.
pub const CHECK: u32 = 3;

/// [`Owner::owner`] of a connection that was directed. It goes to nobody else.
pub const CHECKER: u32 = u32::MAX >> 1;

/// In [`Tag::counted`] or [`Owner::marks`]: it counts for the service as a whole.
pub const IN_SERVICE: u32 = 4;
/// [`Owner::marks`] of a connection that has waited since it came: it does not count for the service as
/// a whole yet.
pub const UNSERVED: u32 = 8;

/// Whether a connection is counted, whatever else it is counted for ([`Tag::counted`]).
#[inline(always)]
pub const fn is_counted(counted: u32) -> bool {
    counted & (COUNTED | GONE) == COUNTED
}

/// The mark of a connection that is counted for the source of so many bits.
#[inline(always)]
pub const fn marked(bits: u32) -> u32 {
    bits << 8
}

/// By how many bits of its address its source is counted; 0 if it is not.
#[inline(always)]
pub const fn counted_by(marks: u32) -> u32 {
    marks >> 8 & 0xff
}

/// The slot number that means "waits in a room".
pub const ROOM: u32 = u32::MAX;
/// The slot number of a connection that waited and is being turned away by user space.
pub const DISMISSED: u32 = u32::MAX - 1;

/// A client as BELLS knows it: the words of its IP address folded into one, and its port.
#[inline(always)]
pub const fn client(ip: [u32; 4], port: u32) -> u64 {
    ((ip[0] ^ ip[1] ^ ip[2] ^ ip[3]) as u64) << 16 | (port & 0xffff) as u64
}

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
    /// A new connection went to the room, because no server has a place.
    WaitLimit = "wait_limit",
    /// A new connection went to the room, because others wait already.
    WaitTurn = "wait_turn",
    /// A new connection went to the room, because too many handshakes are never completed for
    /// it to reserve a place.
    WaitSuspect = "wait_suspect",
    /// Refused: every eligible server is at its limit, and nobody may wait.
    RefusedLimit = "refused_limit",
    /// Refused: as many wait as may.
    RefusedCapacity = "refused_capacity",
    /// Refused: the service is being stopped.
    RefusedClosing = "refused_closing",
    /// Refused: there was no room to select, or the last one is full.
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
    /// A connection of a closing listener was parked behind others, for want of a spare room.
    ParkedBehind = "parked_behind",
    /// A half-open connection of a closing listener was left to the current room.
    ParkedHalfOpen = "parked_half_open",
    /// A half-open connection of a closing listener was given up while we are suspicious.
    DroppedHalfOpen = "dropped_half_open",
    /// A bell: a connection of ours that wakes a server to which others were moved.
    Bell = "bell",
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
    /// Counted down: a waiting connection was dismissed by user space.
    Dismissed = "dismissed",
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
    /// The owner of a connection could not be recorded: OWNERS is full.
    OwnerLost = "owner_lost",
    /// A connection of ours went to the server that it is to check.
    Directed = "directed",
    /// A connection of ours was refused: the server that it is to check has no listener there.
    DirectedRefused = "directed_refused",
    /// A connection of ours was established. It counts for nobody.
    CheckEstablished = "check_established",
    /// A connection of ours is gone.
    CheckClosed = "check_closed",
    /// A connection of ours was given up, because the listener of the server that it is to check closed.
    CheckGivenUp = "check_given_up",
    /// Refused: its source has as many connections as each may have.
    RefusedSourceLimit = "refused_source_limit",
    /// Refused: its source opens connections faster than each may.
    RefusedSourceRate = "refused_source_rate",
    /// Refused: the service has as many connections as it may have.
    RefusedServiceLimit = "refused_service_limit",
    /// Refused: connections come faster than the service may get them.
    RefusedServiceRate = "refused_service_rate",
    /// A new connection went to the room, because the service has as many as it may have.
    WaitServiceLimit = "wait_service_limit",
    /// A new connection went to the room, because they come faster than the service may get them.
    WaitServiceRate = "wait_service_rate",
    /// A connection is not counted for its source, because its bucket of SOURCES is full.
    SourceUnknown = "source_unknown",
}

const _: () = {
    assert!(size_of::<Server>() == 32);
    assert!(size_of::<Run>() == 4);
    assert!(size_of::<Ceiling>() == 24 && size_of::<Exempt>() == 24 && size_of::<Source>() == 32);
    assert!(size_of::<Limits>() == 2 * 24 + 40 + EXEMPT * 24);
    assert!(size_of::<Bucket>() == WAYS * 32);
    assert!(size_of::<Plan>() == 24 + SLOTS * (32 + 2) + GROUPS * SLOTS * 4 + size_of::<Limits>());
    let appended = if cfg!(feature = "next-contract") { 8 } else { 0 };
    assert!(size_of::<Load>() == SLOTS * 32 + 32 + GROUPS * 16 + 16 + WAITS * 8 + 8 + 48 + appended);
    assert!(size_of::<Rooms>() == 48 + RING * 8);
    assert!(size_of::<Attendant>() == 24);
    assert!(size_of::<State>() == 56);
    assert!(size_of::<Owner>() == 24);
    assert!(size_of::<Parked>() == 8);
    assert!(size_of::<Directed>() == 16);
    assert!(room_of(CHECKER).is_none() && CHECKER as usize >= SLOTS);
    assert!(size_of::<Tag>() == 16);
    assert!(size_of::<Home>() == 8);
    assert!(size_of::<Address>() == 24);
    assert!(size_of::<Event>() == 56);
    assert!(WAYS.is_power_of_two() && BUCKETS_OF_SOURCES.is_power_of_two());
    assert!(RING.is_power_of_two() && RING > ROOMS && SOCKETS < 1 << 31);
    assert!(SLOTS.is_power_of_two() && BUCKETS.is_power_of_two() && SOCKETS <= 1 << 16);
};

impl Limits {
    /// No limits.
    pub const NONE: Self = {
        let none = Ceiling { connections: 0, reservable: 0, interval: 0, tolerance: 0 };
        Self {
            service: none,
            source: none,
            seed: 0,
            buckets: 0,
            waits: 0,
            bits_ipv4: 0,
            bits_ipv6: 0,
            suspect: 0,
            exempt_count: 0,
            earlier: 0,
            asked: 0,
            exempt: [Exempt { high: 0, low: 0, bits: 0 }; EXEMPT],
        }
    };
}

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
            suspect: 0,
        }; SLOTS],
        order: [0; SLOTS],
        runs: [Run { first: 0, len: 0 }; GROUPS * SLOTS],
        limits: Limits::NONE,
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
        owned: 0,
        current: [0; GROUPS],
        spares_taken: [0; GROUPS],
        suspicious_until: 0,
        orphans: 0,
        waits: [0; WAITS],
        waited: 0,
        places: 0,
        due: 0,
        over: [0; 4],
        #[cfg(feature = "next-contract")]
        closed: 0,
    };
}

#[cfg(feature = "user")]
mod pod {
    use super::{Address, Bucket, Directed, Event, Home, Load, Owner, Parked, Plan, Rooms, State, Tag};

    macro_rules! pod {
        ($($name:ty),*) => {$(
            // SAFETY: `repr(C)`, only integers and arrays of them, and no padding: the sizes
            // asserted above are the sums of the fields' sizes.
            unsafe impl aya::Pod for $name {}
        )*};
    }

    pod!(Address, Bucket, Directed, Event, Home, Load, Owner, Parked, Plan, Rooms, State, Tag);
}
